"""A stream of phases as one run: every phase's rows in turn, and what is done where one ends.

The Trainer knows no phases. A source's generator goes on after a step has been trained, so between two phases it has
the work of a phase's end done on every rank, with the model as it is then. The last phase ends with the run's last
validation, which `FinalValidation` begins with. A checkpoint that is saved between a phase's last step and its end is
one from where the end comes first.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from torchtune_agent.continual.mixing import Pick
from torchtune_agent.continual.replay_source import ReplaySource
from torchtune_agent.data.collate import Batch
from torchtune_agent.data.loader import BatchSource
from torchtune_agent.distributed import World
from torchtune_agent.errors import UserError
from torchtune_agent.losses import Objective
from torchtune_agent.metrics.calls import CALL_SUMS
from torchtune_agent.metrics.sums import Sums


class StepWork(Protocol):
    """What is done between steps. Every rank calls everything."""

    def step_begins(self, picks: Sequence[Pick]) -> None:
        """These samples are trained next, over all ranks."""
        ...

    def step_ended(self) -> None:
        """The step was trained. May be called twice for one."""
        ...

    def facts(self) -> dict[str, float]:
        """Of the step that was trained last."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Work(StepWork, Protocol):
    """And between phases."""

    def begin(self) -> None:
        """Before the first step."""
        ...

    def end_phase(self, number: int) -> None: ...


class StreamSource:
    """Phases one after the other, in one epoch of the Trainer. A phase's last step is smaller, as an epoch's is.

    Args:
        phases: they share a buffer.
        epochs_per_phase: how often each phase's samples are trained before the next begins.
        work: see there.
        content: what the phases' data are, for `fingerprint`.
    """

    def __init__(self, phases: Sequence[ReplaySource], *, epochs_per_phase: int, work: Work, content: str) -> None:
        self._phases, self._epochs, self._work, self._content = phases, epochs_per_phase, work, content
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

    def fingerprint(self) -> str:
        return self._content

    def epoch(self, number: int, first_row: int = 0) -> Iterator[list[Batch]]:
        if number or first_row != self._num_yielded * self.rows_per_step:
            raise UserError(
                f"stream: {self._num_yielded} steps of {self.rows_per_step} rows were trained, and the run is to go "
                f"on at row {first_row} of epoch {number}. Keep batch_size * gradient_accumulation_steps * ranks."
            )
        if self._num_yielded == 0:
            self._work.begin()
        steps_before = 0
        for number_of_phase, phase in enumerate(self._phases):
            for epoch in range(self._epochs):
                done = min(max(0, self._num_yielded - steps_before), phase.steps_per_epoch)
                steps_before += phase.steps_per_epoch
                if done < phase.steps_per_epoch:
                    yield from self._steps(phase, epoch, done)
            self._end(number_of_phase)

    def _steps(self, phase: ReplaySource, epoch: int, done: int) -> Iterator[list[Batch]]:
        for step in phase.epoch(epoch, done * self.rows_per_step):
            self._num_yielded += 1
            self._work.step_begins(phase.picks)
            yield step
            self._work.step_ended()

    def end_last(self) -> None:
        """End the last phase, if all its steps were trained and it has not ended yet."""
        if self._num_yielded == self.steps_per_epoch:
            self._end(len(self._phases) - 1)

    def _end(self, phase: int) -> None:
        if phase == self._num_ended:
            self._work.step_ended()
            self._work.end_phase(phase)
            self._num_ended += 1

    def facts(self) -> dict[str, float]:
        phase = min(self._num_ended, len(self._phases) - 1)
        return {"phase": float(phase + 1)} | self._work.facts()

    def state_dict(self) -> dict[str, Any]:
        """Equal on every rank, which all take part."""
        if self._num_yielded:
            self._work.step_ended()
        counts = {
            "num_yielded": self._num_yielded,
            "num_ended": self._num_ended,
            "rows_per_step": self.rows_per_step,
            "walked": [phase.walked for phase in self._phases],
        }
        return {
            "stream": json.dumps(counts),
            "buffer": self._phases[0].buffer.state_dict(),
            "work": self._work.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        counts = json.loads(state["stream"])
        if counts["rows_per_step"] != self.rows_per_step:
            raise UserError(
                f"stream: its steps had {counts['rows_per_step']} rows, and would now have {self.rows_per_step}. Keep "
                "batch_size * gradient_accumulation_steps * ranks as it was; phases end between steps."
            )
        self._num_yielded, self._num_ended = counts["num_yielded"], counts["num_ended"]
        for phase, (epoch, row) in zip(self._phases, counts["walked"], strict=True):
            phase.walked = (epoch, row)
        self._phases[0].buffer.load_state_dict(state["buffer"])
        self._work.load_state_dict(state["work"])


class FinalValidation:
    """A validation source that ends the stream's last phase when its time has come."""

    def __init__(self, source: BatchSource, stream: StreamSource) -> None:
        self._source, self._stream = source, stream

    @property
    def num_rows(self) -> int:
        return self._source.num_rows

    @property
    def rows_per_step(self) -> int:
        return self._source.rows_per_step

    def epoch(self, number: int, first_row: int = 0) -> Iterator[list[Batch]]:
        self._stream.end_last()
        yield from self._source.epoch(number, first_row)


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
