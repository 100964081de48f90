"""What the steps of a run with replay tell: the buffer, what to draw next; the logs, what replay does."""

from collections.abc import Callable, Sequence

import numpy as np

from torchtune_agent.continual.adaptive import AdaptiveRatio
from torchtune_agent.continual.buffer import ReplayBuffer
from torchtune_agent.continual.mixing import Pick
from torchtune_agent.continual.sample_losses import Measured, SampleLosses

_NEWEST_LOSS = 0.1  # of the losses of classes that `class_loss` draws by: the last step's part


def chooses_by_loss(buffer: ReplayBuffer) -> bool:
    """Whether the buffer wants the losses of every step."""
    return buffer.strategy in ("prioritized", "class_loss")


class Feedback:
    """Between two steps, on every rank.

    Args:
        buffer: what is replayed from.
        losses: of the run's objective.
        replays: whether the run replays at all.
        origin: what the loss of a replayed sample is logged as, beside `replay_loss`.
        ratio: is to follow the losses.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        losses: SampleLosses,
        *,
        replays: bool,
        origin: Callable[[Pick], str],
        ratio: AdaptiveRatio | None = None,
    ) -> None:
        self._buffer, self._losses, self._replays, self._origin = buffer, losses, replays, origin
        self._ratio = ratio
        self._picks: Sequence[Pick] = ()
        self._is_owed = False  # of the step that was trained last

    def step_begins(self, picks: Sequence[Pick]) -> None:
        self._picks, self._is_owed = picks, True
        self._losses.begin(len(picks))

    def step_ended(self) -> None:
        """Replay is to draw by the losses that were just measured. Once for a step, however often it is called."""
        measured, is_owed = self._losses.take(), self._is_owed
        self._is_owed = False
        if measured is None or not is_owed or not self._replays:
            return
        if self._ratio is not None:
            found = self._losses_of(measured)
            self._ratio.measured(new_loss=found.get("new_loss"), replay_loss=found.get("replay_loss"))
        if self._buffer.strategy == "prioritized":
            self._set_importance(measured)
        elif self._buffer.strategy == "class_loss":
            tokens, nll = measured.of_classes.T.numpy()
            known = self._buffer.class_losses
            newest = np.where(tokens > 0, nll / np.maximum(tokens, 1), known)
            mixed = known + _NEWEST_LOSS * (newest - known)
            self._buffer.set_class_losses(np.where(np.isfinite(mixed), mixed, known))

    def _set_importance(self, measured: Measured) -> None:
        tokens, nll = measured.of_samples.T.numpy()
        losses = nll / np.maximum(tokens, 1)
        slots, numbers = (np.array([getattr(pick, name) for pick in self._picks]) for name in ("slot", "number"))
        usable = (slots >= 0) & (tokens > 0) & np.isfinite(losses)
        self._buffer.set_importance(slots[usable], losses[usable], numbers[usable])

    def facts(self) -> dict[str, float]:
        """What to log of the step that was trained last; losses where it was measured."""
        if not self._replays:
            return {}
        ages = [pick.age for pick in self._picks if pick.age is not None]
        found = {
            "replay_num_samples": float(len(ages)),
            "replay_fraction": len(ages) / max(1, len(self._picks)),
            "replay_age": sum(ages) / max(1, len(ages)),
            "replay_buffer_samples": float(len(self._buffer)),
            "replay_buffer_bytes": float(self._buffer.num_bytes),
        }
        if self._ratio is not None:
            found |= {"replay_ratio": float(self._ratio.ratio), "forgetting": self._ratio.forgetting}
            found["drift"] = self._ratio.drift
        measured = self._losses.take()
        return found if measured is None else found | self._losses_of(measured)

    def _losses_of(self, measured: Measured) -> dict[str, float]:
        """Of new samples, of replayed ones, and of these by origin."""
        names = ["new_loss" if pick.age is None else self._origin(pick) for pick in self._picks]
        groups = {name: [one == name for one in names] for name in sorted(set(names))}
        groups["replay_loss"] = [pick.age is not None for pick in self._picks]
        found = {}
        for name, chosen in groups.items():
            tokens, nll = measured.of_samples[chosen].sum(0).tolist()
            found |= {name: nll / tokens} if tokens else {}
        return found
