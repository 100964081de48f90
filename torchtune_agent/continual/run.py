"""The parts of a run over a stream of phases: what a recipe plugs into the Trainer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from omegaconf import DictConfig, ListConfig
from pydantic import BaseModel, ConfigDict
from torch import nn

from torchtune_agent.continual.buffer import ReplayBuffer
from torchtune_agent.continual.ewc import ElasticWeights
from torchtune_agent.continual.fisher import DiagonalFisher, sample_gradients
from torchtune_agent.continual.forgetting import ForgettingMatrix, table, write
from torchtune_agent.continual.replay_source import ReplaySource
from torchtune_agent.continual.ssis import ImportanceScorer, measure
from torchtune_agent.continual.stream import FinalValidation, StreamSource, exact_calls
from torchtune_agent.data import SampleLoader
from torchtune_agent.data.collate import Batch
from torchtune_agent.data.joined import JoinedDataset
from torchtune_agent.errors import UserError, did_you_mean
from torchtune_agent.losses import Objective
from torchtune_agent.training import Run
from torchtune_agent.training.settings import checked
from torchtune_agent.training.sft import SFTData

BUFFER_FILE = "replay_buffer.pt"
_RECENT = 0.99  # of the Fisher information of the stream, what is left after another sample


class ContinualSettings(BaseModel):
    """The plain keys of the config's section `continual`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    strategy: Literal["finetune", "replay", "ewc", "replay+ewc", "ssis"] = "replay"
    epochs_per_phase: int = 1
    buffer_size: int = 2048
    replay_ratio: float = 0.25
    selection_strategy: str = "reservoir"  # of `replay`; `ssis` has its own
    threshold_ratio: float = 1.0
    replay_from: Path | None = None  # a file `replay_buffer.pt` of an earlier run
    ewc_strength: float = 100.0
    ewc_decay: float = 1.0
    ewc_samples: int = 200


@dataclass(frozen=True)
class Stream:
    """What the config says of phases."""

    names: list[str]
    settings: ContinualSettings


def take_stream(cfg: DictConfig) -> Stream:
    """Take the stream out of the config, and put the phases' data where every recipe has its data."""
    settings = checked(ContinualSettings, dict(cfg.pop("continual", {})), "continual.")
    names, phases = cfg.pop("stream", None), cfg.pop("phases", {})
    if not isinstance(names, ListConfig) or len(names) < 2:
        raise UserError(f"stream={names}: must be a list of two names or more of what is under 'phases'.")
    names = [str(name) for name in names]
    if len(set(names)) != len(names):
        raise UserError(f"stream={names}: names a phase twice. Every phase is trained once, in its turn.")
    for name in names:
        if name not in phases:
            raise UserError(f"stream={names}: there is no '{name}' under 'phases'. {did_you_mean(name, phases)}")
        if set(phases[name]) != {"dataset", "dataset_val"}:
            raise UserError(f"phases.{name}: must have dataset and dataset_val; it has {', '.join(phases[name])}.")
    if cfg.get("epochs", 1) != 1 or cfg.get("max_steps_per_epoch") is not None:
        raise UserError(
            "epochs, max_steps_per_epoch: a stream is trained once. Set continual.epochs_per_phase instead."
        )
    if cfg.get("optimizer_in_bwd", False) and "ewc" in settings.strategy:
        raise UserError("optimizer_in_bwd=True: does not go with elastic weights. Set it to False.")
    cfg.dataset = [phases[name].dataset for name in names]
    cfg.dataset_val = [phases[name].dataset_val for name in names]
    return Stream(names, settings)


@dataclass
class Phases:
    """The source, validation and objective of a stream, and its forgetting as far as it is known."""

    run: Run
    stream: Stream
    data: SFTData
    model: nn.Module
    inner: Objective

    def __post_init__(self) -> None:
        settings, world, seed = self.stream.settings, self.run.world, self.run.settings.seed
        assert seed is not None and self.data.validation is not None
        elastic = ElasticWeights(self.inner, world, strength=settings.ewc_strength, decay=settings.ewc_decay)
        self.elastic = elastic if "ewc" in settings.strategy else None
        self.objective: Objective = self.elastic or self.inner
        self._fisher, self._scorer = DiagonalFisher(_RECENT), ImportanceScorer()
        self._before: list[float] | None = None
        self._scores: list[list[float]] = []
        self._buffer = self._make_buffer(seed)
        self._dataset, self._parts = _parts(self.data.train)
        self._held_out = [_loader_of(self.data.validation, part) for part in _parts(self.data.validation)[1]]
        self._phases = [self._phase(i, seed) for i in range(len(self._parts))]
        self.source = StreamSource(
            self._phases,
            epochs_per_phase=settings.epochs_per_phase,
            on_start=self._start,
            on_phase_end=self._end,
        )
        self.validation = FinalValidation(self.data.validation, self.source)

    def _make_buffer(self, seed: int) -> ReplayBuffer:
        settings = self.stream.settings
        strategy = "ssis" if settings.strategy == "ssis" else settings.selection_strategy
        buffer = ReplayBuffer(
            settings.buffer_size, strategy=strategy, seed=seed, threshold_ratio=settings.threshold_ratio
        )
        if settings.replay_from is not None:
            if not settings.replay_from.is_file():
                raise UserError(f"continual.replay_from={settings.replay_from}: no such file. Name a {BUFFER_FILE}.")
            buffer.load_state_dict(torch.load(settings.replay_from, weights_only=True))
        return buffer

    def _phase(self, number: int, seed: int) -> ReplaySource:
        settings = self.stream.settings
        loader, samples = self.data.train, self._parts[number]
        replays = settings.strategy in ("replay", "replay+ewc", "ssis")
        return ReplaySource(
            self._dataset,
            samples,
            loader._collator,
            loader._plan,
            self._buffer,
            replay_ratio=settings.replay_ratio if replays and (number or len(self._buffer)) else 0.0,
            shuffle=self.run.settings.shuffle,
            seed=seed,
            epochs=settings.epochs_per_phase,
            importance=self._importance if settings.strategy == "ssis" else None,
        )

    def _alone(self, samples: Sequence[int]) -> list[Batch]:
        """Samples by number as batches of one."""
        collator = self.data.train._collator
        return [collator([[self._dataset[i]]]) for i in samples]

    def _importance(self, samples: Sequence[int]) -> list[float]:
        """Of samples that arrive; every rank measures all of them."""
        batches = self._alone(samples)
        signals = measure(self.model, self.inner, batches, self._fisher, self.run.world)
        scores = self._scorer.score(signals)
        self._scorer.update(signals)
        for gradients in sample_gradients(self.model, self.inner, batches):
            self._fisher.add(gradients)
        return scores.importance.tolist()

    def _start(self) -> None:
        self._before = self._test()

    def _test(self) -> list[float]:
        return [exact_calls(self.model, self.inner, source, self.run.world) for source in self._held_out]

    def _end(self, number: int) -> None:
        """A phase is trained: test all, hold on to what it needs, and say what is known of forgetting."""
        self._scores.append(self._test())
        if self.elastic is not None and number + 1 < len(self._phases):
            samples, wanted = self._parts[number], self.stream.settings.ewc_samples
            rng = np.random.default_rng([self.run.settings.seed or 0, number])
            chosen = rng.choice(samples, min(wanted, len(samples)), replace=False).tolist()
            self.elastic.consolidate(self.model, self._alone(chosen))
        if number + 1 == len(self._phases):
            self._phases[number].make_portable()
        if self.run.world.is_main:
            matrix = ForgettingMatrix(self.stream.names, self._scores, self._before)
            folder = self.run.settings.output_dir / "continual"
            write(matrix, folder)
            if number + 1 == len(self._phases):
                torch.save(self._buffer.state_dict(), folder / BUFFER_FILE)
            text = table(matrix).replace("\n", "\n              ")
            self.run.say(f"calls exact   {text}")


def _parts(loader: SampleLoader) -> tuple[JoinedDataset, list[range]]:
    """A loader's data, and which samples each of its data sets has."""
    starts = loader._dataset._starts
    return loader._dataset, [range(a, b) for a, b in zip(starts, starts[1:], strict=False)]


def _loader_of(loader: SampleLoader, part: range) -> SampleLoader:
    """The same loader over some of its samples."""
    dataset = JoinedDataset({"held out": _Part(loader._dataset, part)})
    return SampleLoader(dataset, loader._collator, loader._plan, shuffle=False, seed=0)


@dataclass(frozen=True)
class _Part:
    whole: JoinedDataset
    samples: range

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.whole[self.samples[index]]

    def info(self, index: int) -> Any:
        return self.whole.info(self.samples[index])
