"""What a config says of a stream: its phases, and how what came before is kept from being forgotten."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, ListConfig
from pydantic import BaseModel, ConfigDict

from torchtune_agent.continual.buffer import STRATEGIES
from torchtune_agent.continual.cutting import Cut
from torchtune_agent.continual.quota import as_share
from torchtune_agent.errors import UserError, did_you_mean
from torchtune_agent.training.settings import checked

SECTIONS = ("stream", "phases", "arrivals", "continual")
_TRANSFORM = "torchtune_agent.data.AgentSFTTransform"


class ContinualSettings(BaseModel):
    """The plain keys of the config's section `continual`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    strategy: Literal["finetune", "replay", "ewc", "replay+ewc", "ssis"] = "replay"
    epochs_per_phase: int = 1
    # Replay
    buffer_size: int = 2048
    buffer_max_bytes: int | None = None
    spill_to: Path | None = None  # keep the buffer in this file, mapped; every rank adds its number to the name
    replay_ratio: float = 0.25
    highest_replay_ratio: float | None = None  # of arrivals: the ratio follows forgetting and drift up to this
    selection_strategy: str = "reservoir"  # of `replay`; `ssis` has its own
    threshold_ratio: float = 1.0  # of `ssis`
    replay_from: Path | None = None  # an earlier run's output_dir, its last checkpoint, or its replay_buffer.pt
    # Elastic weights
    ewc_strength: float = 100.0
    ewc_decay: float = 1.0
    ewc_samples: int = 200

    @property
    def replays(self) -> bool:
        return self.strategy in ("replay", "replay+ewc", "ssis")

    @property
    def holds_weights(self) -> bool:
        return "ewc" in self.strategy

    @property
    def buffer_strategy(self) -> str:
        return "ssis" if self.strategy == "ssis" else self.selection_strategy

    def check(self) -> None:
        """Refuse what cannot be, whether the strategy reads it or not."""
        as_share(self.replay_ratio)
        if self.selection_strategy not in STRATEGIES:
            raise UserError(
                f"continual.selection_strategy={self.selection_strategy}: no such strategy. "
                f"{did_you_mean(self.selection_strategy, STRATEGIES)}"
            )
        if self.selection_strategy == "ssis":
            raise UserError("continual.selection_strategy=ssis: set continual.strategy=ssis, which scores samples.")
        for key in ("epochs_per_phase", "buffer_size", "ewc_samples"):
            if getattr(self, key) < 1:
                raise UserError(f"continual.{key}={getattr(self, key)}: must be at least 1.")


class ArrivalSettings(BaseModel):
    """The plain keys of the config's section `arrivals`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_steps: int  # the run's length, which the schedule needs to know
    path: Path | None = None  # a JSON Lines file, or a folder of them, that grows
    iterable: str | None = None  # the dotted path of a function that returns an iterable of records
    patience_seconds: float = 10.0
    idle_seconds: float = 300.0
    poll_seconds: float = 1.0
    ahead: int = 256

    def check(self) -> None:
        if (self.path is None) == (self.iterable is None):
            raise UserError("arrivals: name where records come from: arrivals.path or arrivals.iterable, one of them.")
        for key in ("max_steps", "ahead"):
            if getattr(self, key) < 1:
                raise UserError(f"arrivals.{key}={getattr(self, key)}: must be at least 1.")
        for key in ("patience_seconds", "idle_seconds", "poll_seconds"):
            if not getattr(self, key) > 0:
                raise UserError(f"arrivals.{key}={getattr(self, key)}: must be above 0.")


def take_arrivals(cfg: DictConfig) -> tuple[ArrivalSettings, ContinualSettings]:
    """Read what a config says of records that arrive. Its `dataset` says how one becomes samples."""
    for key in ("stream", "phases"):
        if cfg.get(key):
            raise UserError(f"{key}: a run has phases or arrivals. Take one of them away, for example ~{key}.")
    section = cfg.arrivals
    if not isinstance(section, DictConfig) or section.get("max_steps") is None:
        raise UserError("arrivals.max_steps: not given. A stream has no epoch, so say how long the run is at most.")
    if cfg.get("dataset") is None:
        cfg.dataset = {"_component_": _TRANSFORM}
    arrivals = checked(ArrivalSettings, {str(key): value for key, value in section.items()}, "arrivals.")
    arrivals.check()
    settings = checked(ContinualSettings, dict(cfg.get("continual", {})), "continual.")
    settings.check()
    if settings.holds_weights:
        raise UserError(
            f"continual.strategy={settings.strategy}: elastic weights are made where a phase ends, and arrivals have "
            "no phases. Set it to replay, ssis or finetune."
        )
    if cfg.get("epochs", 1) != 1 or cfg.get("max_steps_per_epoch") is not None:
        raise UserError("epochs, max_steps_per_epoch: arrivals have no epochs. Set arrivals.max_steps instead.")
    return arrivals, settings


@dataclass(frozen=True)
class Stream:
    """What the config says of phases."""

    names: list[str]
    settings: ContinualSettings
    cut: Cut | None = None  # of one data set; otherwise every phase has its own


def take_stream(cfg: DictConfig) -> Stream:
    """Read the stream of a config, and put the phases' data where every recipe has its data."""
    settings = checked(ContinualSettings, dict(cfg.get("continual", {})), "continual.")
    settings.check()
    _check_training(cfg, settings)
    if isinstance(cfg.get("stream"), DictConfig):
        return _take_cut(cfg, settings)
    least = 1 if settings.replay_from is not None else 2
    names, phases = cfg.get("stream"), cfg.get("phases", {})
    if not isinstance(names, ListConfig) or len(names) < least:
        raise UserError(
            f"stream={names}: must be a list of two names or more of what is under 'phases'; one is enough where "
            "continual.replay_from names an earlier run."
        )
    names = [str(name) for name in names]
    if len(set(names)) != len(names):
        raise UserError(f"stream={names}: names a phase twice. Every phase is trained once, in its turn.")
    for name in names:
        _check_phase(name, names, phases)
    if cfg.get("epochs", 1) != 1 or cfg.get("max_steps_per_epoch") is not None:
        raise UserError(
            "epochs, max_steps_per_epoch: a stream is trained once. Set continual.epochs_per_phase instead."
        )
    cfg.dataset = [phases[name].dataset for name in names]
    cfg.dataset_val = [phases[name].dataset_val for name in names]
    return Stream(names, settings)


def _take_cut(cfg: DictConfig, settings: ContinualSettings) -> Stream:
    """One data set, cut into phases."""
    section = {str(key): value for key, value in cfg.stream.items()}
    if section.get("num_phases") is None or section.get("cut_by") is None:
        raise UserError("stream: must be a list of phases, or have cut_by (time or tool) and num_phases.")
    cut = checked(Cut, section, "stream.")
    if cut.num_phases < 2:
        raise UserError(f"stream.num_phases={cut.num_phases}: must be at least 2.")
    if cfg.get("phases"):
        raise UserError("phases: not read where stream cuts one dataset. Take it away: ~phases.")
    for key in ("dataset", "dataset_val"):
        if cfg.get(key) is None:
            raise UserError(f"{key}: not given. stream.cut_by cuts dataset and dataset_val into phases.")
    return Stream(cut.names, settings, cut)


def _check_training(cfg: DictConfig, settings: ContinualSettings) -> None:
    """Refuse what does not go with phases."""
    if settings.highest_replay_ratio is not None:
        raise UserError(
            "continual.highest_replay_ratio: only arrivals have a ratio that follows what is measured; phases keep "
            "theirs exactly, as the schedule needs their length. Take it away: ~continual.highest_replay_ratio."
        )
    if cfg.get("optimizer_in_bwd", False) and settings.holds_weights:
        raise UserError("optimizer_in_bwd=True: does not go with elastic weights. Set it to False.")


def _check_phase(name: str, names: list[str], phases: Any) -> None:
    if name not in phases:
        raise UserError(f"stream={names}: there is no '{name}' under 'phases'. {did_you_mean(name, phases)}")
    if set(phases[name]) != {"dataset", "dataset_val"}:
        raise UserError(f"phases.{name}: must have dataset and dataset_val; it has {', '.join(phases[name])}.")
