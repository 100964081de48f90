"""Long curves made short enough for a page: mean, least and greatest of equally many neighbouring points.

A peak stays visible as the edge of the range, and a value that is not finite keeps its place.
"""

import math
from dataclasses import dataclass, field

from torchtune_agent.metrics.history import Curve

_MOST_MARKS = 100


@dataclass
class Thinned:
    """Points to draw. Where `low` and `high` are empty, every logged point is there."""

    steps: list[int]
    values: list[float | None]  # None: nothing finite, a gap
    low: list[float | None] = field(default_factory=list)
    high: list[float | None] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)  # the first values that are not finite
    num_not_finite: int = 0


def thinned(curve: Curve, limit: int) -> Thinned:
    """At most `limit` points. Curves with the same steps get the same points."""
    marks = [(s, str(v)) for s, v in zip(curve.steps, curve.values, strict=True) if not math.isfinite(v)]
    result = Thinned([], [], marks=marks[:_MOST_MARKS], num_not_finite=len(marks))
    size = math.ceil(len(curve) / limit)
    for start in range(0, len(curve), size):
        finite = [value for value in curve.values[start : start + size] if math.isfinite(value)]
        result.steps.append(curve.steps[min(start + size, len(curve)) - 1])
        result.values.append(math.fsum(finite) / len(finite) if finite else None)
        if size > 1:
            result.low.append(min(finite, default=None))
            result.high.append(max(finite, default=None))
    return result
