"""The check as one HTML page that needs nothing else: hover over a token to see what becomes of it.

The page is `page.html` with the data put in as JSON. Its script only ever writes data as text, never as HTML.
"""

import json
from collections.abc import Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from torchtune_agent import __version__
from torchtune_agent.data.inspection.findings import CheckedData, Chosen, findings
from torchtune_agent.data.inspection.looks import LOOKS
from torchtune_agent.data.inspection.statistics import call_names, length_histogram, tool_summary
from torchtune_agent.data.inspection.terminal import length_line, token_texts
from torchtune_agent.data.token_class import TokenClass
from torchtune_agent.data.token_text import Vocabulary
from torchtune_agent.metrics.colours import css_variables
from torchtune_agent.screen import printable

# What the page holds at most, so that it stays small and quick whatever the data is.
_NUM_BYTES = 2_500_000  # of samples
_NUM_TOKENS = 20_000  # of one sample
_NUM_ROWS = 200  # of tables
_NUM_CHARACTERS = 300  # of a cell


def write_page(path: Path, parts: Sequence[CheckedData], vocabulary: Vocabulary, tokenizer: str) -> None:
    """Write the page about all parts of the data."""
    texts = _Texts(vocabulary)
    budget = _NUM_BYTES // len(parts)
    data = {
        "version": __version__,
        "tokenizer": tokenizer,
        "classes": [{"key": kind.name.lower(), "name": LOOKS[kind].title} for kind in TokenClass],
        "parts": [_part(part, texts, budget) for part in parts],
    }
    data |= {"texts": texts.whole, "bytes": texts.partial}
    template = (files("torchtune_agent.data.inspection") / "page.html").read_text(encoding="utf-8")
    # A lone surrogate (of a file's name, say) becomes its own JSON escape.
    page = template.replace("CLASS_COLOURS", css_variables()).replace("DATA_AS_JSON", embedded(data))
    path.write_text(page, encoding="utf-8", errors="backslashreplace")


def embedded(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


class _Texts:
    """What tokens stand for, each said once: text, or bytes where they are no text of their own."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.whole: dict[int, str] = {}
        self.partial: dict[int, str] = {}

    def add(self, tokens: Sequence[int]) -> None:
        for token in {*tokens} - self.whole.keys() - self.partial.keys():
            content = self.vocabulary.text_of(token)
            try:
                self.whole[token] = content.decode()
            except UnicodeDecodeError:
                self.partial[token] = content.hex(" ")


def _part(data: CheckedData, texts: _Texts, budget: int) -> dict[str, Any]:
    counts = data.statistics
    found = {
        "key": data.key,
        "summary": data.report.lines()[0] if data.report else f"{counts.num_samples:,} samples",
        "findings": [[finding.level, finding.text] for finding in findings(data, texts.vocabulary)],
        "refusal": "\n".join(map(printable, data.refusal.split("\n"))) if data.refusal else None,
        "samples": _samples(data, texts, budget),
        "numSamples": counts.num_samples,
        "tables": [],
    }
    if counts.num_samples:
        found["tables"] = [
            ["Tokens per sample", length_line(data), length_histogram(counts.lengths)],
            ["Tokens by class", *_classes(data)],
        ]
    if counts.tools:
        found["tables"].append(["Tools", *_most_common(counts.tools.most_common(), tool_summary(counts))])
    if len(data.datasets) > 1:
        found["tables"].append(["Datasets", "Samples of every dataset of the list.", list(data.datasets.items())])
    if len(data.sources) > 1:
        found["tables"].append(["Sources", *_most_common(data.sources.most_common(), "Samples of every source.")])
    found["ends"] = _ends(data, texts.vocabulary)
    found["divergences"] = [
        [d.where, d.position, d.before, d.ours, d.theirs] for d in data.parity.divergences[:_NUM_ROWS]
    ]
    left_out = data.report.left_out if data.report else []
    found["leftOut"] = [
        [_short(printable(item.where)), item.reason, _short(item.detail), _short(item.excerpt)]
        for item in left_out[:_NUM_ROWS]
    ]
    found["numLeftOut"] = len(left_out)
    return found


def _classes(data: CheckedData) -> tuple[str, list[tuple[str, int, int]]]:
    counts = data.statistics
    rows = [(LOOKS[kind].title, int(counts.classes[kind]), int(kind)) for kind in TokenClass if counts.classes[kind]]
    trained = counts.classes[1:].sum()
    if (counts.weights[1:] == counts.classes[1:]).all():
        return "Every trained token weighs 1 in the loss.", rows
    total = counts.weights.sum()
    shares = (
        f"{LOOKS[TokenClass(k)].title} {counts.weights[k] / total:.1%}"
        for k in range(1, len(TokenClass))
        if counts.classes[k]
    )
    return f"Of the loss ({trained:,} tokens that weigh {total:,.0f}): {', '.join(shares)}.", rows


def _most_common(rows: list[tuple[str, int]], note: str) -> tuple[str, list[tuple[str, int]]]:
    more = f" The {_NUM_ROWS} most frequent are shown." if len(rows) > _NUM_ROWS else ""
    return note + more, [(_short(printable(name)) or "(none)", count) for name, count in rows[:_NUM_ROWS]]


def _ends(data: CheckedData, vocabulary: Vocabulary) -> list[tuple[str, str, int, str]]:
    """Rows of token ids, text, number of turns, and what becomes of their end."""

    def text(tokens: Sequence[int]) -> str:
        return _short(printable(vocabulary.spell(tokens)[0].decode("utf-8", "replace")))

    ends = data.statistics.ends
    rows = [
        (" ".join(map(str, end)), text(end), count, "trained") for end, count in ends.trained.most_common(_NUM_ROWS)
    ]
    rows += [(str(end), text([end]), count, "not trained") for end, count in ends.untrained.most_common(_NUM_ROWS)]
    return [*rows, ("", "", ends.num_open, "there is none")] if ends.num_open else rows


def _samples(data: CheckedData, texts: _Texts, budget: int) -> list[dict[str, Any]]:
    """As many samples as `budget` bytes allow, in the order of the data."""
    shown = []
    for sample in data.samples:
        made = _sample(sample, texts.vocabulary)
        size = len(embedded(made).encode(errors="backslashreplace"))
        if size <= budget:
            budget -= size
            texts.add(made["ids"])
            shown.append(made)
    return sorted(shown, key=lambda sample: sample["index"])


def _sample(sample: Chosen, vocabulary: Vocabulary) -> dict[str, Any]:
    tokens = sample.tokens
    ids = tokens.ids[:_NUM_TOKENS].tolist()
    columns = (tokens.classes, tokens.calls, tokens.weights.astype(np.float64).round(6))
    rows = zip(*(column[:_NUM_TOKENS].tolist() for column in columns), strict=True)
    pieces = zip(ids, token_texts(ids, vocabulary), strict=True)
    return {
        "index": sample.index,
        "where": sample.where,
        "why": sample.why,
        "length": len(tokens.ids),
        "numTargets": int(tokens.is_target.sum()),
        "ids": ids,
        "runs": [[sum(1 for _ in run), *row] for row, run in groupby(rows)],
        "pieces": {i: text for i, (token, text) in enumerate(pieces) if text.encode() != vocabulary.text_of(token)},
        "calls": {call: _short(printable(name)) for call, name in call_names(tokens, vocabulary).items()},
    }


def _short(text: str) -> str:
    return text if len(text) <= _NUM_CHARACTERS else text[:_NUM_CHARACTERS] + "…"
