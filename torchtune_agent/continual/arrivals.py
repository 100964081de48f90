"""Records that arrive while a run goes on: from a file or folder that grows, or from an iterable.

A thread reads ahead, `ahead` records at most: then it waits until some are trained, and with it whoever makes them.
Every record comes with the position after it, so that a run that is resumed goes on with the record after the last it
has trained.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torchtune_agent.data.json_text import parse_line
from torchtune_agent.data.reasons import BadRecord
from torchtune_agent.errors import UserError

Position = dict[str, int]  # of every file, the bytes that were read; of an iterable, its records


@dataclass(frozen=True)
class Arrival:
    where: str  # file:byte, or iterable[index]
    data: Mapping[str, Any]
    position: Position  # after it
    problem: BadRecord | None = None


class Origin(Protocol):
    def records(self, position: Position) -> Iterator[Arrival | None]:
        """Records from `position` on; None where there is none just now."""
        ...


@dataclass(frozen=True)
class GrowingFiles:
    """JSON Lines that are appended to a file, or to files of a folder, also new ones. A line counts when it has its
    end. Files are read in the order of their names, each as far as it goes."""

    path: Path

    def records(self, position: Position) -> Iterator[Arrival | None]:
        position = dict(position)
        while True:
            for file in self._files():
                yield from self._lines(file, position)
            yield None

    def _files(self) -> list[Path]:
        return sorted(self.path.glob("*.jsonl")) if self.path.is_dir() else [self.path]

    @staticmethod
    def _lines(file: Path, position: Position) -> Iterator[Arrival]:
        start = position.get(file.name, 0)
        try:
            with file.open("rb") as content:
                content.seek(start)
                while (line := content.readline()).endswith(b"\n"):
                    where, start = f"{file.name}:byte {start}", start + len(line)
                    position[file.name] = start
                    if line.strip():
                        yield _parsed(where, line, dict(position))
        except FileNotFoundError:
            return  # it has not begun yet


def _parsed(where: str, line: bytes, position: Position) -> Arrival:
    try:
        return Arrival(where, parse_line(line, last=False), position)
    except BadRecord as problem:
        return Arrival(where, {}, position, problem)


@dataclass(frozen=True)
class FromIterable:
    """What `make` returns, which is made again when a run is resumed: the records that were trained are passed over."""

    make: Callable[[], Iterable[Mapping[str, Any]]]
    name: str

    def records(self, position: Position) -> Iterator[Arrival | None]:
        for number, record in enumerate(self.make()):
            if number >= position.get(self.name, 0):
                problem = None
                if not isinstance(record, Mapping):
                    problem = BadRecord("wrong_type", f"expected an object, found {type(record).__name__}")
                data = {} if problem else dict(record)
                yield Arrival(f"{self.name}[{number}]", data, {self.name: number + 1}, problem)


class Reader:
    """Reads ahead in a thread.

    Args:
        origin: of the records.
        ahead: the most records that are read and not taken.
        poll_seconds: between two looks at files that had nothing new.
    """

    def __init__(self, origin: Origin, *, ahead: int, poll_seconds: float) -> None:
        self._origin, self._poll_seconds = origin, poll_seconds
        self._queue: queue.Queue[Arrival | BaseException | None] = queue.Queue(ahead)
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self.has_ended = False  # nothing will come any more

    def start(self, position: Position) -> None:
        self._thread = threading.Thread(target=self._read, args=(position,), name="arrivals", daemon=True)
        self._thread.start()

    def _read(self, position: Position) -> None:
        try:
            for arrival in self._origin.records(position):
                if arrival is None:
                    self._end.wait(self._poll_seconds)
                elif not self._put(arrival):
                    return
                if self._end.is_set():
                    return
            self._put(None)
        except BaseException as error:  # raised where records are taken
            self._put(error)

    def _put(self, item: Arrival | BaseException | None) -> bool:
        while not self._end.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def take(self, most: int, seconds: float) -> list[Arrival]:
        """Up to `most` records, as soon as there are so many or `seconds` have passed."""
        deadline, taken = time.monotonic() + seconds, []
        while len(taken) < most and not self.has_ended:
            try:
                item = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if item is None:
                self.has_ended = True
            elif isinstance(item, BaseException):
                raise UserError(f"arrivals: reading failed: {type(item).__name__}: {item}.") from item
            else:
                taken.append(item)
        return taken

    def close(self) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
