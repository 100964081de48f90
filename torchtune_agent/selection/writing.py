"""What a selection leaves behind: `selection.json` and the page that shows it, and reading the former again."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchtune_agent.errors import UserError
from torchtune_agent.selection.page import render
from torchtune_agent.selection.selecting import Selection


def write_selection(selection: Selection, folder: Path, text: Callable[[int], str] | None = None) -> tuple[Path, Path]:
    """Write `selection.json` and `selection.html`; `text` gives what a row of the pool reads like."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen, page = folder / "selection.json", folder / "selection.html"
    _write(chosen, json.dumps(selection.to_json(), indent=1, ensure_ascii=False, allow_nan=False))
    _write(page, render(selection, text))
    return chosen, page


def _write(path: Path, content: str) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(content, encoding="utf-8", errors="backslashreplace")
    partial.replace(path)  # a file that is there is complete


def read_rows(path: Path, ids: Sequence[str]) -> np.ndarray:
    """The rows that the selection in `path` picked, of a pool whose samples are `ids`, ascending."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        names = [one["id"] for one in found["selected"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as a selection ({error}). Delete it and select again.") from error
    row_of = {name: row for row, name in enumerate(ids)}
    unknown = [name for name in names if name not in row_of]
    if unknown:
        raise UserError(
            f"{path}: selected '{unknown[0]}', which the data does not have ({len(unknown):,} of {len(names):,} are "
            "missing). Use the data it was selected from, or select again."
        )
    return np.array(sorted(row_of[name] for name in names), np.int64)
