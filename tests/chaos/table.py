"""What was tried, and what survived it: the table that a chaos run ends in."""

import json
import shutil
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path


class NotTried(Exception):
    """This machine does not allow it; says why."""


@dataclass
class Row:
    """One kind of fault."""

    fault: str
    tried: int = 0
    survived: int = 0
    problems: list[str] = field(default_factory=list)
    not_tried: list[str] = field(default_factory=list)


class Table:
    """Counts trials by their fault. Trials run in several threads."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self._lock = threading.Lock()
        self._started = time.monotonic()

    @contextmanager
    def trial(self, fault: str, folder: Path | None = None, *, quiet: bool = False) -> Iterator[None]:
        """One trial, survived unless an exception leaves it. Its folder is kept only where it did not survive."""
        problem = reason = None
        try:
            yield
        except NotTried as error:
            reason = str(error)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"{error or place.line} ({type(error).__name__}, {Path(place.filename).name}:{place.lineno})"
            problem += f"; see {folder}" if folder else ""
        if folder is not None and problem is None:
            shutil.rmtree(folder, ignore_errors=True)
        with self._lock:
            row = self.rows.setdefault(fault, Row(fault))
            if reason is not None:
                row.not_tried.append(reason)
                return
            row.tried += 1
            row.survived += problem is None
            if problem is not None:
                row.problems.append(problem)
        if problem is not None or not quiet:
            seconds = time.monotonic() - self._started
            print(f"{seconds:6.0f} s  {'ok  ' if problem is None else 'FAIL'}  {fault}", flush=True)
        if problem is not None:
            print("\n".join(f"            {line}" for line in problem.splitlines()), flush=True)

    @property
    def all_survived(self) -> bool:
        return bool(self.rows) and all(row.survived == row.tried for row in self.rows.values())

    def text(self) -> str:
        """The table in Markdown."""
        lines = ["| Fault | Tried | Survived |", "|---|---:|---:|"]
        for row in self.rows.values():
            tried = f"not tried: {row.not_tried[0]}" if row.not_tried and not row.tried else f"{row.tried:,}"
            lines.append(f"| {row.fault} | {tried} | {row.survived:,} |")
        tried, survived = (sum(getattr(row, name) for row in self.rows.values()) for name in ("tried", "survived"))
        return "\n".join([*lines, f"| **all** | {tried:,} | {survived:,} |"])

    def to_json(self) -> str:
        return json.dumps([asdict(row) for row in self.rows.values()], indent=1)
