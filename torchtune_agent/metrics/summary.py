"""What a run ends with on the screen: one row per token class, its first and last value."""

from collections.abc import Sequence

from torchtune_agent.data.token_class import GROUPS
from torchtune_agent.metrics.history import Curve, History

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


def class_table(history: History, split: str, *, with_first: bool = True) -> str:
    """A text table of `split`'s metrics: for every class its first value in the run, an arrow, and its last."""
    lines = [["", "tokens", *(title for _, title, _ in _COLUMNS)]]
    for group in GROUPS:
        count = history.get(split, group, "num_tokens")
        if count is None:
            continue
        cells = [_change(history.get(split, group, key), spec, with_first) for key, _, spec in _COLUMNS]
        name = ("  " if group in _PARTS else "") + group.replace("_", " ")
        lines.append([name, f"{count.values[-1]:,.0f}", *cells])
    return aligned(lines)


def latest_table(history: History, split: str) -> tuple[int, str] | None:
    """The step of `split`'s last metrics, and a Markdown table of them; None where there are none."""
    overall = history.get(split, "overall", "nll")
    if overall is None:
        return None
    step = overall.steps[-1]
    lines = [["", "tokens", *(title for _, title, _ in _COLUMNS)], ["---", *["---:"] * (len(_COLUMNS) + 1)]]
    for group in GROUPS:
        count = history.get(split, group, "num_tokens")
        if count is None or count.steps[-1] != step:  # it had no token then
            continue
        curves = [(history.get(split, group, key), spec) for key, _, spec in _COLUMNS]
        cells = [f"{curve.values[-1]:{spec}}" if curve else "" for curve, spec in curves]
        lines.append([group.replace("_", " "), f"{count.values[-1]:,.0f}", *cells])
    return step, "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _change(curve: Curve | None, spec: str, with_first: bool) -> str:
    if not curve:
        return ""
    last = f"{curve.values[-1]:{spec}}"
    return f"{curve.values[0]:{spec}} → {last}" if with_first else last


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Text columns: the first flush left, the others flush right, a rule under the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    text.insert(1, "─" * len(text[0]))
    return "\n".join(text)
