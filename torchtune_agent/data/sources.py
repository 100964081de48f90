"""Where records come from: JSON Lines, JSON and Parquet files, lists in memory, or a dataset by name.

JSON is parsed here and not by Arrow, which pads missing argument keys and turns date-like strings into dates.
Sources are read in blocks of about a megabyte, so that files may be larger than memory, and a block is parsed where
it is used, so that several processes can share the work. What cannot be read is handed on as such, with its place,
and never ends the reading.
"""

import gzip
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from glob import glob
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from torchtune_agent.data import fingerprint
from torchtune_agent.data.json_text import MAX_LINE_BYTES, check_depth, check_texts, loads, parse_line, parse_list
from torchtune_agent.data.reasons import BadRecord
from torchtune_agent.errors import UserError

_SUFFIXES = (".jsonl", ".json", ".traj", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")
_BLOCK_BYTES = 1 << 20
_BLOCK_ROWS = 256
_EXCERPT = 400


@dataclass(frozen=True)
class Record:
    """`data`, or the problem that kept it from being read. `excerpt` is the beginning of its text where it has one."""

    where: str  # "file:line" or "source[index]"
    data: Mapping[str, Any]
    problem: BadRecord | None = None
    excerpt: str = ""
    number: int = 0  # the line or index in `where`


@dataclass(frozen=True)
class Lines:
    """Lines of a JSON Lines file, from line `first`; `size` is what was read of the file to make them."""

    source: str
    first: int
    content: bytes
    size: int = 0
    ends_file: bool = False  # no other record follows, so the last may have been cut off

    def records(self) -> Iterator[Record]:
        # Only \n ends a line: str.splitlines would split at U+2028 inside texts.
        lines = [(n, line) for n, line in enumerate(io.BytesIO(self.content), self.first) if line.strip()]
        for i, (number, line) in enumerate(lines, start=1):
            where, excerpt = place(self.source, number, True), line[:_EXCERPT].decode("utf-8", "replace").strip()
            try:
                data = parse_line(line, last=self.ends_file and i == len(lines), first=number == 1)
                yield Record(where, data, excerpt=excerpt, number=number)
            except BadRecord as problem:
                yield Record(where, {}, problem, excerpt, number)


@dataclass(frozen=True)
class Rows:
    """Rows of anything else, held to the same rules; a BadRecord stands for itself."""

    source: str
    first: int
    content: list[Any]
    size: int = 0

    def records(self) -> Iterator[Record]:
        for number, row in enumerate(self.content, self.first):
            where = place(self.source, number, False)
            try:
                if isinstance(row, BadRecord):
                    raise row
                if not isinstance(row, Mapping):
                    raise BadRecord("wrong_type", f"expected an object, found {type(row).__name__}")
                check_depth(row)
                check_texts(row)
                yield Record(where, row, number=number)
            except BadRecord as problem:
                yield Record(where, {}, problem, "" if row is problem else str(row)[:_EXCERPT], number)


Block = Lines | Rows  # some records of one source, not parsed yet


def place(source: str, number: int, is_line: bool) -> str:
    """How a record is called."""
    return f"{source}:{number}" if is_line else f"{source}[{number}]"


@dataclass
class Source:
    """Records to read: "json" reads `data_files`; a sequence is taken as it is; any other name is loaded with
    `datasets.load_dataset(name, split=split, **options)`."""

    name: str | Sequence[Mapping[str, Any]]
    data_files: str | Sequence[str] | None = None
    split: str = "train"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.files: list[Path] | None = None
        if self.name == "json":
            if self.options:
                raise UserError("dataset.load_dataset_kwargs: cannot be used with source=json.")
            self.files = expand(self.data_files)

    @property
    def num_bytes(self) -> int | None:
        """The size of all files, where it is files that are read."""
        return None if self.files is None else sum(path.stat().st_size for path in self.files)

    def blocks(self) -> Iterator[Block]:
        if self.files is not None:
            for path in self.files:
                yield from _file_blocks(path)
        else:
            yield from _row_blocks(self.name if isinstance(self.name, str) else "record", self._rows)

    @cached_property
    def _rows(self) -> Any:
        if not isinstance(self.name, str):
            return self.name
        from datasets import load_dataset

        try:
            return load_dataset(self.name, data_files=self.data_files, split=self.split, **self.options)
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise UserError(
                f"dataset.source={self.name}: cannot be loaded: {reason}. Check the name, the split and the network, "
                "or name files instead: source=json with data_files."
            ) from error

    def fingerprint(self, memory: Path) -> Any:
        """Of all that is read, see `fingerprint.of_file`."""
        if self.files is not None:
            return [[str(path), fingerprint.of_file(path, memory)] for path in self.files]
        if isinstance(self.name, str) and hasattr(self._rows, "_fingerprint"):
            return [self.name, self._rows._fingerprint]
        raise fingerprint.Unknown("records in memory")

    def records(self) -> Iterator[Record]:
        for block in self.blocks():
            yield from block.records()


def read_records(
    source: str | Sequence[Mapping[str, Any]],
    data_files: str | Sequence[str] | None = None,
    split: str = "train",
    options: Mapping[str, Any] | None = None,
) -> Iterator[Record]:
    """Every record of a `Source`."""
    return Source(source, data_files, split, options or {}).records()


def expand(data_files: str | Sequence[str] | None) -> list[Path]:
    """The files that paths, globs and directories stand for, each pattern's in order of name."""
    if not data_files:
        raise UserError("dataset.data_files: not given. Name one or more files (globs and folders are allowed).")
    paths: list[Path] = []
    for pattern in [data_files] if isinstance(data_files, str) else data_files:
        found = [Path(pattern)] if Path(pattern).exists() else [Path(p) for p in glob(pattern, recursive=True)]
        folders = [path for path in found if path.is_dir()]
        inside = [p for folder in folders for p in folder.rglob("*") if p.name.endswith(_SUFFIXES) and p.is_file()]
        files = sorted({*(path for path in found if not path.is_dir()), *inside})
        if not files:
            raise UserError(f"dataset.data_files: no file '{pattern}' (looked from {Path.cwd()}). Check the path.")
        paths.extend(files)
    return paths


def _file_blocks(path: Path) -> Iterator[Block]:
    empty = True
    try:
        with path.open("rb") as file:
            read = 0
            for block in _reader(path)(path, file):
                empty = False
                yield replace(block, size=file.tell() - read)
                read = file.tell()
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"dataset.data_files: cannot read {path}: {reason}.") from error
    if empty:
        raise UserError(f"dataset.data_files: {path} has no records. Each line must be one JSON object.")


def _reader(path: Path) -> Callable[[Path, IO[bytes]], Iterator[Lines | Rows]]:
    if path.suffix == ".parquet":
        return _parquet_blocks
    is_json = path.name.endswith((".json", ".json.gz", ".json.zst", ".traj"))
    return _json_blocks if is_json else _line_blocks


def _decompressed(path: Path, file: IO[bytes]) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(file)  # pyright: ignore[reportReturnType]
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise UserError(f"dataset.data_files: reading {path} needs `pip install torchtune-agent[zstd]`.") from error
        return io.BufferedReader(zstandard.open(file, "rb"))  # pyright: ignore  (it has no lines of its own)
    return file


def _line_blocks(path: Path, file: IO[bytes]) -> Iterator[Lines]:
    """Blank blocks are left out. A block is known to end the file only once no other came."""
    file = _decompressed(path, file)
    waiting: Lines | None = None
    number = 1
    while content := file.read(_BLOCK_BYTES):
        if not content.endswith(b"\n"):
            content += _rest_of_line(file)
        if content.strip():
            if waiting is not None:
                yield waiting
            waiting = Lines(str(path), number, content)
        number += content.count(b"\n")
    if waiting is not None:
        yield replace(waiting, ends_file=True)


def _rest_of_line(file: IO[bytes]) -> bytes:
    """Of a line longer than any that is read, just enough to see that."""
    rest = file.readline(MAX_LINE_BYTES)
    if len(rest) < MAX_LINE_BYTES or rest.endswith(b"\n"):
        return rest
    while (more := file.readline(_BLOCK_BYTES)) and not more.endswith(b"\n"):
        pass
    return rest + b"\n"


def _json_blocks(path: Path, file: IO[bytes]) -> Iterator[Lines | Rows]:
    """A file that is one JSON document: a list of records, one record, or the messages of one. Where it is neither, it
    is read as JSON Lines."""
    opened = _decompressed(path, file)
    start = opened.read(_BLOCK_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    opened.seek(0)
    if start.startswith(b"["):
        rows = parse_list(opened, str(path))
        head = list(islice(rows, _BLOCK_ROWS))
        if head and all(isinstance(row, dict) and "role" in row for row in head):
            yield Rows(str(path), 0, [{"messages": [*head, *rows]}])
        else:
            yield from _row_blocks(str(path), chain(head, rows))
        return
    whole = None if isinstance(_document(start.partition(b"\n")[0]), dict) else _document(opened.read())
    if whole is not None:
        yield Rows(str(path), 0, [whole])
        return
    file.seek(0)
    yield from _line_blocks(path, file)


def _document(content: bytes) -> Any:
    try:
        return loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _row_blocks(source: str, rows: Iterable[Any]) -> Iterator[Rows]:
    rows, first = iter(rows), 0
    while block := list(islice(rows, _BLOCK_ROWS)):
        yield Rows(source, first, block)
        first += len(block)


def _parquet_blocks(path: Path, file: IO[bytes]) -> Iterator[Rows]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        batches = ParquetFile(file).iter_batches(batch_size=_BLOCK_ROWS)  # pyright: ignore[reportArgumentType]
        yield from _row_blocks(str(path), (row for batch in batches for row in batch.to_pylist()))
    except pyarrow.ArrowException as error:
        raise UserError(f"dataset.data_files: cannot read {path} as Parquet: {error}.") from error
