"""What a run ends with on the screen: one row per token class, its first and last value."""

from collections.abc import Mapping, Sequence
from typing import Any

from torchtune_agent.data.token_class import GROUPS
from torchtune_agent.metrics.tracker import NameStyle, metric_name

_COLUMNS = (
    ("nll", "loss", ".3f"),
    ("perplexity", "perplexity", ".2f"),
    ("exact_entropy", "entropy", ".3f"),
    ("top1_prob", "top-1", ".3f"),
    ("top2_prob", "top-2", ".3f"),
    ("top5_prob", "top-5", ".3f"),
    ("top10_prob", "top-10", ".3f"),
    ("accuracy", "accuracy", ".3f"),
)
_PARTS = ("think", "call_syntax", "call_name", "arg_name", "arg_value")


def class_table(rows: Sequence[Mapping[str, Any]], split: str, style: NameStyle = "flat") -> str:
    """A text table of `split`'s metrics: for every class its first value in `rows`, an arrow, and its last."""
    lines = [["", "tokens", *(title for _, title, _ in _COLUMNS)]]
    for group in GROUPS:
        history = [row for row in rows if metric_name(split, group, "nll", style) in row]
        if not history:
            continue
        first, last = history[0], history[-1]
        cells = [_change(first, last, metric_name(split, group, key, style), spec) for key, _, spec in _COLUMNS]
        count = f"{last[metric_name(split, group, 'num_tokens', style)]:,.0f}"
        lines.append([("  " if group in _PARTS else "") + group.replace("_", " "), count, *cells])
    return aligned(lines)


def _change(first: Mapping[str, Any], last: Mapping[str, Any], name: str, spec: str) -> str:
    return f"{first[name]:{spec}} → {last[name]:{spec}}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Text columns: the first flush left, the others flush right, a rule under the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    text.insert(1, "─" * len(text[0]))
    return "\n".join(text)
