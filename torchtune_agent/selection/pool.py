"""What a selection chooses from: one row per sample, with what is known of it.

A pool may know little (ids and lengths) or all (losses, entropy, embeddings). What a strategy needs and the pool lacks
is asked for here, so that every strategy fails in the same words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from torchtune_agent.data.token_class import GROUPS
from torchtune_agent.errors import UserError, did_you_mean

SCORE_ON = tuple(GROUPS)  # losses a sample can be ranked by: "overall", "tool_call", "arg_value", ...


@dataclass(frozen=True)
class Pool:
    """Samples by row. Losses are means over a sample's own tokens, so that its length does not enter them."""

    ids: Sequence[str]
    num_tokens: np.ndarray  # int64 [n]
    # By group of token classes, [n]; NaN where a sample has no token of the group
    losses: Mapping[str, np.ndarray] = field(default_factory=dict)
    entropy: np.ndarray | None = None  # [n], in nats per token
    error: np.ndarray | None = None  # [n], mean of 1 - p[label]
    embeddings: np.ndarray | None = None  # float32 [n, d]
    tools: Sequence[tuple[str, ...]] | None = None
    sources: Sequence[str] | None = None

    def __post_init__(self) -> None:
        self._check_ids()
        columns = {"num_tokens": self.num_tokens, "entropy": self.entropy, "error": self.error}
        columns |= {"embeddings": self.embeddings, "tools": self.tools, "sources": self.sources}
        for name, column in (columns | {f"loss of {k}": v for k, v in self.losses.items()}).items():
            if column is not None and len(column) != len(self):
                raise UserError(
                    f"{name}: {len(column)} values for {len(self)} samples. Score the pool again; the scores are not "
                    "those of this pool."
                )
        for name in ("entropy", "error"):
            if columns[name] is not None:
                self._check_finite(name, np.asarray(columns[name]))
        if self.embeddings is not None:
            self._check_finite("embeddings", self.embeddings.sum(1, dtype=np.float64))
        for name, loss in self.losses.items():
            self._check_finite(f"loss of {name}", loss[~np.isnan(loss)])
        if "overall" in self.losses:
            self._check_finite("loss", self.losses["overall"])

    def __len__(self) -> int:
        return len(self.ids)

    def loss(self, group: str = "overall") -> np.ndarray:
        """The mean loss of every sample on its tokens of `group`; NaN where it has none."""
        if not self.losses:
            raise UserError(
                "strategy: needs the losses of a model, and the pool has none. Give a model (`select(samples, model)`, "
                "or coreset.scores_from=a folder of scores), or use strategy='diversity' or 'random'."
            )
        if group not in self.losses:
            raise UserError(f"score_on={group}: the scores have no such loss. {did_you_mean(group, self.losses)}")
        return self.losses[group]

    def uncertainty(self) -> np.ndarray:
        return self._needed(self.entropy, "entropy")

    def surprise(self) -> np.ndarray:
        return self._needed(self.error, "error")

    def vectors(self) -> np.ndarray:
        return self._needed(self.embeddings, "embeddings")

    def with_embeddings(self, embeddings: np.ndarray) -> "Pool":
        return replace(self, embeddings=embeddings)

    def _needed(self, column: np.ndarray | None, name: str) -> np.ndarray:
        if column is None:
            raise UserError(
                f"strategy: needs the {name} of every sample, and the pool has none (a ledger of losses holds no "
                "more than losses). Score the pool with a model, or use strategy='loss_topk' or 'random'."
            )
        return column

    def _check_ids(self) -> None:
        missing = [i for i, name in enumerate(self.ids) if not name]
        if missing:
            raise UserError(f"ids: sample {missing[0]} of the pool has none. Every sample needs an id of its own.")
        if len(set(self.ids)) < len(self.ids):
            seen: set[str] = set()
            twice = next(name for name in self.ids if name in seen or seen.add(name))
            raise UserError(f"ids: '{twice}' names several samples of the pool. Every sample needs an id of its own.")

    def _check_finite(self, name: str, values: np.ndarray) -> None:
        bad = ~np.isfinite(values)
        if not bad.any():
            return
        where = f"sample '{self.ids[int(bad.argmax())]}'" if len(values) == len(self) else "a sample"
        raise UserError(
            f"scores: the {name} of {where} is not a finite number ({int(bad.sum()):,} of {len(self):,} samples). The "
            "model that scored them is broken (a diverged checkpoint?), or the file is; score again with a sound model."
        )
