"""Where records come from: JSON Lines files, lists in memory, or a dataset by name through `datasets`.

Files are parsed here and not by Arrow, which pads missing argument keys and turns date-like strings into
dates. A line that cannot be read stops the run before its first step, with the file and line.
"""

import glob
import json
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtune_agent.errors import UserError


@dataclass(frozen=True)
class Record:
    where: str  # "file:line" or "source[index]", for error messages
    data: Mapping[str, Any]


def read_records(
    source: str | Sequence[Mapping[str, Any]], data_files: str | Sequence[str] | None, split: str, **options: Any
) -> Iterator[Record]:
    """Every record of `source`: "json" reads `data_files`; a sequence is taken as it is; any other name is loaded
    with `datasets.load_dataset(source, split=split, **options)`."""
    if not isinstance(source, str):
        yield from (Record(f"record {i}", data) for i, data in enumerate(source))
    elif source == "json":
        if options:
            raise UserError(f"dataset: {', '.join(options)} cannot be used with source=json.")
        for path in _expand(data_files):
            yield from _read_file(path)
    else:
        from datasets import load_dataset

        rows = load_dataset(source, data_files=data_files, split=split, **options)
        yield from (Record(f"{source}[{i}]", row) for i, row in enumerate(rows))  # pyright: ignore


def _expand(data_files: str | Sequence[str] | None) -> list[Path]:
    if not data_files:
        raise UserError("dataset.data_files: not given. Name one or more JSON Lines files (globs are allowed).")
    patterns = [data_files] if isinstance(data_files, str) else list(data_files)
    paths: list[Path] = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise UserError(f"dataset.data_files: no file '{pattern}' (looked from {Path.cwd()}). Check the path.")
        paths.extend(Path(name) for name in found)
    return paths


def _read_file(path: Path) -> Iterator[Record]:
    try:
        with path.open("rb") as file:
            if path.suffix == ".json" and _first_byte(path) == b"[":
                yield from _read_array(path, file.read())
                return
            count = 0
            for number, line in enumerate(file, start=1):
                if line.strip():
                    count += 1
                    yield Record(f"{path}:{number}", _parse(line, f"{path}:{number}"))
    except OSError as error:
        raise UserError(f"dataset.data_files: cannot read {path}: {error.strerror}.") from error
    if count == 0:
        raise UserError(
            f"dataset.data_files: {path} has no records. Each line must be one JSON object with 'messages'."
        )


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1024).removeprefix(BOM_UTF8).lstrip()[:1]


def _read_array(path: Path, content: bytes) -> Iterator[Record]:
    rows = _loads(content, str(path))
    if not rows:
        raise UserError(f"dataset.data_files: {path} is an empty list.")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}[{index}]: expected an object with 'messages', found {type(row).__name__}.")
        yield Record(f"{path}[{index}]", row)


def _parse(line: bytes, where: str) -> dict[str, Any]:
    row = _loads(line, where)
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object with 'messages', found {type(row).__name__}.")
    return row


def _loads(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start}). Save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        excerpt = content[:60].decode("utf-8", "replace").strip()
        raise UserError(
            f"{where}: not JSON ({error}). Expected one JSON object per line, found: {excerpt!r}"
        ) from error
