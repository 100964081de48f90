"""The selection as one HTML page that needs nothing else: what was kept, what was dropped, and why.

The page is `page.html` with the data put in as JSON. Its script only ever writes data as text, never as HTML.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from torchtune_agent import __version__
from torchtune_agent.data.inspection.page import embedded
from torchtune_agent.data.quarantine import printable
from torchtune_agent.selection.selecting import Selection

# What the page holds at most, so that it stays small and quick however large the pool is.
_NUM_POINTS = 4000
_NUM_ROWS = 40  # of a table
_NUM_EXAMPLES = 12  # of a kind
_NUM_CHARACTERS = 1200  # of an example
_LENGTH_BINS = 12
_FATES = ("dropped", "kept", "duplicate", "suspected label error")


def render(selection: Selection, text: Callable[[int], str] | None = None) -> str:
    """The page. `text` gives what a row of the pool reads like; without it, examples are names and numbers."""
    pool, kept = selection.pool, selection.chosen
    data = {
        "version": __version__,
        "facts": _facts(selection),
        "notes": selection.notes,
        "fates": _FATES,
        "points": _points(selection),
        "numSamples": len(pool),
        "tables": [
            ["Tokens per sample", _length_note(selection), _by_length(pool.num_tokens, kept)],
            *_by_name("Tools", "Samples that call each tool.", pool.tools, kept),
            *_by_name("Sources", "Samples of each source.", pool.sources, kept),
            *_by_name("Reasons", "What picks were picked for.", None, kept, selection.picks.reasons),
        ],
        "examples": _examples(selection, text),
    }
    template = (files("torchtune_agent.selection") / "page.html").read_text(encoding="utf-8")
    return template.replace("DATA_AS_JSON", embedded(data))


def _facts(selection: Selection) -> list[tuple[str, str]]:
    options, pool = selection.options, selection.pool
    number = len(selection.picks.rows)
    lengths = pool.num_tokens
    kept_tokens = int(lengths[selection.picks.rows].sum())
    facts = [
        ("Strategy", options.strategy),
        ("Kept", f"{number:,} of {len(pool):,} samples ({number / len(pool):.1%})"),
        ("Tokens kept", f"{kept_tokens:,} of {int(lengths.sum()):,} ({kept_tokens / max(1, int(lengths.sum())):.1%})"),
        ("Near-duplicates", f"{len(selection.duplicates):,}"),
        ("Suspected label errors", f"{len(selection.capped):,}"),
    ]
    loss = pool.losses.get(options.score_on)
    if loss is not None and not np.isnan(loss).all():
        own = loss[selection.picks.rows]
        mean = f"{np.nanmean(own):.3f}" if not np.isnan(own).all() else "none"
        facts.append((f"Mean {options.score_on} loss", f"{mean} of kept, {np.nanmean(loss):.3f} of all"))
    return facts


def _length_note(selection: Selection) -> str:
    lengths = selection.pool.num_tokens
    return (
        f"Mean {lengths[selection.picks.rows].mean():,.0f} of kept, {lengths.mean():,.0f} of all. Rank correlation of "
        f"being kept with length: {selection.length_correlation():+.2f} (0: length did not matter)."
    )


def _fate(selection: Selection) -> np.ndarray:
    fate = np.zeros(len(selection.pool), np.int64)
    fate[selection.picks.rows] = 1
    fate[list(selection.duplicates)] = 2
    fate[selection.capped] = 3
    return fate


def _points(selection: Selection) -> list[list[Any]]:
    """x, y, fate, name, tokens and loss of samples, or of a seeded draw of them; empty without embeddings."""
    pool = selection.pool
    if pool.embeddings is None or len(pool) < 3:
        return []
    rows = np.arange(len(pool))
    if len(rows) > _NUM_POINTS:
        rows = np.sort(np.random.default_rng(0).choice(rows, _NUM_POINTS, replace=False))
    places = plane(pool.embeddings[rows])
    fate = _fate(selection)
    loss = pool.losses.get(selection.options.score_on)
    ids: list[str] = list(pool.ids)
    return [
        [
            *(round(float(value), 4) for value in places[i]),
            int(fate[row]),
            printable(ids[row])[:100],
            int(pool.num_tokens[row]),
            None if loss is None or np.isnan(loss[row]) else round(float(loss[row]), 3),
        ]
        for i, row in enumerate(rows.tolist())
    ]


def plane(vectors: np.ndarray) -> np.ndarray:
    """Vectors [n, d] on the plane of their two principal components, each scaled into -1 to 1."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    centered = (unit - unit.mean(0)).astype(np.float64)
    _, axes = np.linalg.eigh(centered.T @ centered)
    axes = axes[:, ::-1][:, :2]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])  # of the two directions, always one
    places = centered @ axes
    places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    low, high = places.min(0), places.max(0)
    return (places - low) / np.maximum(high - low, 1e-12) * 2 - 1


def _by_length(lengths: np.ndarray, kept: np.ndarray) -> list[tuple[str, int, int]]:
    """Bins of a constant ratio."""
    low, high = max(1, int(lengths.min())), int(lengths.max()) + 1
    edges = np.unique(np.geomspace(low, max(high, low + 1), _LENGTH_BINS + 1).round().astype(np.int64))
    every, _ = np.histogram(lengths, edges)
    own, _ = np.histogram(lengths[kept], edges)
    names = [f"{a:,}" if b == a + 1 else f"{a:,} to {b - 1:,}" for a, b in zip(edges, edges[1:], strict=False)]
    return [(name, int(n), int(k)) for name, n, k in zip(names, every, own, strict=True)]


def _by_name(
    title: str,
    note: str,
    values: Sequence[Any] | None,
    kept: np.ndarray,
    reasons: Sequence[str] = (),
) -> list[list[Any]]:
    if values is None:
        counts = Counter(reason.split(",")[0] if reason.startswith("floor") else reason for reason in reasons)
        rows = [(printable(name)[:100], count, count) for name, count in counts.most_common(_NUM_ROWS)]
        return [[title, note, rows]] if rows else []
    every: Counter[str] = Counter()
    own: Counter[str] = Counter()
    for value, is_kept in zip(values, kept, strict=True):
        names = {value} if isinstance(value, str) else set(value)
        every.update(names)
        if is_kept:
            own.update(names)
    if not every:
        return []
    if len(every) > _NUM_ROWS:
        note += f" The {_NUM_ROWS} most common of {len(every):,}."
    lost = sum(1 for name in every if not own[name])
    note += f" {lost:,} are not in what was kept." if lost else " None is lost."
    ordered = sorted(every.items(), key=lambda item: (-item[1], item[0]))[:_NUM_ROWS]
    return [[title, note, [(printable(name)[:100], count, own[name]) for name, count in ordered]]]


def _examples(selection: Selection, text: Callable[[int], str] | None) -> list[list[Any]]:
    picks, pool = selection.picks, selection.pool

    def example(row: int, why: str) -> list[str]:
        words = "\n".join(map(printable, text(row)[:_NUM_CHARACTERS].split("\n"))) if text is not None else ""
        return [printable(pool.ids[row])[:100], f"{why}, {int(pool.num_tokens[row]):,} tokens", words]

    first = [example(int(picks.rows[i]), selection.reason(i)) for i in range(min(_NUM_EXAMPLES, len(picks.rows)))]
    copies = sorted(selection.duplicates.items())[:_NUM_EXAMPLES]
    out = _fate(selection) == 0
    rest = np.flatnonzero(out)
    rest = rest[np.linspace(0, len(rest) - 1, min(_NUM_EXAMPLES, len(rest))).astype(np.int64)] if len(rest) else rest
    groups = [
        ["Kept: the first picks", first],
        ["Dropped: not picked", [example(row, "not picked") for row in rest.tolist()]],
        ["Dropped: near-duplicates", [example(row, f"like {printable(pool.ids[kept])[:100]}") for row, kept in copies]],
        [
            "Dropped: suspected label errors",
            [example(row, _loss(selection, row)) for row in selection.capped[:_NUM_EXAMPLES].tolist()],
        ],
    ]
    return [group for group in groups if group[1]]


def _loss(selection: Selection, row: int) -> str:
    return f"{selection.options.score_on} loss {selection.pool.losses[selection.options.score_on][row]:.3f}"
