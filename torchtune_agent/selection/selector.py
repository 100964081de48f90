"""CoresetSelector: a selection from samples in memory, in one line."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from torchtune_agent.data.collate import Collator
from torchtune_agent.data.dataset import AgentSFTTransform
from torchtune_agent.data.token_class import GROUPS
from torchtune_agent.errors import UserError
from torchtune_agent.selection.duplicates import signatures
from torchtune_agent.selection.embedding import token_embeddings
from torchtune_agent.selection.options import Options
from torchtune_agent.selection.pool import Pool
from torchtune_agent.selection.scores import mean
from torchtune_agent.selection.scoring import Scorer, ScoringOptions, batches_of
from torchtune_agent.selection.selecting import Selection, select
from torchtune_agent.selection.strategies import NEEDS, Features

StrategyName = Literal["loss_topk", "diversity", "hybrid", "random", "uncertainty", "facility_location", "ssis"]


class CoresetSelector:
    """Picks the samples that are worth training on.

    Args:
        strategy: "loss_topk" (highest loss), "diversity" (greedy k-center), "hybrid" (`loss_ratio` by loss, the rest
            far from all picks), "random", "uncertainty" (highest entropy), "facility_location", "ssis".
        target_size: how many samples, or a share as "30%".
        loss_ratio: of "hybrid".
        tokenizer: for samples that are records (`messages`) and not tokens yet.
        batch_size: samples of a forward pass.
        options: further ones of `selection.Options`: score_on, dedup_similarity, loss_cap_quantile, min_per_tool, ...

    Losses and embeddings are a model's, where one is given; without one, embeddings are of hashed tokens.
    """

    def __init__(
        self,
        strategy: StrategyName = "hybrid",
        target_size: int | str = 1000,
        loss_ratio: float = 0.6,
        *,
        tokenizer: Any = None,
        batch_size: int = 8,
        **options: Any,
    ) -> None:
        self.options = Options(strategy, target_size, loss_ratio, **options)
        self._tokenizer = tokenizer
        self._scoring = ScoringOptions(batch_size=batch_size)

    def select(self, samples: Sequence[Mapping[str, Any]], model: nn.Module | None = None) -> list[Any]:
        """The samples that were picked, in the order they came in."""
        return [samples[row] for row in self.selection(samples, model).rows.tolist()]

    def selection(self, samples: Sequence[Mapping[str, Any]], model: nn.Module | None = None) -> Selection:
        """Which rows were picked and why, and what became of the others."""
        needs = set(NEEDS[self.options.strategy]) & {"loss", "entropy", "error"}
        if model is None and needs:
            raise UserError(
                f"strategy={self.options.strategy}: needs a model for the {' and '.join(sorted(needs))} of every "
                "sample. Call select(samples, model), or use strategy='diversity' or 'random'."
            )
        tokenized = self._tokenized(samples)
        pool = self._pool(tokenized, model, samples)
        tokens = [np.asarray(sample["tokens"]) for sample in tokenized]
        signed = signatures(tokens, self.options.seed) if self.options.dedup_similarity is not None else None
        device = "cpu" if model is None else str(_device(model))
        return select(pool, self.options, signatures=signed, device=device)

    def compute_losses(self, samples: Sequence[Mapping[str, Any]], model: nn.Module) -> list[float]:
        """The mean loss per token of every sample under `model`."""
        return self._scores(self._tokenized(samples), model)["loss"].tolist()

    def compute_diversity(self, samples: Sequence[Mapping[str, Any]], model: nn.Module | None = None) -> np.ndarray:
        """The distance of every sample to every other [n, n], 0 to 2, by the embeddings that `select` uses."""
        vectors = Features(self._pool(self._tokenized(samples), model, samples)).vectors
        distances = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
        return distances.cpu().numpy()

    def _tokenized(self, samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        if not len(samples):
            raise UserError("samples: there are none to select from.")
        first = samples[0]
        if "tokens" in first and "labels" in first:
            return [samples[row] for row in range(len(samples))]
        if self._tokenizer is None:
            raise UserError(
                f"samples: have no 'tokens' and 'labels' (the first has {', '.join(map(repr, sorted(first)))}). Give "
                "samples of an AgentSFTDataset, or records together with CoresetSelector(tokenizer=...)."
            )
        transform = AgentSFTTransform(self._tokenizer)
        return [transform(samples[row]) for row in range(len(samples))]

    def _pool(
        self, tokenized: Sequence[Mapping[str, Any]], model: nn.Module | None, samples: Sequence[Mapping[str, Any]]
    ) -> Pool:
        lengths = np.array([len(sample["tokens"]) for sample in tokenized])
        ids = [f"sample {row}" for row in range(len(tokenized))]
        tools = sources = None
        if hasattr(samples, "info"):  # a data set knows
            infos = [samples.info(row) for row in range(len(samples))]  # pyright: ignore[reportAttributeAccessIssue]
            tools, sources = [info.tools for info in infos], [info.source for info in infos]
        if model is None:
            embeddings = token_embeddings([np.asarray(sample["tokens"]) for sample in tokenized])
            return Pool(ids, lengths, embeddings=embeddings, tools=tools, sources=sources)
        scores = self._scores(tokenized, model)
        losses = {group: scores.pop(f"loss of {group}") for group in GROUPS} | {"overall": scores.pop("loss")}
        return Pool(ids, lengths, losses=losses, tools=tools, sources=sources, **scores)

    def _scores(self, tokenized: Sequence[Mapping[str, Any]], model: nn.Module) -> dict[str, np.ndarray]:
        scorer = Scorer(model, _device(model), self._scoring)
        found = [scorer(batch) for batch in batches_of(tokenized, Collator(pad_id=0), self._scoring.batch_size)]
        means = [scores.means() for scores in found]
        result = {name: np.concatenate([one[name] for one in means]) for name in means[0]}
        sums = np.concatenate([scores.sums for scores in found])
        for group, kinds in GROUPS.items():
            of_group = sums[:, list(kinds)].sum(1)
            result[f"loss of {group}"] = mean(of_group[:, 1], of_group[:, 0])
        return result | {"embeddings": np.concatenate([scores.embeddings for scores in found])}


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
