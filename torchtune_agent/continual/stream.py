"""A stream of phases as one run: every phase's rows in turn, and what is done where one ends.

The Trainer knows no phases. A source's generator goes on after a step has been trained, so between two phases it runs
`on_phase_end` on every rank, with the model as it is then. The last phase ends with the run's last validation, which
`FinalValidation` begins with.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from torchtune_agent.continual.replay_source import ReplaySource
from torchtune_agent.data.collate import Batch
from torchtune_agent.data.loader import BatchSource
from torchtune_agent.distributed import World
from torchtune_agent.errors import UserError
from torchtune_agent.losses import Objective
from torchtune_agent.metrics.calls import CALL_SUMS
from torchtune_agent.metrics.sums import Sums


class StreamSource:
    """Phases one after the other, in one epoch of the Trainer. A phase's last step is smaller, as an epoch's is.

    Args:
        phases: they share a buffer.
        epochs_per_phase: how often each phase's samples are trained before the next begins.
        on_start: called once before the first step.
        on_phase_end: called with the phase's number.
    """

    def __init__(
        self,
        phases: Sequence[ReplaySource],
        *,
        epochs_per_phase: int,
        on_start: Callable[[], None],
        on_phase_end: Callable[[int], None],
    ) -> None:
        self._phases, self._epochs = phases, epochs_per_phase
        self._on_start, self._on_phase_end = on_start, on_phase_end
        self._num_yielded = self._num_ended = 0

    @property
    def rows_per_step(self) -> int:
        return self._phases[0].rows_per_step

    @property
    def steps_per_epoch(self) -> int:
        return self._epochs * sum(phase.steps_per_epoch for phase in self._phases)

    @property
    def num_rows(self) -> int:
        """As if every step had all its rows."""
        return self.steps_per_epoch * self.rows_per_step

    def epoch(self, number: int, first_row: int = 0) -> Iterator[list[Batch]]:
        if number or first_row:
            raise UserError("stream: a run over phases cannot be taken up in the middle yet. Start it anew.")
        self._on_start()
        for number_of_phase, phase in enumerate(self._phases):
            for epoch in range(self._epochs):
                for step in phase.epoch(epoch):
                    self._num_yielded += 1
                    yield step
            self._end(number_of_phase)

    def end_last(self) -> None:
        """End the last phase, if all its steps were trained and it has not ended yet."""
        if self._num_yielded == self.steps_per_epoch:
            self._end(len(self._phases) - 1)

    def _end(self, phase: int) -> None:
        if phase == self._num_ended:
            self._num_ended += 1
            self._on_phase_end(phase)

    def facts(self) -> dict[str, float]:
        return self._phases[min(self._num_ended, len(self._phases) - 1)].facts()


class FinalValidation:
    """A validation source that ends the stream's last phase when its time has come."""

    def __init__(self, source: Any, stream: StreamSource) -> None:
        self._source, self._stream = source, stream

    @property
    def num_rows(self) -> int:
        return self._source.num_rows

    @property
    def rows_per_step(self) -> int:
        return self._source.rows_per_step

    @property
    def steps_per_epoch(self) -> int:
        return self._source.steps_per_epoch

    def epoch(self, number: int, first_row: int = 0) -> Iterator[list[Batch]]:
        self._stream.end_last()
        yield from self._source.epoch(number)


@torch.no_grad()
def exact_calls(model: nn.Module, objective: Objective, source: BatchSource, world: World) -> float:
    """The share of a held-out set's calls that the model would write exactly, given all before each token."""
    was_training = model.training
    model.eval()
    sums = Sums.empty(world.device)
    for micro_batches in source.epoch(0):
        for micro_batch in micro_batches:
            batch = micro_batch.to(world.device)
            output = objective(model, batch, with_statistics=True)
            sums.add(output.loss_sum, output.tokens, batch)
    model.train(was_training)
    counts = dict(zip(CALL_SUMS, sums.reduced(world).calls.tolist(), strict=True))
    if not counts["calls"]:
        raise UserError("stream: a phase's dataset_val has no tool call, so nothing tells what is forgotten of it.")
    return counts["exact_calls"] / counts["calls"]
