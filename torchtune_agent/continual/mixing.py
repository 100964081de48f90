"""Batches of new and replayed samples, whatever brings the new ones."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from torchtune_agent.data.collate import Batch, Collator
from torchtune_agent.data.joined import SampleInfo
from torchtune_agent.data.loader import StepPlan

INFO = "info"


@dataclass
class MixedBatch(Batch):
    """A Batch that knows which of its samples are replayed, and where all of them are in the step."""

    replayed: torch.Tensor | None = None  # bool [num_samples]
    places: torch.Tensor | None = None  # int64 [num_samples], among the samples of all ranks' micro-batches


@dataclass(frozen=True)
class Pick:
    """A sample of a row."""

    sample: int | Mapping[str, Any]  # a number in the data set, or one that an earlier run left in the buffer
    weight: float = 1.0
    age: int | None = None  # None: it is new
    slot: int = -1  # where it is in the buffer
    number: int = -1  # in the stream of all that was offered to the buffer


@dataclass(frozen=True)
class Mixer:
    """Makes this rank's micro-batches of a step's rows.

    `resolve` and `info` give a sample's content and what it is called, from what stands for it in a Pick.
    """

    collator: Collator
    plan: StepPlan
    resolve: Callable[[Any], Mapping[str, Any]]
    info: Callable[[Any], SampleInfo]

    def step(self, rows: Sequence[Sequence[Pick]]) -> list[Batch]:
        firsts = [0, *accumulate(len(row) for row in rows)]
        return [
            self._collate([rows[i] for i in share], [firsts[i] for i in share])
            for share in self.plan.step(range(len(rows)))
        ]

    def _collate(self, rows: Sequence[Sequence[Pick]], firsts: Sequence[int]) -> MixedBatch:
        """`firsts`: of every row, where its first sample is in the step."""
        batch = self.collator([[self._weighted(pick) for pick in row] for row in rows])
        picks = [pick for row in rows for pick in row]
        info = partial(_map, self.info, [pick.sample for pick in picks])
        replayed = torch.tensor([pick.age is not None for pick in picks], dtype=torch.bool)
        places = [first + i for first, row in zip(firsts, rows, strict=True) for i in range(len(row))]
        return MixedBatch(**vars(replace(batch, info=info)), replayed=replayed, places=torch.tensor(places).long())

    def _weighted(self, pick: Pick) -> Mapping[str, Any]:
        sample = self.resolve(pick.sample)
        if pick.weight == 1.0:
            return sample
        weights = np.asarray(sample.get("weights", np.ones(len(sample["tokens"]), np.float32)))
        return {**sample, "weights": weights * np.float32(pick.weight)}


def kept_info(info: SampleInfo) -> list[Any]:
    """What a buffer keeps under INFO."""
    return [info.where, info.source, list(info.tools)]


def info_of(sample: Mapping[str, Any]) -> SampleInfo:
    """Of a sample that a buffer kept."""
    where, source, tools = sample[INFO]
    return SampleInfo(where, source, tuple(tools))


def _map(function: Callable[[Any], SampleInfo], items: Sequence[Any]) -> list[SampleInfo]:
    return [function(item) for item in items]
