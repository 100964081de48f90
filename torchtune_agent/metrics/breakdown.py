"""Tables beside `metrics.jsonl`, read back and shown: per tool, per data source, and any that a recipe leaves for the
report. Imports nothing heavy."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

KINDS = ("tool", "source")
_TITLES = {"train": "Training", "val": "Validation"}
_COLUMNS = {"calls": ",.0f", "exact": ".3f", "name_exact": ".3f", "tokens": ",.0f", "loss": ".3f"}
HEAD = ("calls", "exact", "name exact", "tokens", "loss")


def path_of(logs: Path, by: str) -> Path:
    return logs / f"by_{by}.jsonl"


def write_rows(logs: Path, by: str, split: str, rows: Mapping[str, Mapping[str, float]], step: int) -> None:
    """Append a line for every tool or source."""
    lines = [
        json.dumps({"step": step, "split": split, by: name, **row}, ensure_ascii=False) for name, row in rows.items()
    ]
    with path_of(logs, by).open("a", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)


def write_table(logs: Path, name: str, title: str, lines: Sequence[Sequence[str]]) -> None:
    """A table for the report, in the place of the one it had under this name. Its first line is its head."""
    folder = logs / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"title": title, "lines": lines}), encoding="utf-8")


def read_tables(logs: Path) -> list[tuple[str, list[list[str]]]]:
    """Titles and lines of all that `write_table` left."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((logs / "tables").glob("*.json"))]
    return [(table["title"], table["lines"]) for table in found]


def latest(logs: Path, by: str) -> tuple[str, int, dict[str, dict[str, Any]]] | None:
    """The newest table: of validation where there is one, else of training. Its split, its step, its rows by name."""
    try:
        text = path_of(logs, by).read_text(encoding="utf-8")
    except OSError:
        return None
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    split = "val" if any(row["split"] == "val" for row in rows) else "train"
    step = max((row["step"] for row in rows if row["split"] == split), default=0)
    found = {row[by]: row for row in rows if (row["split"], row["step"]) == (split, step)}
    return (split, step, found) if found else None


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row under HEAD."""
    return [f"{row[name]:{spec}}" if name in row else "" for name, spec in _COLUMNS.items()]


def title(by: str, split: str, step: int) -> str:
    return f"{_TITLES[split]} by {by}, step {step:,}"


def as_lines(by: str, rows: Mapping[str, Mapping[str, Any]]) -> list[Sequence[str]]:
    """Head and rows as texts."""
    return [(by, *HEAD), *([name or "(no name)", *cells(row)] for name, row in rows.items())]
