"""A file of rows that a full disk cannot spoil, nor end a run: what could not be written is kept and tried again."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MOST_WAITING = 16 << 20  # bytes that are kept while nothing can be written


class RowFile:
    """Appends JSON Lines to `path`. Every row is written out at once, whole: a row is never half in the file when the
    next begins, whatever failed in between."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._waiting = bytearray()
        self._num_lost = 0
        self._failing = False

    def write(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(row).encode() + b"\n"
        if len(self._waiting) + len(line) > _MOST_WAITING:
            self._num_lost += 1
        else:
            self._waiting += line
        self._write_out()

    def _write_out(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
        except OSError as error:
            if not self._failing:
                _warn(f"{self.path} cannot be written: {error.strerror}. Training goes on; rows wait in memory.")
            self._failing = True
            return
        if self._failing:
            _warn(f"{self.path} can be written again.")
        self._failing = False

    def close(self) -> None:
        self._write_out()
        num_waiting = self._waiting.count(b"\n")
        if num_waiting or self._num_lost:
            _warn(f"{num_waiting + self._num_lost:,} rows are not in {self.path}.")
        try:
            self._file.close()
        except OSError as error:  # a network folder may say only now that it is full
            _warn(f"{self.path}: {error.strerror}.")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def drop_unfinished_line(path: Path) -> None:
    """A run that was killed may have left half a row, which the next one would spoil."""
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            file.seek(end - 1)
            if file.read(1) == b"\n":
                break
            end -= 1
        file.truncate(end)
