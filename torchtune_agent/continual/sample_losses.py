"""The loss of every sample of a step, on every rank: what replay is logged by, and what some strategies choose by."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from torchtune_agent.continual.mixing import MixedBatch
from torchtune_agent.data.collate import Batch
from torchtune_agent.distributed import World
from torchtune_agent.losses import LossOutput, Objective
from torchtune_agent.metrics.table import COLUMNS, NUM_CLASSES

_NLL = COLUMNS.index("nll")


class Measured(NamedTuple):
    """Sums over a step, on the host: the tokens that were measured, and their loss."""

    of_samples: torch.Tensor  # [samples of the step, (tokens, nll)]
    of_classes: torch.Tensor  # [classes, (tokens, nll)]


@dataclass
class _Step:
    sums: torch.Tensor  # [samples of the step + classes, (tokens, nll)], of this rank
    is_measured: bool = False


class SampleLosses:
    """The objective `inner`, which notes what every sample loses where statistics are made.

    Args:
        inner: what is minimized.
        world: of the run.
        always: have statistics made in every step, also in those that the Trainer does not ask them of.
    """

    def __init__(self, inner: Objective, world: World, *, always: bool) -> None:
        self._inner, self._world, self._always = inner, world, always
        self._step: _Step | None = None
        self._taken: Measured | None = None

    def begin(self, num_samples: int) -> None:
        """A step of so many samples, over all ranks, comes next."""
        self._step = _Step(torch.zeros(num_samples + NUM_CLASSES, 2, dtype=torch.float64, device=self._world.device))
        self._taken = None

    def num_targets(self, batch: Batch) -> float:
        return self._inner.num_targets(batch)

    def __call__(self, model: nn.Module, batch: Batch, *, with_statistics: bool) -> LossOutput:
        notes = torch.is_grad_enabled() and isinstance(batch, MixedBatch) and self._step is not None
        output = self._inner(model, batch, with_statistics=with_statistics or (notes and self._always))
        if notes and output.tokens is not None:
            assert isinstance(batch, MixedBatch)
            self._add(output.tokens, batch)
        return output if with_statistics else replace(output, tokens=None)

    @torch.no_grad()
    def _add(self, tokens: torch.Tensor, batch: MixedBatch) -> None:
        assert self._step is not None and batch.places is not None
        self._step.is_measured = True
        nll = tokens[:, _NLL].double()
        values = torch.stack([torch.ones_like(nll), nll], 1)
        if len(values) == 0:
            return
        samples = batch.places[batch.sample_index.flatten()[batch.supervised].long()]
        classes = batch.token_class.flatten()[batch.supervised].long()
        self._step.sums.index_add_(0, samples, values)
        self._step.sums.index_add_(0, classes + len(self._step.sums) - NUM_CLASSES, values)

    def state_dict(self) -> dict[str, Any]:
        """Nothing, but said: so a run can go on with elastic weights, or without them, where the user says so."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def take(self) -> Measured | None:
        """Of the step that was trained last; None where it was not measured. Every rank calls it."""
        if self._step is not None:
            if self._step.is_measured:
                whole = self._world.sum(self._step.sums).cpu()
                self._taken = Measured(whole[:-NUM_CLASSES], whole[-NUM_CLASSES:])
            self._step = None
        return self._taken
