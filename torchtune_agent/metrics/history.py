"""A run as curves: `metrics.jsonl` by name instead of by row. Imports nothing heavy.

Numbers are held in arrays, 16 bytes a point, so that a run of any length can be read.
"""

import json
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torchtune_agent.errors import UserError
from torchtune_agent.metrics.names import flat_name, metric_name


class Curve:
    """The values of one name and the steps they were logged at."""

    def __init__(self) -> None:
        self.steps = array("q")
        self.values = array("d")

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: int, value: float) -> None:
        self.steps.append(step)
        self.values.append(value)

    def forget_from(self, step: int) -> None:
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.values.pop()


class History:
    """The curves of a run by their flat names, whichever style they were logged in.

    A run that was resumed logs some steps twice; what it logged last counts.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self.curves: dict[str, Curve] = {}
        self.last_step = 0
        self.times: list[float] = []  # of the first and the last row
        for row in rows:
            self.add(row)

    @classmethod
    def read(cls, path: Path, until: int | None = None) -> "History":
        """Read a `metrics.jsonl`, also while a run is writing to it: a last line without its end is left for later.
        Rows of steps after `until` are passed over."""
        history = cls()
        try:
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if not line.endswith("\n"):
                        break
                    try:
                        row = json.loads(line)
                        if until is None or row["step"] <= until:
                            history.add(row)
                    except (ValueError, KeyError, TypeError, AttributeError) as error:
                        raise UserError(f"{path}:{number}: not a row of metrics. Take the line out.") from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}. Name the output_dir of a run.") from error
        return history

    def add(self, row: Mapping[str, Any]) -> None:
        step = int(row["step"])
        if step < self.last_step:
            for curve in self.curves.values():
                curve.forget_from(step)
        self.last_step = step
        if "time" in row:
            self.times[1:] = [row["time"]]
        for name, value in row.items():
            if name not in ("step", "time"):
                self.curves.setdefault(flat_name(name), Curve()).add(step, float(value))

    def get(self, split: str, group: str, metric: str) -> Curve | None:
        """The curve of a class, if it has a point."""
        curve = self.curves.get(metric_name(split, group, metric))
        return curve if curve else None
