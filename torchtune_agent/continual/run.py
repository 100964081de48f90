"""The parts of a run over a stream of phases: what a recipe plugs into the Trainer."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from torchtune_agent.continual.carried import FOLDER, make_buffer, write_buffer
from torchtune_agent.continual.config import Stream
from torchtune_agent.continual.ewc import ElasticWeights
from torchtune_agent.continual.feedback import Feedback, chooses_by_loss
from torchtune_agent.continual.forgetting import ForgettingMatrix, as_table, table, write
from torchtune_agent.continual.mixing import Pick
from torchtune_agent.continual.replay_source import ReplaySource
from torchtune_agent.continual.sample_losses import SampleLosses
from torchtune_agent.continual.scored import Scored
from torchtune_agent.continual.stream import FinalValidation, StreamSource, exact_calls
from torchtune_agent.data import SampleLoader
from torchtune_agent.data.collate import Batch
from torchtune_agent.data.joined import JoinedDataset
from torchtune_agent.errors import UserError
from torchtune_agent.losses import Objective
from torchtune_agent.metrics.breakdown import write_table
from torchtune_agent.metrics.names import flat_name
from torchtune_agent.training import Run
from torchtune_agent.training.sft import SFTData


class Phases:
    """The source, validation and objective of a stream, and its forgetting as far as it is known."""

    def __init__(self, run: Run, stream: Stream, data: SFTData, model: nn.Module, inner: Objective) -> None:
        assert data.validation is not None and run.settings.seed is not None
        self._run, self._stream, self._model = run, stream, model
        self._train, seed, settings = data.train, run.settings.seed, stream.settings
        self._buffer = make_buffer(settings, seed, run.world.rank)
        self._losses = SampleLosses(inner, run.world, always=settings.replays and chooses_by_loss(self._buffer))
        self._feedback = Feedback(self._buffer, self._losses, replays=settings.replays, origin=self._origin)
        elastic = ElasticWeights(self._losses, run.world, strength=settings.ewc_strength, decay=settings.ewc_decay)
        self._elastic = elastic if settings.holds_weights else None
        self.objective: Objective = self._elastic or self._losses
        self._scored = Scored(model, inner, run.world) if settings.strategy == "ssis" else None
        self._before: list[float] | None = None
        self._scores: list[list[float]] = []
        self._dataset, held_out = data.train.dataset, data.validation.dataset
        if stream.cut is None:
            self._parts, tests = [list(part) for part in self._dataset.parts], held_out.parts
        else:
            self._parts, tests = stream.cut.parts(self._dataset, held_out, run.say)
        check_disjoint(self._dataset, dict(zip(stream.names, self._parts, strict=True)))
        self._phase_of = {sample: number for number, part in enumerate(self._parts) for sample in part}
        self._held_out = [_loader_of(data.validation, part) for part in tests]
        self._phases = [self._phase(i, seed) for i in range(len(self._parts))]
        self.source = StreamSource(
            self._phases, epochs_per_phase=settings.epochs_per_phase, work=self, content=data.train.fingerprint()
        )
        self.validation = FinalValidation(data.validation, self.source)

    def _phase(self, number: int, seed: int) -> ReplaySource:
        settings, scored = self._stream.settings, self._scored
        has_replay = settings.replays and (number > 0 or len(self._buffer) > 0)
        return ReplaySource(
            self._dataset,
            self._parts[number],
            self._train.collator,
            self._train.plan,
            self._buffer,
            replay_ratio=settings.replay_ratio if has_replay else 0.0,
            shuffle=self._run.settings.shuffle,
            seed=seed,
            epochs=settings.epochs_per_phase,
            importance=None if scored is None else lambda samples: scored.importance(self._alone(samples)),
        )

    def _alone(self, samples: Sequence[int]) -> list[Batch]:
        """Samples by number as batches of one."""
        return [self._train.collator([[self._dataset[i]]]) for i in samples]

    # What the stream has done between steps

    def begin(self) -> None:
        self._before = self._test()

    def _test(self) -> list[float]:
        inner = self._losses
        return [exact_calls(self._model, inner, source, self._run.world) for source in self._held_out]

    def step_begins(self, picks: Sequence[Pick]) -> None:
        self._feedback.step_begins(picks)

    def step_ended(self) -> None:
        self._feedback.step_ended()

    def end_phase(self, number: int) -> None:
        """A phase is trained: test all, hold on to what it needs, and say what is known of forgetting."""
        self._scores.append(self._test())
        is_last = number + 1 == len(self._phases)
        if self._elastic is not None and not is_last:
            samples, wanted = self._parts[number], self._stream.settings.ewc_samples
            rng = np.random.default_rng([self._run.settings.seed or 0, number])
            chosen = rng.choice(samples, min(wanted, len(samples)), replace=False).tolist()
            self._elastic.consolidate(self._model, self._alone(chosen))
        if is_last:
            self._phases[number].make_portable()
        if self._run.world.is_main:
            self._tell(is_last)

    def _tell(self, is_last: bool) -> None:
        matrix = ForgettingMatrix(self._stream.names, self._scores, self._before)
        folder = self._run.settings.output_dir
        write(matrix, folder / FOLDER)
        write_table(folder / "logs", "forgetting", "Calls written exactly, phase by phase", as_table(matrix))
        if is_last:
            write_buffer(self._buffer, folder)
        text = table(matrix).replace("\n", "\n              ")
        self._run.say(f"calls exact   {text}")

    def facts(self) -> dict[str, float]:
        return self._feedback.facts()

    def _origin(self, pick: Pick) -> str:
        """What the loss of a replayed sample is logged as."""
        if not isinstance(pick.sample, int):
            return "replay_loss_earlier_runs"
        return f"replay_loss_{flat_name(self._stream.names[self._phase_of[pick.sample]])}"

    def state_dict(self) -> dict[str, Any]:
        scored = {} if self._scored is None else self._scored.state_dict()
        return {"before": self._before, "scores": self._scores, "scored": scored}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._before, self._scores = state["before"], [list(row) for row in state["scores"]]
        if self._scored is not None:
            self._scored.load_state_dict(state["scored"])


def check_disjoint(dataset: JoinedDataset, phases: Mapping[str, Sequence[int]]) -> None:
    """Refuse phases that share samples: what one forgets of another could not be told."""
    owners: dict[bytes, tuple[str, int]] = {}
    for name, samples in phases.items():
        for i in samples:
            tokens = np.asarray(dataset[i]["tokens"], np.int32)
            key = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
            owner, first = owners.setdefault(key, (name, i))
            if owner != name:
                raise UserError(
                    f"stream: phases '{owner}' and '{name}' share samples: {dataset.info(first).where} and "
                    f"{dataset.info(i).where} are the same. Take them out of one of the two."
                )


def _loader_of(loader: SampleLoader, part: Sequence[int]) -> SampleLoader:
    """The same loader over some of its samples."""
    dataset = JoinedDataset({"held out": _Part(loader.dataset, part)})
    return SampleLoader(dataset, loader.collator, loader.plan, shuffle=False, seed=0)


@dataclass(frozen=True)
class _Part:
    whole: JoinedDataset
    samples: Sequence[int]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.whole[self.samples[index]]

    def info(self, index: int) -> Any:
        return self.whole.info(self.samples[index])
