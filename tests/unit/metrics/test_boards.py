"""TensorBoard and WandB are told how to show a run: read back by their own readers."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torchtune.training.metric_logging import StdoutLogger, TensorBoardLogger, WandBLogger

from tests import wandb_file
from torchtune_agent.data.token_class import GROUPS, TokenClass
from torchtune_agent.metrics import DetailedMetricsTracker, boards
from torchtune_agent.metrics.charts import CLASS_METRICS
from torchtune_agent.metrics.histogram import NUM_BUCKETS, UPPER_EDGES, add_losses, empty_counts
from torchtune_agent.metrics.names import NameStyle


def losses() -> tuple[torch.Tensor, torch.Tensor]:
    """A loss and a class for each of many tokens, edge cases among them."""
    generator = torch.Generator().manual_seed(0)
    nll = torch.randn(2000, generator=generator).mul(2).exp()
    nll[:6] = torch.tensor([0.0, 1e-9, 99.0, 1e4, 5e-5, 3.0])
    return nll, torch.randint(0, len(TokenClass), (2000,), generator=generator)


def test_every_loss_is_counted_once_between_its_edges() -> None:
    nll, kinds = losses()
    counts = empty_counts()
    add_losses(counts, nll[:700], kinds[:700])
    add_losses(counts, nll[700:], kinds[700:])
    expected = Counter()
    for value, kind in zip(nll.tolist(), kinds.tolist(), strict=True):
        bucket = next((i for i, edge in enumerate(UPPER_EDGES) if value < edge), NUM_BUCKETS - 1)
        expected[kind, bucket] += 1
    assert {(k, b): counts[k, b].item() for k, b in counts.nonzero().tolist()} == expected


def test_losses_that_are_not_finite_are_not_counted() -> None:
    counts = empty_counts()
    add_losses(counts, torch.tensor([math.nan, math.inf, 1.0]), torch.tensor([2, 2, 2]))
    assert counts.sum() == 1


@pytest.mark.parametrize("style", ["flat", "slash"])
def test_tensorboard_overlays_the_classes_and_shows_their_losses(style: NameStyle, tmp_path: Path) -> None:
    separator = "_" if style == "flat" else "/"
    nll, kinds = losses()
    counts = empty_counts()
    add_losses(counts, nll, kinds)
    tracker = DetailedMetricsTracker(metric_names=style)
    logger = TensorBoardLogger(str(tmp_path), organize_logs=False)
    boards.prepare(logger, style)
    boards.add_histograms(logger, tracker.loss_histograms("train", counts), 7)
    logger.close()

    reader = EventAccumulator(str(tmp_path), {"histograms": 0}).Reload()
    (event,) = reader.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])  # pyright: ignore
    assert [category.title for category in layout.category] == ["Token classes, training", "Token classes, validation"]
    for category, split in zip(layout.category, ("train", "val"), strict=True):
        tags = {chart.title: list(chart.multiline.tag) for chart in category.chart}
        names = [[split, "nll"], [split, "tool_call", "nll"], [split, "arg_value", "nll"]]
        assert {f"^{separator.join(name)}$" for name in names} <= set(tags["Loss"])
        assert len(tags) == len(CLASS_METRICS)

    for group, classes in GROUPS.items():
        parts = ["train", "loss_histogram"] if group == "overall" else ["train", group, "loss_histogram"]
        (event,) = reader.Histograms(separator.join(parts))
        read, mine = event.histogram_value, nll[torch.isin(kinds, torch.tensor(classes))]
        assert event.step == 7 and read.num == sum(read.bucket) == len(mine)
        edges = [read.min, *read.bucket_limit]
        assert edges == sorted(edges) and edges[-1] == read.max and read.bucket[0] and read.bucket[-1]
        for left, right, count in list(zip(edges, edges[1:], read.bucket, strict=False))[1:-1]:
            assert count == ((mine >= left) & (mine < right)).sum(), (left, right)


def test_wandb_knows_the_steps_and_the_best_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandBLogger(project="test", mode="offline", log_dir=str(tmp_path))
    boards.prepare(logger, "flat")
    for step, value in enumerate([3.0, 1.0, 2.0], start=1):
        logger.log_dict({"val_tool_call_nll": value, "val_accuracy": value, "lr": value}, step)
    run = logger._wandb.run
    assert run is not None
    summary = run.summary
    assert dict(summary["val_tool_call_nll"]) == {"min": 1.0, "last": 2.0}
    assert dict(summary["val_accuracy"]) == {"max": 3.0, "last": 2.0}
    assert summary["lr"] == 2.0
    boards.add_histograms(logger, {"train_loss_histogram": [1.0] * NUM_BUCKETS}, 3)  # rows stay rows
    logger.close()
    wandb.teardown()  # its service writes the file, and has done so when it ends
    (run_file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    metrics = {m.metric.name: m.metric for m in wandb_file.records(run_file) if m.HasField("metric")}
    assert metrics["train_arg_value_perplexity"].step_metric == "global_step"
    assert [row["global_step"] for row in wandb_file.history(run_file)] == [1, 2, 3]


def test_other_loggers_get_the_rows_alone(capsys: pytest.CaptureFixture[str]) -> None:
    logger = StdoutLogger()
    boards.prepare(logger, "flat")
    boards.add_histograms(logger, {"train_loss_histogram": [1.0] * NUM_BUCKETS}, 3)
    assert capsys.readouterr().out == ""
