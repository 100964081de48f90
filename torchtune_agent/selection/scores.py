"""Scores as files: their columns, how parts become one table, a pool from a table or from a run's ledger."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from torchtune_agent.data.token_class import GROUPS, TokenClass
from torchtune_agent.errors import UserError
from torchtune_agent.selection.pool import Pool

CLASSES = [kind for kind in TokenClass if kind is not TokenClass.IGNORED]


def schema(dimensions: int) -> pyarrow.Schema:
    """`row` is the sample's place in its data set; `loss`, `entropy` and `error` are means per token; `nll_*` are sums
    over the `tokens_*` of a class, so that means of any group of classes can be made of them."""
    return pyarrow.schema(
        [
            ("row", pyarrow.int64()),
            ("sample", pyarrow.string()),
            ("source", pyarrow.string()),
            ("tools", pyarrow.list_(pyarrow.string())),
            ("num_tokens", pyarrow.int64()),
            ("loss", pyarrow.float64()),
            ("entropy", pyarrow.float64()),
            ("error", pyarrow.float64()),
            *((f"tokens_{kind.name.lower()}", pyarrow.int64()) for kind in CLASSES),
            *((f"nll_{kind.name.lower()}", pyarrow.float64()) for kind in CLASSES),
            ("embedding", pyarrow.list_(pyarrow.float32(), dimensions)),
        ]
    )


def write_table(table: pyarrow.Table, path: Path) -> None:
    """Write all of it or nothing: a file that is there is complete."""
    partial = path.with_suffix(".partial")
    parquet.write_table(table, partial)
    partial.replace(path)


def merged(parts: Sequence[Path]) -> pyarrow.Table:
    """The parts as one table in the order of the data set."""
    table = pyarrow.concat_tables(parquet.read_table(path) for path in parts)
    return table.sort_by("row").combine_chunks()


def read_pool(path: Path, key: str = "scores_from") -> Pool:
    """The pool of a `scores.parquet`, which the config names under `key`."""
    try:
        table = parquet.read_table(path)
    except FileNotFoundError as error:
        raise UserError(f"{key}={path}: there is no such file. Score the pool first.") from error
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{key}={path}: cannot be read ({error}). Delete it and score the pool again.") from error
    width = getattr(table.schema.field("embedding").type, "list_size", 0) if "embedding" in table.schema.names else 0
    missing = set(schema(1).names) - set(table.schema.names)
    if missing:
        raise UserError(f"{key}={path}: has no column '{min(missing)}'. Name a scores.parquet that scoring made.")
    return pool_of(table, width)


def pool_of(table: pyarrow.Table, width: int) -> Pool:
    columns: dict[str, Any] = {
        name: table[name].to_numpy() for name in table.schema.names if name not in ("embedding", "tools")
    }
    flat = table["embedding"].combine_chunks()
    flat = flat if isinstance(flat, pyarrow.Array) else pyarrow.concat_arrays(flat.chunks)
    losses = {}
    for group, kinds in GROUPS.items():
        names = [kind.name.lower() for kind in kinds]
        tokens = sum((columns[f"tokens_{name}"] for name in names), np.zeros(len(table)))
        nll = sum((columns[f"nll_{name}"] for name in names), np.zeros(len(table)))
        losses[group] = mean(nll, tokens)
    losses["overall"] = columns["loss"]
    return Pool(
        ids=table["sample"].to_pylist(),
        num_tokens=columns["num_tokens"],
        losses=losses,
        entropy=columns["entropy"],
        error=columns["error"],
        embeddings=flat.flatten().to_numpy(zero_copy_only=False).reshape(len(table), width),
        tools=[tuple(names or ()) for names in table["tools"].to_pylist()],
        sources=table["source"].to_pylist(),
    )


def mean(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """NaN where nothing was counted."""
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def pool_from_ledger(
    folder: Path,
    ids: Sequence[str],
    num_tokens: np.ndarray,
    tools: Sequence[tuple[str, ...]] | None = None,
    sources: Sequence[str] | None = None,
    *,
    key: str = "scores_from",
) -> Pool:
    """A pool of losses from the per-sample ledger of a training run (log_sample_losses): of every sample and class the
    newest. It holds what samples lost while they were trained, at different steps, and neither entropies nor
    embeddings.

    `ids` are those of the pool's samples. Where a record made several samples, they share its loss.
    """
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise UserError(f"{key}={folder}: holds no ledger. A run writes one with log_sample_losses=True.")
    table = pyarrow.concat_tables(parquet.read_table(path) for path in files).sort_by("step")
    sums: dict[str, dict[str, tuple[int, int, float]]] = {}  # by record, by class: step, tokens, nll
    columns = (table[name].to_pylist() for name in ("sample", "step", "token_class", "tokens", "loss"))
    for sample, step, kind, tokens, loss in zip(*columns, strict=True):
        own = sums.setdefault(sample, {})
        last = own.get(kind)
        same_step = last is not None and last[0] == step
        own[kind] = (
            step,
            tokens + (last[1] if last is not None and same_step else 0),
            tokens * loss + (last[2] if last is not None and same_step else 0.0),
        )
    unknown = [name for name in ids if record_of(name) not in sums]
    if unknown:
        raise UserError(
            f"{key}={folder}: has no loss of '{unknown[0]}' ({len(unknown):,} of {len(ids):,} samples are "
            "missing). The ledger must be of a run that trained this data for a whole epoch; or score it with a model."
        )
    return Pool(ids, num_tokens, _ledger_losses([sums[record_of(name)] for name in ids]), tools=tools, sources=sources)


def _ledger_losses(rows: Sequence[Mapping[str, tuple[int, int, float]]]) -> dict[str, np.ndarray]:
    losses = {}
    for group, kinds in GROUPS.items():
        names = [kind.name.lower() for kind in kinds]
        found = [[row[name][1:] for name in names if name in row] for row in rows]
        tokens = np.array([sum(count for count, _ in own) for own in found], np.float64)
        nll = np.array([sum(value for _, value in own) for own in found], np.float64)
        losses[group] = mean(nll, tokens)
    losses["overall"] = np.where(np.isnan(losses["overall"]), losses["stop"], losses["overall"])
    return losses


def unique_ids(records: Sequence[str]) -> list[str]:
    """Names of samples from those of their records: a record's second sample gets `#2`, and so on."""
    seen: dict[str, int] = {}
    names = []
    for record in records:
        number = seen[record] = seen.get(record, 0) + 1
        names.append(record if number == 1 else f"{record}#{number}")
    return names


def record_of(name: str) -> str:
    """What `unique_ids` made a name of."""
    record, mark, number = name.rpartition("#")
    return record if mark and number.isdigit() else name
