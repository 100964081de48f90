"""What TensorBoard and WandB are told beside the rows, so that they show a run well without a hand on the mouse.

TensorBoard: its CUSTOM SCALARS tab overlays the classes, one chart for each metric; HISTOGRAMS has the losses of each
class. WandB: every metric is plotted over `global_step`, and the summary has the best value beside the last.
Other loggers get the rows alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torchtune.training.metric_logging import MetricLoggerInterface, TensorBoardLogger, WandBLogger

from torchtune_agent.metrics.charts import CLASS_METRICS
from torchtune_agent.metrics.colours import CLASSES
from torchtune_agent.metrics.histogram import UPPER_EDGES
from torchtune_agent.metrics.names import SPLITS, NameStyle, metric_name

_SPLIT_TITLES = {"train": "training", "val": "validation"}
_BEST = {"nll": "min", "perplexity": "min", "accuracy": "max"}


def prepare(logger: MetricLoggerInterface, style: NameStyle) -> None:
    """Tell a logger once, before the first row, how to show what will come."""
    if isinstance(logger, TensorBoardLogger) and logger._writer is not None:
        logger._writer.add_custom_scalars(tensorboard_layout(style))
    elif isinstance(logger, WandBLogger):
        for name, best in wandb_summaries(style).items():
            logger._wandb.define_metric(name, step_metric="global_step", summary=best)


def add_histograms(logger: MetricLoggerInterface, histograms: Mapping[str, Sequence[float]], step: int) -> None:
    """Counts per bucket of metrics.histogram, by name. Only TensorBoard shows them."""
    if not isinstance(logger, TensorBoardLogger) or logger._writer is None:
        return
    for name, counts in histograms.items():
        filled = [i for i, count in enumerate(counts) if count]
        if not filled:
            continue
        first, last = filled[0], filled[-1]
        edges = [0.0, *UPPER_EDGES][first : last + 2]
        used = counts[first : last + 1]
        # TensorBoard draws the buckets. The two sums, which it shows nowhere, are those of the buckets' middles.
        middles = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
        logger._writer.add_histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=int(sum(used)),
            sum=sum(count * middle for count, middle in zip(used, middles, strict=True)),
            sum_squares=sum(count * middle**2 for count, middle in zip(used, middles, strict=True)),
            bucket_limits=edges[1:],
            bucket_counts=list(used),
            global_step=step,
        )


def add_table(logger: MetricLoggerInterface, name: str, lines: Sequence[Sequence[str]], step: int) -> None:
    """A table of texts, its head first."""
    if isinstance(logger, TensorBoardLogger) and logger._writer is not None:
        rows = [f"|{'|'.join(cell.replace('|', '&#124;') for cell in line)}|" for line in lines]
        rows.insert(1, "|" + "---|" * len(lines[0]))
        logger._writer.add_text(name, "\n".join(rows), global_step=step)
    elif isinstance(logger, WandBLogger):
        table = logger._wandb.Table(columns=list(lines[0]), data=[list(line) for line in lines[1:]])
        logger._wandb.log({name: table, "global_step": step})


def tensorboard_layout(style: NameStyle) -> dict[str, Any]:
    """A category for each split; in it a chart for each metric; in that a line for each class."""
    return {
        f"Token classes, {_SPLIT_TITLES[split]}": {
            kind.title: ["Multiline", [f"^{metric_name(split, group, metric, style)}$" for group in CLASSES]]
            for metric, kind in CLASS_METRICS.items()
        }
        for split in SPLITS
    }


def wandb_summaries(style: NameStyle) -> dict[str, str]:
    """The summary of a metric where it is more than its last value: its best one too."""
    losses = {"loss": "min", metric_name("val", "overall", "loss", style): "min"}
    classes = {
        metric_name(split, group, metric, style): best
        for split in SPLITS
        for group in CLASSES
        for metric, best in _BEST.items()
    }
    return {name: f"{best},last" for name, best in (losses | classes).items()}
