"""Names of metrics: written as the spec says, and read back from rows. Imports nothing heavy."""

from typing import Literal, NamedTuple

from torchtune_agent.metrics.colours import CLASSES

NameStyle = Literal["flat", "slash"]
SPLITS = ("train", "val")
_GROUPS = sorted((name for name in CLASSES if name != "overall"), key=len, reverse=True)  # the longest match wins


class ClassMetric(NamedTuple):
    split: str
    group: str
    metric: str


def metric_name(split: str, group: str, metric: str, style: NameStyle = "flat") -> str:
    """The name of a metric: `train_entropy`, `val_tool_call_entropy`, or `val/tool_call/entropy`."""
    parts = [split, metric] if group == "overall" else [split, group, metric]
    return ("_" if style == "flat" else "/").join(parts)


def flat_name(name: str) -> str:
    """A name of either style in the flat one."""
    return name.replace("/", "_")


def read_name(name: str) -> ClassMetric | None:
    """The parts of a flat name that `metric_name` made; None for others, such as `lr`."""
    split, _, rest = name.partition("_")
    if split not in SPLITS or not rest:
        return None
    for group in _GROUPS:
        if rest.startswith(f"{group}_"):
            return ClassMetric(split, group, rest.removeprefix(f"{group}_"))
    return ClassMetric(split, "overall", rest)
