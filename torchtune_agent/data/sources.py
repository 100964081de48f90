"""Where records come from: JSON Lines, JSON and Parquet files, lists in memory, or a dataset by name.

JSON is parsed here and not by Arrow, which pads missing argument keys and turns date-like strings into dates.
What cannot be read is handed on as such, with its place, and never ends the reading.
"""

import glob
import gzip
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torchtune_agent.data.json_text import check_depth, check_texts, loads, parse_line
from torchtune_agent.data.reasons import BadRecord
from torchtune_agent.errors import UserError

_SUFFIXES = (".jsonl", ".json", ".traj", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")


@dataclass(frozen=True)
class Record:
    """`data`, or the problem that kept it from being read. `excerpt` is the beginning of its text where it has one."""

    where: str  # "file:line" or "source[index]"
    data: Mapping[str, Any]
    problem: BadRecord | None = None
    excerpt: str = ""


def read_records(
    source: str | Sequence[Mapping[str, Any]],
    data_files: str | Sequence[str] | None = None,
    split: str = "train",
    options: Mapping[str, Any] | None = None,
) -> Iterator[Record]:
    """Every record of `source`: "json" reads `data_files`; a sequence is taken as it is; any other name is loaded
    with `datasets.load_dataset(source, split=split, **options)`."""
    if not isinstance(source, str):
        yield from _checked((f"record {i}", data) for i, data in enumerate(source))
    elif source == "json":
        if options:
            raise UserError("dataset.load_dataset_kwargs: cannot be used with source=json.")
        for path in expand(data_files):
            yield from _read_file(path)
    else:
        from datasets import load_dataset

        rows = load_dataset(source, data_files=data_files, split=split, **(options or {}))
        yield from _checked((f"{source}[{i}]", row) for i, row in enumerate(rows))  # pyright: ignore


def expand(data_files: str | Sequence[str] | None) -> list[Path]:
    """The files that paths, globs and directories stand for, each pattern's in order of name."""
    if not data_files:
        raise UserError("dataset.data_files: not given. Name one or more files (globs and folders are allowed).")
    paths: list[Path] = []
    for pattern in [data_files] if isinstance(data_files, str) else data_files:
        found = [Path(pattern)] if Path(pattern).exists() else [Path(p) for p in glob.glob(pattern, recursive=True)]
        folders = [path for path in found if path.is_dir()]
        inside = [p for folder in folders for p in folder.rglob("*") if p.name.endswith(_SUFFIXES) and p.is_file()]
        files = sorted({*(path for path in found if not path.is_dir()), *inside})
        if not files:
            raise UserError(f"dataset.data_files: no file '{pattern}' (looked from {Path.cwd()}). Check the path.")
        paths.extend(files)
    return paths


def _read_file(path: Path) -> Iterator[Record]:
    empty = True
    try:
        for record in _records_of(path):
            empty = False
            yield record
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"dataset.data_files: cannot read {path}: {reason}.") from error
    if empty:
        raise UserError(f"dataset.data_files: {path} has no records. Each line must be one JSON object.")


def _records_of(path: Path) -> Iterator[Record]:
    if path.suffix == ".parquet":
        yield from _checked(_parquet_rows(path))
        return
    if path.name.endswith((".json", ".json.gz", ".json.zst", ".traj")):
        with _open(path) as file:
            whole = _whole_document(file.read())
        if whole is not None:
            yield from _checked((f"{path}[{i}]", row) for i, row in enumerate(whole))
            return
    with _open(path) as file:
        yield from _lines(path, file)


def _open(path: Path) -> AbstractContextManager[IO[bytes]]:
    if path.suffix == ".gz":
        return gzip.open(path)  # pyright: ignore[reportReturnType]
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise UserError(f"dataset.data_files: reading {path} needs `pip install torchtune-agent[zstd]`.") from error
        return io.BufferedReader(zstandard.open(path, "rb"))  # pyright: ignore  (it has no lines of its own)
    return path.open("rb")


def _lines(path: Path, file: IO[bytes]) -> Iterator[Record]:
    """Records of a JSON Lines file; blank lines are none. A line is known to be the last only once no other came."""
    waiting: tuple[int, bytes] | None = None
    for number, line in enumerate(file, start=1):
        if line.strip():
            if waiting is not None:
                yield _line(path, *waiting, last=False)
            waiting = (number, line)
    if waiting is not None:
        yield _line(path, *waiting, last=True)


def _line(path: Path, number: int, line: bytes, *, last: bool) -> Record:
    where, excerpt = f"{path}:{number}", line[:400].decode("utf-8", "replace").strip()
    try:
        return Record(where, parse_line(line, last=last, first=number == 1), excerpt=excerpt)
    except BadRecord as problem:
        return Record(where, {}, problem, excerpt)


def _whole_document(content: bytes) -> list[Any] | None:
    """The records of a file that is one JSON document; None where it is not (then it is read line by line)."""
    try:
        value = loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    if isinstance(value, list) and value and all(isinstance(row, dict) and "role" in row for row in value):
        return [{"messages": value}]  # one conversation
    return value if isinstance(value, list) else [value]


def _checked(rows: Iterator[tuple[str, Any]]) -> Iterator[Record]:
    """Records that did not come through `parse_line`, held to the same rules."""
    for where, row in rows:
        try:
            if not isinstance(row, Mapping):
                raise BadRecord("wrong_type", f"expected an object, found {type(row).__name__}")
            check_depth(row)
            check_texts(row)
            yield Record(where, row)
        except BadRecord as problem:
            yield Record(where, {}, problem, str(row)[:400])


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield f"{path}[{number}]", row
                number += 1
    except pyarrow.ArrowException as error:
        raise UserError(f"dataset.data_files: cannot read {path} as Parquet: {error}.") from error
