"""The data seam's first implementation: samples in a seeded global order, cut into optimizer steps.

The order belongs to the run, not to the ranks: step k trains the same samples on any number of ranks.
Nothing is dropped and nothing repeated; the last step of an epoch is simply smaller.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np

from torchtune_agent.data.collate import Batch, Collator
from torchtune_agent.data.fingerprint import combine
from torchtune_agent.data.joined import JoinedDataset, SampleInfo
from torchtune_agent.data.packing import pack


class BatchSource(Protocol):
    """What a recipe plugs into the Trainer as data.

    An epoch is a sequence of rows, which belongs to the run; a step takes the next few of them, however many ranks
    share in it. One that changes as the run goes on declares that as training.state.Stateful.
    """

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        ...

    @property
    def rows_per_step(self) -> int:
        """What a step takes, over all ranks, but for an epoch's last."""
        ...

    def epoch(self, number: int, first_row: int = 0) -> Iterator[list[Batch]]:
        """This rank's micro-batches from `first_row` of the epoch on, one list per optimizer step; every rank's lists
        have equal lengths."""
        ...


@runtime_checkable
class Telling(Protocol):
    """A source that has numbers to log with every step."""

    def facts(self) -> dict[str, float]:
        """Of the step that was trained last; every rank calls it."""
        ...


def num_steps(source: BatchSource, first_row: int = 0) -> int:
    """Steps in an epoch of `source`, from `first_row` on."""
    return -(-(source.num_rows - first_row) // source.rows_per_step)


@dataclass(frozen=True)
class StepPlan:
    """How rows become steps: `batch_size` rows per rank and micro-batch, `accumulation` micro-batches per step."""

    batch_size: int
    accumulation: int = 1
    dp_rank: int = 0
    dp_size: int = 1

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.dp_size

    def step(self, rows: Sequence[int]) -> list[Sequence[int]]:
        """This rank's share of one step's rows, one entry per micro-batch (empty where it has none)."""
        per_micro_batch = self.batch_size * self.dp_size
        micro_batches = [rows[i : i + per_micro_batch] for i in range(0, len(rows), per_micro_batch)]
        return [m[self.dp_rank * self.batch_size : (self.dp_rank + 1) * self.batch_size] for m in micro_batches]


class SampleLoader:
    """Samples of data sets, shuffled, packed where asked, and collated."""

    def __init__(
        self,
        dataset: JoinedDataset,
        collator: Collator,
        plan: StepPlan,
        *,
        shuffle: bool,
        seed: int,
    ) -> None:
        self.dataset = dataset
        self.collator = collator
        self.plan = plan
        self._shuffle = shuffle
        self._seed = seed
        self._packs: list[list[int]] | None = None
        if collator.pack_to is not None:
            lengths = dataset.lengths
            if lengths is None:
                lengths = np.array([len(dataset[i]["tokens"]) for i in range(len(dataset))])
            self._packs = pack(lengths, collator.pack_to)

    @property
    def seed(self) -> int:
        return self._seed

    def over(self, dataset: JoinedDataset) -> "SampleLoader":
        """A loader of other samples that is like this one in everything else."""
        return SampleLoader(dataset, self.collator, self.plan, shuffle=self._shuffle, seed=self._seed)

    @property
    def num_rows(self) -> int:
        return len(self.dataset if self._packs is None else self._packs)

    def row(self, number: int) -> list[int]:
        """The samples of a row."""
        return [number] if self._packs is None else self._packs[number]

    @property
    def rows_per_step(self) -> int:
        return self.plan.rows_per_step

    def order(self, epoch: int) -> np.ndarray:
        """Row numbers in the order the epoch trains them, the same on every rank."""
        if not self._shuffle:
            return np.arange(self.num_rows)
        return np.random.default_rng([self._seed, epoch]).permutation(self.num_rows)

    def epoch(self, number: int, first_row: int = 0) -> Iterator[list[Batch]]:
        order = self.order(number)[first_row:]
        for start in range(0, len(order), self.plan.rows_per_step):
            yield self.step(order[start : start + self.plan.rows_per_step].tolist())

    def step(self, rows: Sequence[int]) -> list[Batch]:
        """This rank's micro-batches of a step that trains `rows`."""
        return [self._collate(own) for own in self.plan.step(rows)]

    def fingerprint(self) -> str:
        """Of what an epoch is made of: every sample, and which share a row."""
        rows = [] if self._packs is None else ["packed", self._packs]
        return f"{len(self.dataset):,} samples, {combine([self.dataset.fingerprint(), rows])}"

    def _collate(self, rows: Sequence[int]) -> Batch:
        samples = [self.row(row) for row in rows]
        batch = self.collator([[self.dataset[i] for i in row] for row in samples])
        batch.info = partial(self._info, [i for row in samples for i in row])
        return batch

    def _info(self, samples: list[int]) -> list[SampleInfo]:
        return [self.dataset.info(i) for i in samples]
