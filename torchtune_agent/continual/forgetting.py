"""What a run forgot and what helped it: the matrix of phases trained against phases tested, and what is read off it.

`scores[i][j]` is the score on phase j's held-out set after phase i was trained, better when larger; `before[j]` is that
of the model before the first phase. Definitions follow Lopez-Paz and Ranzato (2017) and Chaudhry et al. (2018).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchtune_agent.errors import UserError


@dataclass(frozen=True)
class ForgettingMatrix:
    """Of the phases that were trained so far, each tested on all phases."""

    phases: list[str]
    scores: list[list[float]]  # [phases trained, phases]
    before: list[float] | None = None  # [phases]

    def __post_init__(self) -> None:
        width = len(self.phases)
        rows = [*self.scores, *([] if self.before is None else [self.before])]
        if not 1 <= len(self.scores) <= width or any(len(row) != width for row in rows):
            raise UserError(
                f"forgetting: {width} phases need from 1 to {width} rows of {width} scores each; "
                f"there are rows of {[len(row) for row in self.scores]}."
            )

    @property
    def num_trained(self) -> int:
        return len(self.scores)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"summary": summary(self)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "ForgettingMatrix":
        return cls(content["phases"], content["scores"], content["before"])


def average_score(matrix: ForgettingMatrix) -> float:
    """Over the trained phases, after the last of them."""
    return _mean(matrix.scores[-1][: matrix.num_trained])


def backward_transfer(matrix: ForgettingMatrix) -> float | None:
    """By how much phases before the last changed since each was trained; below 0 is forgetting. None for one phase."""
    last = matrix.scores[-1]
    return _mean_or_none([last[j] - matrix.scores[j][j] for j in range(matrix.num_trained - 1)])


def forward_transfer(matrix: ForgettingMatrix) -> float | None:
    """By how much phases were better before they were trained than before all training. None without `before`."""
    if matrix.before is None:
        return None
    return _mean_or_none([matrix.scores[j - 1][j] - matrix.before[j] for j in range(1, matrix.num_trained)])


def forgetting(matrix: ForgettingMatrix) -> float | None:
    """By how much the phases before the last are worse than they were at their best. None for one phase."""
    earlier, last = matrix.scores[:-1], matrix.scores[-1]
    return _mean_or_none([max(row[j] for row in earlier) - last[j] for j in range(matrix.num_trained - 1)])


def summary(matrix: ForgettingMatrix) -> dict[str, float | None]:
    return {
        "average_score": average_score(matrix),
        "backward_transfer": backward_transfer(matrix),
        "forward_transfer": forward_transfer(matrix),
        "forgetting": forgetting(matrix),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_or_none(values: Sequence[float]) -> float | None:
    return _mean(values) if values else None


def table(matrix: ForgettingMatrix) -> str:
    """For the terminal: a row for every phase trained, a column for every phase tested."""
    first = ["trained up to", *(["(nothing)"] if matrix.before else []), *matrix.phases[: matrix.num_trained]]
    rows = [matrix.phases, *([_shown(matrix.before)] if matrix.before else []), *map(_shown, matrix.scores)]
    widths = [max(len(row[j]) for row in rows) for j in range(len(matrix.phases))]
    left = max(map(len, first))
    lines = [
        "  ".join([name.ljust(left), *(cell.rjust(width) for cell, width in zip(row, widths, strict=True))])
        for name, row in zip(first, rows, strict=True)
    ]
    facts = {name.replace("_", " "): value for name, value in summary(matrix).items() if value is not None}
    signed = [f"{name:<18}{value:{'' if name == 'average score' else '+'}.3f}" for name, value in facts.items()]
    return "\n".join([*lines, "", *signed])


def as_table(matrix: ForgettingMatrix) -> list[list[str]]:
    """Head and rows as texts, and what is read off them."""
    rows = [["(nothing)", *_shown(matrix.before)]] if matrix.before else []
    rows += [[name, *_shown(row)] for name, row in zip(matrix.phases, matrix.scores, strict=False)]
    blank = [""] * (len(matrix.phases) - 1)
    facts = [[name.replace("_", " "), f"{x:.3f}", *blank] for name, x in summary(matrix).items() if x is not None]
    return [["trained up to", *matrix.phases], *rows, *facts]


def _shown(row: Sequence[float]) -> list[str]:
    return [f"{value:.3f}" for value in row]


def write(matrix: ForgettingMatrix, folder: Path) -> None:
    """`forgetting.json`, `.txt` and `.png` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "forgetting.json").write_text(json.dumps(matrix.to_json(), indent=1), encoding="utf-8")
    (folder / "forgetting.txt").write_text(table(matrix) + "\n", encoding="utf-8")
    plot(matrix, folder / "forgetting.png")


def plot(matrix: ForgettingMatrix, path: Path) -> None:
    """The matrix as a picture, and how the score on every phase went as others were trained."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_trained, num_phases = matrix.num_trained, len(matrix.phases)
    figure = Figure(figsize=(5.5 + 0.8 * num_phases, 2.6 + 0.6 * num_phases), layout="constrained")
    FigureCanvasAgg(figure)
    grid, lines = figure.subplots(1, 2)
    highest = max(max(row) for row in matrix.scores)
    image = grid.imshow(matrix.scores, cmap="Blues", vmin=min(0.0, min(map(min, matrix.scores))), vmax=highest or 1.0)
    for i, row in enumerate(matrix.scores):
        for j, value in enumerate(row):
            dark = value > 0.6 * highest
            grid.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black")
    grid.set_xticks(range(num_phases), matrix.phases, rotation=30, ha="right")
    grid.set_yticks(range(num_trained), matrix.phases[:num_trained])
    grid.set_xlabel("tested on")
    grid.set_ylabel("trained up to")
    figure.colorbar(image, ax=grid, shrink=0.8)
    start = [] if matrix.before is None else [matrix.before]
    curves = [*start, *matrix.scores]
    for j, name in enumerate(matrix.phases):
        lines.plot(range(len(curves)), [row[j] for row in curves], marker="o", label=name)
    names = [*(["(nothing)"] if start else []), *matrix.phases[:num_trained]]
    lines.set_xticks(range(len(curves)), names, rotation=30, ha="right")
    lines.set_xlabel("trained up to")
    lines.set_ylabel("score on the held-out set")
    lines.set_ylim(bottom=min(0.0, min(map(min, curves))))
    lines.grid(alpha=0.3)
    lines.spines[["top", "right"]].set_visible(False)
    lines.legend(title="tested on", frameon=False)
    figure.savefig(path, dpi=130)
