"""Which charts a run has and what is in each: the one place that decides it for the page, the picture and the boards.

A metric that is not listed here is drawn all the same, after those that are, under its own name.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torchtune_agent.metrics.colours import CLASSES
from torchtune_agent.metrics.names import read_name


@dataclass(frozen=True)
class Kind:
    """How a metric is drawn."""

    title: str
    unit: str = ""
    log: bool = False
    from_zero: bool = True


@dataclass
class Chart:
    """Some of a run's curves in one pair of axes: a flat name for each (split, group)."""

    metric: str
    kind: Kind
    names: dict[tuple[str, str], str] = field(default_factory=dict)


# Of every class. The first three are the static picture.
CLASS_METRICS: dict[str, Kind] = {
    "nll": Kind("Loss", "nats a token"),
    "accuracy": Kind("Accuracy", "share of tokens"),
    "exact_entropy": Kind("Entropy", "nats, over the whole vocabulary"),
    "perplexity": Kind("Perplexity", "", log=True),
    "top1_prob": Kind("Top-1 probability"),
    "top2_prob": Kind("Top-2 probability"),
    "top5_prob": Kind("Top-5 probability"),
    "top10_prob": Kind("Top-10 probability"),
    "topk_entropy": Kind("Top-k entropy", "nats"),
    "entropy": Kind("Binary entropy of the most likely token", "bits"),
    "exact": Kind("Calls written exactly", "share of calls"),
    "tool_name_exact": Kind("Tool names written exactly", "share of calls"),
    "loss_share": Kind("Share of the weighted loss"),
    "num_calls": Kind("Calls measured", "in a row"),
    "num_tokens": Kind("Tokens measured", "in a row"),
}
PICTURE_METRICS = tuple(CLASS_METRICS)[:3]
PICTURE_GROUPS = ("reasoning", "think", "call_syntax", "call_name", "arg_name", "arg_value")

# Of the run as a whole
_OF_THE_RUN = {"val_loss"}  # the loss of all trained tokens, end-of-turn tokens included: of no class
RUN_METRICS: dict[str, Kind] = {
    "loss": Kind("Loss of all trained tokens", "nats a token"),
    "grad_norm": Kind("Gradient norm"),
    "lr": Kind("Learning rate"),
    "tokens_per_second_per_gpu": Kind("Throughput", "tokens a second, each process"),
    "supervised_tokens_per_second_per_gpu": Kind("Throughput of trained tokens", "tokens a second, each process"),
    "mfu": Kind("Model FLOPs utilization", "share of the devices' peak"),
    "peak_memory_rss": Kind("Peak memory", "GiB, of the main process"),
    "peak_memory_active": Kind("Peak memory, active", "GiB"),
    "peak_memory_alloc": Kind("Peak memory, allocated", "GiB"),
    "peak_memory_reserved": Kind("Peak memory, reserved", "GiB"),
}


def class_charts(names: Iterable[str]) -> list[Chart]:
    """The charts of the metrics that classes have, curves in the order of the classes."""
    charts = {metric: Chart(metric, kind) for metric, kind in CLASS_METRICS.items()}
    found = [(read, name) for name in names if (read := read_name(name)) is not None and name not in _OF_THE_RUN]
    order = list(CLASSES)
    for read, name in sorted(found, key=lambda pair: order.index(pair[0].group)):
        chart = charts.setdefault(read.metric, Chart(read.metric, _untitled(read.metric)))
        chart.names[read.split, read.group] = name
    return [chart for chart in charts.values() if chart.names]


def run_charts(names: Iterable[str]) -> list[Chart]:
    """The charts of everything else: training and validation loss together, then one for each name."""
    left = {name for name in names if read_name(name) is None or name in _OF_THE_RUN}
    charts = []
    for metric in [*RUN_METRICS, *sorted(left - set(RUN_METRICS) - _OF_THE_RUN)]:
        chart = Chart(metric, RUN_METRICS.get(metric) or _untitled(metric))
        chart.names = {(split, "overall"): name for split, name in _splits(metric).items() if name in left}
        if chart.names:
            charts.append(chart)
    return charts


def _splits(metric: str) -> dict[str, str]:
    return {"train": metric, "val": "val_loss"} if metric == "loss" else {"train": metric}


def _untitled(metric: str) -> Kind:
    return Kind(metric.replace("_", " ").capitalize())
