"""The check on a terminal: tables with bars, and samples with every token's class to be seen.

Text from data is written so that it cannot drive the terminal.
"""

import codecs
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TextIO

from torchtune_agent.data.inspection.findings import CheckedData, Chosen, Finding
from torchtune_agent.data.inspection.looks import LOOKS
from torchtune_agent.data.inspection.statistics import length_histogram, percentiles, tool_summary
from torchtune_agent.data.inspection.tokens import TaggedTokens
from torchtune_agent.data.token_class import TokenClass
from torchtune_agent.data.token_text import Vocabulary
from torchtune_agent.screen import printable

_BAR = 32  # characters
_NUM_ROWS = 10  # of tables that can be long
_SIGNS = {"good": "✓", "note": "·", "bad": "!"}
_SIGN_COLOURS = {"good": "32", "note": "0", "bad": "1;31"}
_SHOWN = {True: 4000, False: 400}  # characters of a stretch that is trained, and of one that is not


def has_colours(stream: TextIO) -> bool:
    """Whether to write colours to `stream`; see no-color.org."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def finding_line(finding: Finding, *, colours: bool) -> str:
    return f"{_paint(_SIGNS[finding.level], _SIGN_COLOURS[finding.level], colours)} {finding.text}"


def tables(data: CheckedData) -> Iterator[tuple[str, list[str]]]:
    """Every table's name and lines."""
    counts = data.statistics
    if not counts.num_samples:
        return
    yield "lengths", [length_line(data), *_bars(length_histogram(counts.lengths))]
    rows = [(LOOKS[kind].title, int(counts.classes[kind])) for kind in TokenClass if counts.classes[kind]]
    yield "tokens", _bars(rows)
    if counts.tools:
        yield (
            "tools",
            [tool_summary(counts), *_top([(name or "(no name)", n) for name, n in counts.tools.most_common()])],
        )
    if len(data.datasets) > 1:
        yield "datasets", _bars(list(data.datasets.items()))
    if len(data.sources) > 1:
        yield "sources", _top([(name or "(none)", n) for name, n in data.sources.most_common()])
    if data.parity.divergences:
        yield "parity", _divergence(data)


def length_line(data: CheckedData) -> str:
    at = percentiles(data.statistics.lengths)
    return (
        f"{at['shortest']:,} to {at['longest']:,} tokens a sample; half have at most {at['median']:,}, "
        f"90 % {at['90 %']:,}, 99 % {at['99 %']:,}"
    )


def _top(rows: Sequence[tuple[str, int]]) -> list[str]:
    left = len(rows) - _NUM_ROWS
    more = [f"and {left:,} more"] if left > 0 else []
    return _bars(rows[:_NUM_ROWS], total=sum(count for _, count in rows)) + more


def _bars(rows: Sequence[tuple[str, int]], total: int | None = None) -> list[str]:
    """Rows of a label, a count, its share of the total, and a bar in proportion to it."""
    total = total or sum(count for _, count in rows)
    most = max(count for _, count in rows)
    labels = [_shortened(printable(label), 40) for label, _ in rows]
    width = max(map(len, labels))
    digits = len(f"{most:,}")
    bars = ["█" * round(_BAR * count / most) or "▏" * bool(count) for _, count in rows]
    return [
        f"{label:<{width}}  {count:>{digits},}  {count / total:>6.1%}  {bar}".rstrip()
        for label, (_, count), bar in zip(labels, rows, bars, strict=True)
    ]


def _divergence(data: CheckedData) -> list[str]:
    first = data.parity.divergences[0]
    return [
        f"{printable(first.where)}: the first difference is at token {first.position}",
        f"both   …{printable(first.before)}",
        f"ours    {printable(first.ours)}…",
        f"theirs  {printable(first.theirs)}…",
    ]


def sample_lines(sample: Chosen, key: str, vocabulary: Vocabulary, *, colours: bool) -> list[str]:
    """One sample's tokens: text on coloured ground, or one line for every stretch of a class without colours."""
    tokens = sample.tokens
    place = printable(sample.where)
    title = (
        f"{key}, sample {sample.index}: {len(tokens.ids):,} tokens, {int(tokens.is_target.sum()):,} trained, {place}"
    )
    stretches = _stretches(tokens, vocabulary)
    if not colours:
        width = max(len(look.title) for look in LOOKS.values())
        return [title, *(f"  {LOOKS[kind].title:<{width}}  {printable(text)}" for kind, text in stretches)]
    legend = [_paint(f" {LOOKS[kind].title} ", _ground(kind), True) for kind in TokenClass]
    text = "".join("\n".join(_paint(line, _ground(kind), True) for line in _lines(text)) for kind, text in stretches)
    return [_paint(title, "1", True), " ".join(legend), *text.split("\n")]


def _stretches(tokens: TaggedTokens, vocabulary: Vocabulary) -> list[tuple[TokenClass, str]]:
    pieces = zip(tokens.classes.tolist(), token_texts(tokens.ids.tolist(), vocabulary), strict=True)
    stretches = ((TokenClass(kind), "".join(text for _, text in run)) for kind, run in groupby(pieces, lambda p: p[0]))
    return [(kind, _shortened(text, _SHOWN[kind is not TokenClass.IGNORED])) for kind, text in stretches]


def token_texts(ids: Sequence[int], vocabulary: Vocabulary) -> list[str]:
    """The text that every token completes; "" for one that ends inside of a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(vocabulary.text_of(token), final=i == len(ids) - 1) for i, token in enumerate(ids)]


def _lines(text: str) -> list[str]:
    *lines, last = text.split("\n")
    return [*(printable(line) + "↵" for line in lines), printable(last)]


def _ground(kind: TokenClass) -> str:
    return "2" if kind is TokenClass.IGNORED else f"38;5;16;48;5;{LOOKS[kind].terminal}"


def _paint(text: str, code: str, colours: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colours and text else text


def _shortened(text: str, limit: int) -> str:
    """`text` without its middle where it is too long."""
    if len(text) <= limit:
        return text
    kept = max(1, (limit - 20) // 2)
    return (
        f"{text[:kept]} […{len(text) - 2 * kept:,} characters…] {text[-kept:]}" if limit > 100 else text[:limit] + "…"
    )
