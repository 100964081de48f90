"""The parts of a run over records that arrive: what a recipe plugs into the Trainer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from torchtune_agent.config import component, instantiate
from torchtune_agent.continual.adaptive import AdaptiveRatio
from torchtune_agent.continual.arrivals import FromIterable, GrowingFiles, Origin, Reader
from torchtune_agent.continual.carried import make_buffer
from torchtune_agent.continual.config import ArrivalSettings, ContinualSettings
from torchtune_agent.continual.feedback import Feedback, chooses_by_loss
from torchtune_agent.continual.live import LiveSource, Sample
from torchtune_agent.continual.mixing import Pick
from torchtune_agent.continual.sample_losses import SampleLosses
from torchtune_agent.continual.scored import Scored
from torchtune_agent.data import AgentSFTTransform, StepPlan
from torchtune_agent.errors import UserError
from torchtune_agent.losses import Objective
from torchtune_agent.training import Run
from torchtune_agent.training.sft import collator_of


class Live:
    """The source and objective of arriving records."""

    def __init__(
        self,
        run: Run,
        arrivals: ArrivalSettings,
        settings: ContinualSettings,
        tokenizer: Any,
        model: nn.Module,
        inner: Objective,
    ) -> None:
        world, seed = run.world, run.settings.seed
        assert seed is not None
        transform = instantiate(run.cfg.dataset, "dataset", tokenizer)
        if not isinstance(transform, AgentSFTTransform):
            raise UserError(
                f"dataset: {run.cfg.dataset['_component_']} is no transform of single records. Arrivals need "
                "torchtune_agent.data.AgentSFTTransform; leave dataset out to get it."
            )
        self._run, self._settings = run, settings
        self._buffer = make_buffer(settings, seed, world.rank)
        plan = StepPlan(run.settings.batch_size, run.settings.gradient_accumulation_steps, world.dp_rank, world.dp_size)
        if settings.buffer_size < plan.rows_per_step:
            raise UserError(
                f"buffer_size={settings.buffer_size}: is smaller than a step's {plan.rows_per_step} rows. Raise it to "
                "many steps."
            )
        self._ratio = AdaptiveRatio(
            settings.replay_ratio if settings.replays else 0.0,
            settings.replay_ratio if settings.highest_replay_ratio is None else settings.highest_replay_ratio,
        )
        follows = settings.replays and settings.highest_replay_ratio is not None
        losses = SampleLosses(inner, world, always=follows or (settings.replays and chooses_by_loss(self._buffer)))
        self.objective: Objective = losses
        self._feedback = Feedback(
            self._buffer,
            losses,
            replays=settings.replays,
            origin=lambda _: "replay_loss",
            ratio=self._ratio if follows else None,
        )
        self._scored = Scored(model, inner, world) if settings.strategy == "ssis" else None
        collator = collator_of(tokenizer, packed=False)
        scored = self._scored

        def importance(samples: Sequence[Sample]) -> list[float]:
            assert scored is not None
            return scored.importance([collator([[sample]]) for sample in samples])

        self.source = LiveSource(
            Reader(origin_of(arrivals), ahead=arrivals.ahead, poll_seconds=arrivals.poll_seconds),
            transform,
            collator,
            plan,
            self._buffer,
            replay_ratio=lambda: self._ratio.ratio,
            max_steps=arrivals.max_steps,
            patience_seconds=arrivals.patience_seconds,
            idle_seconds=arrivals.idle_seconds,
            seed=seed,
            work=self,
            is_asked_to_stop=lambda: world.any(run.is_asked_to_stop()),
            quarantine=run.settings.output_dir / "logs" / "quarantine_arrivals.jsonl",
            importance=None if scored is None else importance,
        )

    def step_begins(self, picks: Sequence[Pick]) -> None:
        self._feedback.step_begins(picks)

    def step_ended(self) -> None:
        self._feedback.step_ended()

    def facts(self) -> dict[str, float]:
        return self._feedback.facts()

    def state_dict(self) -> dict[str, Any]:
        return {
            "ratio": self._ratio.state_dict(),
            "scored": {} if self._scored is None else self._scored.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ratio.load_state_dict(state["ratio"])
        if self._scored is not None:
            self._scored.load_state_dict(state["scored"])


def origin_of(arrivals: ArrivalSettings) -> Origin:
    """Where the config says that records come from."""
    if arrivals.path is not None:
        path = Path(arrivals.path)
        if not path.is_dir() and not path.parent.is_dir():
            raise UserError(f"arrivals.path={path}: there is no such folder. Name a folder, or a file in one.")
        return GrowingFiles(path)
    assert arrivals.iterable is not None
    make: Callable[[], Iterable[Mapping[str, Any]]] = component(arrivals.iterable, "arrivals.iterable")
    return FromIterable(make, arrivals.iterable)
