"""DetailedMetricsTracker: from sums per class to the metric names users watch."""

import math
from collections.abc import Mapping

import torch

from torchtune_agent.data.token_class import GROUPS
from torchtune_agent.errors import UserError
from torchtune_agent.metrics.calls import CALL_SUMS
from torchtune_agent.metrics.names import NameStyle, metric_name
from torchtune_agent.metrics.sums import Sums
from torchtune_agent.metrics.table import COLUMNS, TOP_K, add_tokens, empty_table

MAX_PERPLEXITY = 1e6


class DetailedMetricsTracker:
    """Collects statistics per token class and names their means.

    For every class with at least one token: nll, perplexity (exponential of the class's own mean nll,
    at most 1e6), entropy, topk_entropy, exact_entropy, top1/2/5/10_prob, accuracy and num_tokens.
    A class without tokens has no metrics.

    Args:
        entropy_k: how many of the most likely tokens `topk_entropy` tells apart, 1 to 10.
        enable_token_classification: report reasoning, tool_call and the finer classes beside the overall numbers.
        metric_names: "flat" (`train_tool_call_top5_prob`) or "slash" (`train/tool_call/top5_prob`).

    Example:
        >>> tracker = DetailedMetricsTracker()
        >>> tracker.update(logits, labels, token_class)
        >>> tracker.compute("train")["train_tool_call_perplexity"]
    """

    def __init__(
        self,
        *,
        entropy_k: int = 10,
        enable_token_classification: bool = True,
        metric_names: NameStyle = "flat",
    ) -> None:
        if not 1 <= entropy_k <= max(TOP_K):
            raise UserError(f"entropy_k={entropy_k}: must be between 1 and {max(TOP_K)}.")
        if metric_names not in ("flat", "slash"):
            raise UserError(f"metric_names={metric_names}: must be 'flat' or 'slash'.")
        self.entropy_k = entropy_k
        self._groups = GROUPS if enable_token_classification else {"overall": GROUPS["overall"]}
        self._style: NameStyle = metric_names
        self.table = empty_table()

    def update(self, logits: torch.Tensor, labels: torch.Tensor, token_class: torch.Tensor) -> None:
        """Add tokens: `logits` [tokens, vocabulary], and the label and class each of them predicts."""
        table = empty_table(logits.device)
        add_tokens(table, logits, labels, token_class, self.entropy_k)
        self.add(table)

    def add(self, table: torch.Tensor) -> None:
        """Add a table of sums (see metrics.table)."""
        self.table = self.table.to(table.device) + table

    def reset(self) -> None:
        self.table = empty_table(self.table.device)

    def loss_histograms(self, split: str, counts: torch.Tensor) -> dict[str, list[float]]:
        """Counts per bucket (see metrics.histogram) of every class that has tokens, by name."""
        sums = {group: counts[list(classes)].sum(0) for group, classes in self._groups.items()}
        return {
            metric_name(split, group, "loss_histogram", self._style): values.tolist()
            for group, values in sums.items()
            if values.any()
        }

    def compute(self, split: str, table: torch.Tensor | None = None) -> dict[str, float]:
        """The means of `table` (by default of everything added since the last reset), by name."""
        sums = (self.table if table is None else table).detach().cpu()
        metrics: dict[str, float] = {}
        for group, classes in self._groups.items():
            row = dict(zip(COLUMNS, sums[list(classes)].sum(0).tolist(), strict=True))
            if row["count"] == 0:
                continue
            for name, value in _means(row).items():
                metrics[metric_name(split, group, name, self._style)] = value
        return metrics

    def name(self, split: str, sums: Sums) -> dict[str, float]:
        """Everything that was measured, by name: what `compute` gives, each class's share of the weighted loss, and
        the shares of calls and of tool names that would have been written exactly."""
        metrics = self.compute(split, sums.table)
        total = float(sums.weighted.sum())
        for group, classes in self._groups.items():
            name = metric_name(split, group, "num_tokens", self._style)
            if name in metrics and group != "overall" and total:
                share = float(sums.weighted[list(classes)].sum()) / total
                metrics[metric_name(split, group, "loss_share", self._style)] = share
        if "tool_call" not in self._groups:
            return metrics
        calls = dict(zip(CALL_SUMS, sums.calls.tolist(), strict=True))
        if calls["calls"]:
            metrics[metric_name(split, "tool_call", "num_calls", self._style)] = calls["calls"]
            metrics[metric_name(split, "tool_call", "exact", self._style)] = calls["exact_calls"] / calls["calls"]
        if calls["names"]:
            metrics[metric_name(split, "overall", "tool_name_exact", self._style)] = (
                calls["exact_names"] / calls["names"]
            )
        return metrics


def _means(row: Mapping[str, float]) -> dict[str, float]:
    count = row["count"]
    return {
        "perplexity": _perplexity(row["nll"] / count),
        **{name: row[name] / count for name in COLUMNS if name not in ("count", "correct")},
        "accuracy": row["correct"] / count,
        "num_tokens": count,
    }


def _perplexity(nll: float) -> float:
    if math.isnan(nll):
        return nll
    return MAX_PERPLEXITY if nll >= math.log(MAX_PERPLEXITY) else math.exp(nll)
