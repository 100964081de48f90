"""Reading a run back as curves, and making long ones short."""

import json
import math
from pathlib import Path

import pytest

from tests import logged_run
from torchtune_agent.errors import UserError
from torchtune_agent.metrics.charts import class_charts, run_charts
from torchtune_agent.metrics.history import Curve, History
from torchtune_agent.metrics.names import ClassMetric, metric_name, read_name
from torchtune_agent.metrics.thinning import thinned


def curve(*values: float) -> Curve:
    made = Curve()
    for step, value in enumerate(values, start=1):
        made.add(step, value)
    return made


def test_every_value_is_read_at_its_step(tmp_path: Path) -> None:
    logged = list(logged_run.rows(30, every=5))
    history = History.read(logged_run.write(tmp_path, logged))
    for name in {name for row in logged for name in row} - {"step", "time"}:
        points = [(row["step"], row[name]) for row in logged if name in row]
        assert list(zip(history.curves[name].steps, history.curves[name].values, strict=True)) == points
    assert history.last_step == 30 and history.times == [1e9 + 2, 1e9 + 61]


def test_both_styles_of_names_read_alike() -> None:
    slash = History([{"step": 1, "train/tool_call/top5_prob": 0.5, "lr": 1.0}])
    assert slash.curves.keys() == {"train_tool_call_top5_prob", "lr"}
    found = slash.get("train", "tool_call", "top5_prob")
    assert found is not None and list(found.values) == [0.5]


def test_values_that_are_not_finite_are_kept(tmp_path: Path) -> None:
    path = logged_run.write(tmp_path, [{"step": 1, "grad_norm": "inf"}, {"step": 2, "grad_norm": "nan"}])
    first, second = History.read(path).curves["grad_norm"].values
    assert first == math.inf and math.isnan(second)


def test_what_a_resumed_run_logged_last_counts() -> None:
    steps = [(step, {"loss": float(step)}) for step in range(1, 9)] + [(8, {"val_loss": 8.0, "extra": 1.0})]
    again = [(step, {"loss": -float(step)}) for step in range(5, 8)]
    history = History({"step": step, **row} for step, row in steps + again)
    assert list(history.curves["loss"].steps) == [1, 2, 3, 4, 5, 6, 7]
    assert list(history.curves["loss"].values) == [1, 2, 3, 4, -5, -6, -7]
    assert history.last_step == 7 and not history.curves["val_loss"] and history.get("val", "overall", "loss") is None


def test_a_row_that_is_still_being_written_is_left_for_later(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert list(History.read(path).curves["loss"].values) == [2.0]


@pytest.mark.parametrize("line", ["", "{", "[1]", '{"loss": 1.0}', '{"step": 1, "loss": "much"}'])
def test_a_broken_row_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 1.0}) + f"\n{line}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        History.read(path)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("train_entropy", ClassMetric("train", "overall", "entropy")),
        ("val_tool_call_top5_prob", ClassMetric("val", "tool_call", "top5_prob")),
        ("train_call_name_nll", ClassMetric("train", "call_name", "nll")),
        ("val_stop_accuracy", ClassMetric("val", "stop", "accuracy")),
        ("lr", None),
        ("validation_loss", None),
        ("train", None),
    ],
)
def test_names_are_read_as_they_are_written(name: str, parts: ClassMetric | None) -> None:
    assert read_name(name) == parts
    assert parts is None or metric_name(*parts) == name


def test_every_curve_is_in_exactly_one_chart() -> None:
    history = History(
        [*logged_run.rows(20), {"step": 20, "train_new_metric": 1.0, "val_think_new_metric": 1.0, "mfu": 0.4}]
    )
    charts = class_charts(history.curves) + run_charts(history.curves)
    drawn = [name for chart in charts for name in chart.names.values()]
    assert sorted(drawn) == sorted(history.curves)
    assert [chart.kind.title for chart in charts][:3] == ["Loss", "Accuracy", "Entropy"]
    assert [chart.kind.title for chart in charts if "new" in chart.metric] == ["New metric"]
    together = next(chart for chart in charts if chart.metric == "loss")
    assert together.names == {("train", "overall"): "loss", ("val", "overall"): "val_loss"}


def test_a_short_curve_stays_as_it_is() -> None:
    points = thinned(curve(3.0, 1.0, 2.0), 3)
    assert (points.steps, points.values, points.low, points.high) == ([1, 2, 3], [3.0, 1.0, 2.0], [], [])


def test_a_long_curve_keeps_means_and_extremes() -> None:
    values = [math.sin(i) + (100.0 if i == 617 else 0.0) for i in range(1001)]
    points = thinned(curve(*values), 100)
    assert len(points.steps) <= 100 and points.steps[-1] == 1001
    starts = [0, *points.steps[:-1]]
    for i, (start, end) in enumerate(zip(starts, points.steps, strict=True)):
        bucket = values[start:end]
        assert points.values[i] == pytest.approx(sum(bucket) / len(bucket))
        assert (points.low[i], points.high[i]) == (min(bucket), max(bucket))
    assert max(filter(None, points.high)) == max(values)


def test_what_is_not_finite_is_a_gap_and_counted() -> None:
    points = thinned(curve(1.0, math.nan, math.inf, -math.inf, 5.0, 7.0), 3)
    assert points.values == [1.0, None, 6.0]
    assert points.marks == [(2, "nan"), (3, "inf"), (4, "-inf")] and points.num_not_finite == 3
    assert (points.low, points.high) == ([1.0, None, 5.0], [1.0, None, 7.0])
