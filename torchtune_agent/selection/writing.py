"""What a selection leaves behind: `selection.json` and the page that shows it, and reading the former again."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchtune_agent.errors import UserError
from torchtune_agent.selection.page import render
from torchtune_agent.selection.selecting import Selection

SELECTION = "selection.json"


def write_selection(
    selection: Selection,
    folder: Path,
    text: Callable[[int], str] | None = None,
    made_of: Mapping[str, Any] | None = None,
) -> tuple[Path, Path]:
    """Write `selection.json` and `selection.html`; `text` gives what a row of the pool reads like, `made_of` is what
    the selection follows from."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen, page = folder / SELECTION, folder / "selection.html"
    _write(page, render(selection, text))
    content = selection.to_json() | {"made_of": made_of}
    _write(chosen, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False))
    return chosen, page


def read_made_of(path: Path) -> Any:
    """What the selection in `path` follows from; None where it cannot be told."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("made_of")
    except (OSError, ValueError, AttributeError):
        return None


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
