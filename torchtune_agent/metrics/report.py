"""The page of a run: `report.html`, one file with everything in it, made from `metrics.jsonl` and `config.yaml`.

python -m torchtune_agent report OUTPUT_DIR

Every run ends with it; the command makes it again, also while the run goes on. Nothing heavy is imported.
"""

import argparse
import json
import math
from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from torchtune_agent.errors import UserError
from torchtune_agent.metrics import breakdown
from torchtune_agent.metrics.charts import CLASS_METRICS, Chart, class_charts, run_charts
from torchtune_agent.metrics.colours import CLASSES, css_variables
from torchtune_agent.metrics.findings import class_states, findings, latest_split
from torchtune_agent.metrics.history import History
from torchtune_agent.metrics.thinning import Thinned, thinned

MAX_BYTES = 1_900_000
_MOST_POINTS = 2_000  # a curve; more than a screen has columns
_SPLITS = {"val": "Validation", "train": "Training"}


def write_report(logs: Path, history: History) -> Path:
    """Write `report.html` into a run's folder of logs."""
    config = logs / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.exists() else ""
    page = render(history, logs.resolve().parent.name, text, _breakdowns(logs))
    path = logs / "report.html"
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)  # someone may be looking at the one before
    return path


def _breakdowns(logs: Path) -> list[dict[str, Any]]:
    """The newest tables per tool and per data source, where the run has them, and those of its recipe."""
    tables = [
        {"title": title, "head": head, "rows": [{"cells": line} for line in lines]}
        for title, (head, *lines) in breakdown.read_tables(logs)
    ]
    for by in breakdown.KINDS:
        if (found := breakdown.latest(logs, by)) is not None:
            split, step, rows = found
            head, *lines = breakdown.as_lines(by, rows)
            table = {
                "title": breakdown.title(by, split, step),
                "head": head,
                "rows": [{"cells": line} for line in lines],
            }
            tables.append(table)
    return tables


def render(history: History, title: str, config: str = "", tables: Sequence[dict[str, Any]] = ()) -> str:
    """The page as text, less than 2 MB of it however long the run was. `tables` stand behind those of the classes."""
    limit = _MOST_POINTS
    while True:
        page = _page(history, title, config, tables, limit)
        if len(page.encode()) <= MAX_BYTES or limit == 1:
            return page
        limit = max(1, limit * 2 // 3)


def _page(history: History, title: str, config: str, tables: Sequence[dict[str, Any]], limit: int) -> str:
    drawn = _Drawn(history, limit)
    classes, run = class_charts(history.curves), run_charts(history.curves)
    data = {
        "title": title,
        "made": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "facts": _facts(history),
        "findings": findings(history),
        "shares": _shares(history),
        "classes": [{"id": group, "title": look.title} for group, look in CLASSES.items()],
        "charts": [
            *(drawn.chart(chart, "classes") for chart in classes),
            *(drawn.chart(chart, "run") for chart in run),
        ],
        "steps": drawn.steps,
        "thinned": drawn.longest if drawn.longest > limit else 0,
        "points": limit,
        "tables": [*_tables(history), *tables],
        "config": config,
    }
    # No text of the run can end the element it stands in or be read as markup.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    template, style, script = (_part(name) for name in ("report.html", "report.css", "report.js"))
    for mark, part in (("/*STYLE*/", css_variables() + style), ("/*SCRIPT*/", script), ("/*DATA*/", text)):
        template = template.replace(mark, part, 1)
    return template


def _part(name: str) -> str:
    return (files("torchtune_agent.metrics") / name).read_text(encoding="utf-8")


class _Drawn:
    """Curves as the page holds them: short numbers, and the steps of curves that share them only once."""

    def __init__(self, history: History, limit: int) -> None:
        self.steps: list[list[int]] = []
        self.longest = 0
        self._history, self._limit = history, limit
        self._known: dict[tuple[int, ...], int] = {}

    def chart(self, chart: Chart, section: str) -> dict[str, Any]:
        kind = chart.kind
        return {
            "metric": chart.metric,
            "section": section,
            "title": kind.title,
            "unit": kind.unit,
            "log": kind.log,
            "zero": kind.from_zero,
            "curves": [
                self._curve(name, split, group)
                for (split, group), name in chart.names.items()
                if self._history.curves[name]
            ],
        }

    def _curve(self, name: str, split: str, group: str) -> dict[str, Any]:
        curve = self._history.curves[name]
        self.longest = max(self.longest, len(curve))
        points = thinned(curve, self._limit)
        result = {
            "name": name,
            "split": split,
            "class": group,
            "steps": self._shared(points),
            "y": _short(points.values, 5),
        }
        if points.low:
            result |= {"low": _short(points.low, 4), "high": _short(points.high, 4)}
        if points.marks:
            result |= {"marks": points.marks, "bad": points.num_not_finite}
        return result

    def _shared(self, points: Thinned) -> int:
        key = tuple(points.steps)
        if key not in self._known:
            self._known[key] = len(self.steps)
            self.steps.append([now - before for before, now in zip((0, *key), key, strict=False)])
        return self._known[key]


def _short(values: list[float | None], digits: int) -> list[float | int | None]:
    short = [None if value is None else float(f"{value:.{digits}g}") for value in values]
    return [int(v) if v is not None and v.is_integer() and abs(v) < 1e15 else v for v in short]


def _facts(history: History) -> list[tuple[str, str, str]]:
    """The numbers at the top: name, value, and a word on it."""
    facts = [("Step", f"{history.last_step:,}", "")]
    if len(history.times) == 2:
        facts.append(("Time", _duration(history.times[1] - history.times[0]), "first to last row"))
    for title, name, spec in (
        ("Validation loss", "val_loss", ".3f"),
        ("Training loss", "loss", ".3f"),
        ("Tool-call accuracy", "val_tool_call_accuracy", ".1%"),
        ("Tokens/s", "tokens_per_second_per_gpu", ",.0f"),
    ):
        curve = history.curves.get(name)
        if curve:
            last = curve.values[-1]
            unit = "each process" if name == "tokens_per_second_per_gpu" else f"first {curve.values[0]:{spec}}"
            facts.append((title, f"{last:{spec}}", unit))
    return facts


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _shares(history: History) -> dict[str, Any] | None:
    """Which classes the measured tokens and their loss belong to."""
    split = latest_split(history)
    states = [] if split is None else [state for state in class_states(history, split) if math.isfinite(state.nll)]
    tokens, loss = sum(state.num_tokens for state in states), sum(state.loss for state in states)
    if split is None or len(states) < 2 or loss <= 0:
        return None
    return {
        "split": _SPLITS[split].lower(),
        "of": [
            {"class": state.group, "tokens": state.num_tokens / tokens, "loss": state.loss / loss} for state in states
        ],
    }


def _tables(history: History) -> list[dict[str, Any]]:
    """First and last value of every class: a title, a head, and rows of cells; a cell is a text or [before, after]."""
    tables = []
    for split, title in _SPLITS.items():
        rows = []
        for group, look in CLASSES.items():
            cells = [_first_last(history, split, group, metric) for metric in _TABLE]
            if any(cells):
                rows.append({"class": group, "cells": [look.title, *(cell or "" for cell in cells)]})
        if rows:
            tables.append({"title": f"{title}, first → last", "head": ["", *_TABLE.values()], "rows": rows})
    return tables


_TABLE = {
    "num_tokens": "tokens",
    "nll": "loss",
    "perplexity": "perplexity",
    "exact_entropy": "entropy",
    **{f"top{k}_prob": f"top-{k}" for k in (1, 2, 5, 10)},
    "accuracy": "accuracy",
}
assert set(_TABLE) <= set(CLASS_METRICS)


def _first_last(history: History, split: str, group: str, metric: str) -> str | list[str] | None:
    curve = history.get(split, group, metric)
    if curve is None:
        return None
    if metric == "num_tokens":
        return f"{curve.values[-1]:,.0f}"
    digits = 2 if metric == "perplexity" else 3
    return [f"{curve.values[0]:,.{digits}f}", f"{curve.values[-1]:,.{digits}f}"]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m torchtune_agent report", description="Make a run's report.html.")
    parser.add_argument("output_dir", type=Path, help="the run's output_dir")
    try:
        logs = parser.parse_args(arguments).output_dir / "logs"
        print(write_report(logs, History.read(logs / "metrics.jsonl")))
    except UserError as error:
        parser.exit(1, f"error: {error}\n")
    return 0
