"""Where learning stands, in sentences that a run's numbers support, and nothing else."""

import math
from dataclasses import dataclass
from statistics import fmean, variance

from torchtune_agent.metrics.colours import CLASSES
from torchtune_agent.metrics.history import Curve, History

CALL_PARTS = ("call_syntax", "call_name", "arg_name", "arg_value")
PARTS = ("reasoning", *CALL_PARTS)  # together, every token of the overall metrics once
_LEARNED = 0.95  # accuracy
_NAMES = {"train": "training", "val": "validation"}


@dataclass(frozen=True)
class ClassState:
    """One class in the latest row that has it."""

    group: str
    nll: float
    num_tokens: float
    accuracy: float
    first_nll: float

    @property
    def loss(self) -> float:
        return self.nll * self.num_tokens

    @property
    def title(self) -> str:
        return CLASSES[self.group].title


def latest_split(history: History) -> str | None:
    """Validation where it was measured, else training; None for a run without class metrics."""
    return next((split for split in ("val", "train") if history.get(split, "overall", "nll")), None)


def class_states(history: History, split: str) -> list[ClassState]:
    """The parts that together are all measured tokens, as far as the latest row has them."""
    overall = history.get(split, "overall", "nll")
    assert overall is not None
    states = []
    for group in PARTS:
        curves = [history.get(split, group, metric) for metric in ("nll", "num_tokens", "accuracy")]
        nll, count, accuracy = curves
        if nll and count and accuracy and nll.steps[-1] == overall.steps[-1]:
            states.append(ClassState(group, nll.values[-1], count.values[-1], accuracy.values[-1], nll.values[0]))
    return states


def findings(history: History) -> list[str]:
    """A few sentences, the most important first."""
    sentences = _not_finite(history)
    split = latest_split(history)
    if split is not None:
        states = [state for state in class_states(history, split) if math.isfinite(state.nll)]
        sentences += _bottleneck(states, split) + _learned(states) + _progress(states)
    return sentences + _validation(history) + _training(history)


def _bottleneck(states: list[ClassState], split: str) -> list[str]:
    """Which part of the calls has most of their loss, and which of all tokens."""
    calls = [state for state in states if state.group in CALL_PARTS]
    total = sum(state.loss for state in calls)
    if len(calls) < 2 or not total > 0:
        return []
    most = max(calls, key=lambda state: state.loss)
    hardest = max(calls, key=lambda state: state.nll)
    tokens = most.num_tokens / sum(state.num_tokens for state in calls)
    text = (
        f"In tool calls, {most.title} {_are(most.title)} the bottleneck: {most.loss / total:.0%} of the loss in "
        f"{tokens:.0%} of the tokens ({_NAMES[split]} loss {most.nll:.2f} a token, accuracy {most.accuracy:.0%})."
    )
    if hardest is not most:
        text += f" Hardest token for token {_are(hardest.title)} {hardest.title}: {hardest.nll:.2f}."
    return [text]


def _learned(states: list[ClassState]) -> list[str]:
    learned = [f"{state.title} ({state.accuracy:.1%})" for state in states if state.accuracy >= _LEARNED]
    return [f"Right at least {_LEARNED:.0%} of the time: {_listed(learned)}."] if learned else []


def _progress(states: list[ClassState]) -> list[str]:
    """Which loss fell most since the first row, and which least."""
    changes = {state.title: 1 - state.nll / state.first_nll for state in states if state.first_nll > 0}
    if len(changes) < 2:
        return []
    most, least = max(changes, key=changes.__getitem__), min(changes, key=changes.__getitem__)
    if changes[most] <= changes[least]:
        return []
    return [
        f"Learned most since the first measurement: {most} (loss {_change(changes[most])}); "
        f"least: {least} ({_change(changes[least])})."
    ]


def _validation(history: History) -> list[str]:
    curve = history.curves.get("val_loss")
    points = _finite(curve)
    if len(points) < 2:
        return []
    (last_step, last), (best_step, best) = points[-1], min(points, key=lambda point: point[1])
    if best_step == last_step:
        return [f"Validation loss is at its lowest: {last:.3f}, from {points[0][1]:.3f} at step {points[0][0]:,}."]
    return [f"Validation loss was lowest at step {best_step:,} ({best:.3f}); it is {last:.3f} at step {last_step:,}."]


def _training(history: History) -> list[str]:
    """Whether the loss still falls: the last quarter of the run against the quarter before it."""
    values = [value for _, value in _finite(history.curves.get("loss"))]
    size = len(values) // 4
    if size < 8:
        return []
    before, after = values[-2 * size : -size], values[-size:]
    was, now = fmean(before), fmean(after)
    noise = 2 * math.sqrt((variance(before) + variance(after)) / size)  # two standard errors of the difference
    verdict = "is falling" if now < was - noise else "is rising" if now > was + noise else "has not clearly changed"
    return [f"Training loss {verdict}: {was:.3f} on average in the third quarter of the run, {now:.3f} in the last."]


def _not_finite(history: History) -> list[str]:
    """Which names have values that are no numbers, and since when."""
    first: dict[str, int] = {}
    for name, curve in history.curves.items():
        steps = (step for step, value in zip(curve.steps, curve.values, strict=True) if not math.isfinite(value))
        step = next(steps, None)
        if step is not None:
            first[name] = step
    if not first:
        return []
    name = min(first, key=first.__getitem__)
    others = len(first) - 1
    more = f" {others} more {'has' if others == 1 else 'have'} such values." if others else ""
    return [f"{name} is not finite, first at step {first[name]:,}.{more} They are gaps in the charts, marked ×."]


def _finite(curve: Curve | None) -> list[tuple[int, float]]:
    if curve is None:
        return []
    return [(s, v) for s, v in zip(curve.steps, curve.values, strict=True) if math.isfinite(v)]


def _are(title: str) -> str:
    return "are" if title.endswith("s") else "is"


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _change(share: float) -> str:
    return f"{'−' if share >= 0 else '+'}{abs(share):.0%}"
