"""Scores of every sample under a model: forward only, split over ranks, resumable.

The pool is cut into batches, and batches into parts, before anyone asks how many ranks there are: a part holds the same
batches, computed the same way, whoever computes it. So its file is the same on any number of ranks, and a run that is
started again computes only the parts that are not there.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from torch import nn
from tqdm import tqdm

from torchtune_agent.data.collate import Batch, Collator
from torchtune_agent.data.joined import JoinedDataset, SampleInfo
from torchtune_agent.data.token_class import GROUPS
from torchtune_agent.distributed import World
from torchtune_agent.errors import UserError
from torchtune_agent.losses import head
from torchtune_agent.losses.output import at_output
from torchtune_agent.metrics.table import COLUMNS, NUM_CLASSES
from torchtune_agent.selection.embedding import NUM_DIMENSIONS, projection
from torchtune_agent.selection.scores import CLASSES, merged, schema, unique_ids, write_table

_NLL, _ENTROPY = COLUMNS.index("nll"), COLUMNS.index("exact_entropy")
_SUMS = ("tokens", "nll", "entropy", "error")
_OVERALL = list(GROUPS["overall"])


@dataclass(frozen=True)
class ScoringOptions:
    """How a pool is scored; what is computed does not depend on it, but for rounding.

    Args:
        batch_size: samples of a forward pass.
        batches_per_part: how much work is lost at most, on each rank, when a run is interrupted.
        embedding_dim: of the embeddings that are kept; wider hidden states are projected, at random and always alike.
        chunk_size, compile: see CrossEntropy.
    """

    batch_size: int = 8
    batches_per_part: int = 32
    embedding_dim: int = NUM_DIMENSIONS
    chunk_size: int = 2048
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "batches_per_part", "embedding_dim", "chunk_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1.")


@dataclass
class SampleScores:
    """Of the samples of one batch, on the host."""

    sums: np.ndarray  # float64 [samples, classes, _SUMS]
    embeddings: np.ndarray  # float32 [samples, dimensions]

    def means(self) -> dict[str, np.ndarray]:
        """Per token of reasoning and calls; of samples that have none, per trained token, and 0 where none is."""
        total = self.sums[:, _OVERALL].sum(1)
        bare = total[:, 0] == 0
        total[bare] = self.sums[bare].sum(1)
        count = np.maximum(total[:, 0], 1)
        return {name: total[:, i] / count for i, name in ((1, "loss"), (2, "entropy"), (3, "error"))}


class Scorer:
    """Scores batches under `model`, which is not changed."""

    def __init__(self, model: nn.Module, device: torch.device, options: ScoringOptions) -> None:
        self._model, self._device, self._options = model, device, options
        self._chunking = head.Chunking(options.chunk_size, options.compile)
        self._projection: torch.Tensor | None = None
        self._projects: int | None = None  # vectors of this width

    @torch.no_grad()
    def __call__(self, batch: Batch) -> SampleScores:
        batch = batch.to(self._device)
        labels = batch.labels.flatten()[batch.supervised]
        weights = torch.ones_like(labels, dtype=torch.float32)

        def measure(at: head.Projection) -> tuple[torch.Tensor | None, ...]:
            return head.cross_entropy(at, labels, weights, self._chunking, 1)[1], at.terms[0]

        was_training = self._model.training
        self._model.eval()
        try:
            tokens, hidden = at_output(self._model, batch, measure)
        finally:
            self._model.train(was_training)
        assert tokens is not None and hidden is not None
        return self._of_samples(batch, tokens, hidden)

    def _of_samples(self, batch: Batch, tokens: torch.Tensor, hidden: torch.Tensor) -> SampleScores:
        number = len(batch.first_calls) - 1
        sample = batch.sample_index.flatten()[batch.supervised].long()
        place = sample * NUM_CLASSES + batch.token_class.flatten()[batch.supervised].long()
        nll, entropy = tokens[:, _NLL].double(), tokens[:, _ENTROPY].double()
        of_tokens = torch.stack([torch.ones_like(nll), nll, entropy, -torch.expm1(-nll)], 1)
        sums = nll.new_zeros(number * NUM_CLASSES, len(_SUMS)).index_add_(0, place, of_tokens)
        sums = sums.view(number, NUM_CLASSES, len(_SUMS))
        states = nll.new_zeros(number, hidden.shape[1]).index_add_(0, sample, hidden.double())
        states = (states / sums[:, :, 0].sum(1, keepdim=True).clamp(min=1)).float()
        matrix = self._matrix(hidden.shape[1])
        if matrix is not None:
            states = states @ matrix
        return SampleScores(sums.cpu().numpy(), states.cpu().numpy())

    def _matrix(self, width: int) -> torch.Tensor | None:
        if self._projects != width:
            self._projects, self._projection = width, projection(width, self._options.embedding_dim)
            if self._projection is not None:
                self._projection = self._projection.to(self._device)
        return self._projection


@dataclass(frozen=True)
class _Plan:
    """Which rows of the data set are in which batch, and which batches in which part."""

    order: np.ndarray
    options: ScoringOptions

    @property
    def num_batches(self) -> int:
        return -(-len(self.order) // self.options.batch_size)

    @property
    def num_parts(self) -> int:
        return -(-self.num_batches // self.options.batches_per_part)

    def batches(self, part: int) -> list[list[int]]:
        first = part * self.options.batches_per_part
        numbers = range(first, min(first + self.options.batches_per_part, self.num_batches))
        size = self.options.batch_size
        return [self.order[number * size : (number + 1) * size].tolist() for number in numbers]


def score(
    model: nn.Module,
    dataset: JoinedDataset,
    collator: Collator,
    folder: Path,
    world: World,
    options: ScoringOptions,
    *,
    replace_others: bool = False,
) -> Path:
    """Score `dataset` under `model` into `folder`/scores.parquet; returns that path. Every rank calls it.

    `folder`/scores holds the parts. Parts of another pool or another model are refused, or with `replace_others`
    removed.
    """
    lengths = dataset.lengths
    order = np.arange(len(dataset)) if lengths is None else np.argsort(-lengths, kind="stable")  # longest first
    plan = _Plan(order, options)
    infos = [dataset.info(row) for row in range(len(dataset))]
    ids = unique_ids([info.where for info in infos])
    scorer = Scorer(model, world.device, options)
    parts = folder / "scores"

    def scored(rows: Sequence[int]) -> SampleScores:
        return scorer(collator([[dataset[row]] for row in rows]))

    probe = scored(plan.batches(0)[0])  # on every rank: with shards of a model, all must take part
    done = _begin(parts, plan, ids, probe, world, replace_others=replace_others)
    missing = [part for part in range(plan.num_parts) if part not in done]
    writes = world.mesh["tp"].get_local_rank() == 0
    bar = tqdm(total=plan.num_parts, initial=len(done), desc="Scoring", unit="part", disable=not world.is_main)
    for first in range(0, len(missing), world.dp_size):
        together = missing[first : first + world.dp_size]
        own = together[world.dp_rank] if world.dp_rank < len(together) else None
        batches = [] if own is None else plan.batches(own)
        tables = []
        for number in range(max(len(plan.batches(part)) for part in together)):
            rows = batches[number] if number < len(batches) else []  # none: this rank only takes part
            scores = scored(rows)
            if rows:
                tables.append(_table(rows, scores, [ids[row] for row in rows], [infos[row] for row in rows], dataset))
        if own is not None and writes:
            write_table(pyarrow.concat_tables(tables), _part(parts, own))
        bar.update(len(together))
    bar.close()
    world.barrier()
    result = folder / "scores.parquet"
    if world.is_main:
        write_table(merged([_part(parts, part) for part in range(plan.num_parts)]), result)
    world.barrier()
    return result


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06}.parquet"


def _begin(
    folder: Path, plan: _Plan, ids: Sequence[str], probe: SampleScores, world: World, *, replace_others: bool
) -> set[int]:
    """The parts that are there already, as rank 0 sees them; `scoring.json` says what they are parts of."""
    mistake, done = "", set[int]()
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "samples": len(ids),
            "ids": blake2b("\n".join(ids).encode(), digest_size=16).hexdigest(),
            "order": blake2b(plan.order.tobytes(), digest_size=16).hexdigest(),
            "batch_size": plan.options.batch_size,
            "batches_per_part": plan.options.batches_per_part,
            "embedding_dim": plan.options.embedding_dim,
            "first_losses": probe.means()["loss"].tolist(),
        }
        known = folder / "scoring.json"
        if known.exists():
            mistake = _difference(json.loads(known.read_text()), dict(about))
            if mistake and replace_others:
                shutil.rmtree(folder)
                folder.mkdir()
                mistake = ""
        if not known.exists():
            partial = known.with_suffix(".partial")
            partial.write_text(json.dumps(about, indent=1))
            partial.replace(known)
        done = {part for part in range(plan.num_parts) if _part(folder, part).exists()}
    mistake, done = world.gather((mistake, done))[0]
    if mistake:
        raise UserError(f"{folder}: holds scores of {mistake}. Delete the folder, or name another output_dir.")
    return done


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What the scores that are there are of, where that is something else."""
    losses, own = before.pop("first_losses"), now.pop("first_losses")
    names = {"samples": "another pool", "ids": "another pool", "order": "another pool"}
    for key, value in now.items():
        if before.get(key) != value:
            return names.get(key, f"{key}={before.get(key)}")
    same = np.allclose(losses, own, rtol=1e-3, atol=1e-6, equal_nan=True)
    return "" if same else "another model (its losses are different)"


def _table(
    rows: Sequence[int], scores: SampleScores, ids: Sequence[str], infos: Sequence[SampleInfo], dataset: JoinedDataset
) -> pyarrow.Table:
    width = scores.embeddings.shape[1]
    known = dataset.lengths
    columns: dict[str, Any] = {
        "row": list(rows),
        "sample": list(ids),
        "source": [info.source for info in infos],
        "tools": [list(info.tools) for info in infos],
        "num_tokens": [int(known[row]) if known is not None else len(dataset[row]["tokens"]) for row in rows],
        **scores.means(),
        **{f"tokens_{kind.name.lower()}": scores.sums[:, kind, 0].astype(np.int64) for kind in CLASSES},
        **{f"nll_{kind.name.lower()}": scores.sums[:, kind, 1] for kind in CLASSES},
        "embedding": pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(scores.embeddings.reshape(-1)), width),
    }
    return pyarrow.table(columns, schema=schema(width))


def batches_of(samples: Sequence[Any], collator: Collator, size: int) -> Iterator[Batch]:
    """Batches of samples in their order."""
    for start in range(0, len(samples), size):
        yield collator([[sample] for sample in samples[start : start + size]])
