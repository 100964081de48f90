"""When one rank dies, hangs or raises, all end soon, and one of them says why.

Every rank has a thread that writes to the store, once a second, which step the rank is at and which line it is in. So
those who are left waiting can tell who did not come, and from where. The first rank to know the cause claims the right
to say it; the others, whose errors only follow from it, end in silence.
"""

import json
import os
import re
import socket
import sys
import sysconfig
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torchtune_agent.distributed import SharedNotes
from torchtune_agent.training.notes import Note
from torchtune_agent.training.signals import StopRequest

_PACKAGE = Path(__file__).parent.parent
_LIBRARIES = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
_PATIENCE = 5.0  # seconds: for others to report, and for the main thread to end after another rank has failed
# What gloo and NCCL say when another process is gone, or does not come.
_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|socket closed|remote process exited|nccl communicator was aborted",
    re.I,
)
_LATE = re.compile(r"timed out|timeout", re.I)


@dataclass
class Peer:
    """What another rank last wrote."""

    rank: int
    step: int
    line: str
    state: str  # training, waiting, failed, ended, stopped (before its first step, and alone)
    pid: int
    machine: str
    beat: int
    seen: float = 0.0  # when that was new here

    @property
    def is_dead(self) -> bool:
        """Only a process on this machine can be known to be."""
        if self.machine != _machine() or self.state in ("failed", "ended", "stopped"):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False

    def __str__(self) -> str:
        silent = time.monotonic() - self.seen
        pause = f", no sign of life for {silent:.0f} s" if silent > 3 * _PATIENCE else ""
        return f"rank {self.rank} (pid {self.pid}) is at step {self.step}, in {self.line}{pause}"


class Watch:
    """Watches over all ranks from one of them, from `__enter__` on."""

    def __init__(self, rank: int, size: int, request: StopRequest, timeout: float) -> None:
        self.step = 0
        self.note = Note(rank)
        self._rank, self._size, self._timeout = rank, size, timeout
        self._request = request
        self._state = "training"
        self._beat = 0
        self._peers: dict[int, Peer] = {}
        self._ticks = 0
        self._moved = (0, time.monotonic())  # of all ranks together: a sum that changes, and when it last did
        self._end = threading.Event()
        self._main = threading.get_ident()
        self._parent = os.getppid()
        self._board = SharedNotes("watch") if size > 1 else None
        self._store_is_gone = False  # with the process that kept it; each try would make torch print a long warning

    def __enter__(self) -> "Watch":
        if self._board is not None:
            self._publish()
            threading.Thread(target=self._run, name="watch", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end.set()

    def at(self, step: int) -> None:
        """This rank begins `step` with its data, or a batch of the validation after it."""
        self._ticks += 1
        self.step = step
        self.note.write(step=step, state="training")

    def end(self, state: str) -> None:
        """This rank is done, and its process will be gone: `stopped`, `ended` or `failed`."""
        self._state = "failed" if state == "failed" else "ended"
        self.note.write(state=state)
        self._try_to_publish()

    def stop_alone(self) -> None:
        """This rank was asked to stop before its first step. The others may not have been: they are told, and are
        given the time to hear it before they lose this one."""
        self._state = "stopped"
        self.note.write(state="stopped")
        self._try_to_publish()
        if self._board is not None:
            self._find(lambda peer: peer.state == "training" and not peer.is_dead)

    @property
    def others_stop(self) -> bool:
        """Whether another rank was asked to stop before its first step, from which everything else now follows."""
        return any(peer.state == "stopped" for peer in self._peers.values())

    def claims_saying(self) -> bool:
        """Whether this rank is to say why the run ends: true for one rank of all."""
        try:
            is_first = self._board is None or self._board.claim("said")
        except RuntimeError:  # nobody to ask: said twice is better than not at all
            is_first = True
        if is_first:
            self.note.write(said=True)
        return is_first

    def cause(self, error: BaseException) -> str | None:
        """Why the run ends, as `error` shows it; None where another rank or the launcher says it."""
        text = f"{type(error).__name__}: {error}"
        details = "".join(traceback.format_exception(error))
        if self._board is not None and (_LATE.search(text) or _LOST.search(text)):
            self._state = "waiting"
            self._try_to_publish()
            late = self._find(lambda peer: peer.state == "training")
            dead = [peer for peer in late if peer.is_dead]
            if any(peer.state == "failed" for peer in self._peers.values()):
                return None
            if dead:
                if self.note.has_reader and all(peer.machine == _machine() for peer in dead):
                    return None  # the launcher knows more: which signal it was
                text, details = "; ".join(f"{peer}, and has died" for peer in dead), ""
            elif late and _LATE.search(text):
                text, details = self._who_is_late(late), ""
            else:
                text = f"rank {self._rank} at step {self.step}: lost the others: {text}"
        else:
            text = f"rank {self._rank} at step {self.step}: {text}"
        self.end("failed")
        return f"{text}\n{details}".rstrip() if self.claims_saying() else None

    def _who_is_late(self, late: list[Peer]) -> str:
        return (
            f"{'; '.join(map(str, late))}, and did not come: the others waited {self._timeout:g} s for it at step "
            f"{self.step} (process_group_timeout_seconds)"
        )

    def _find(self, condition: Any) -> list[Peer]:
        """The others for whom `condition` still holds when none is left, one has died or failed, or time is up."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                if not self._store_is_gone:
                    self._look()
            except RuntimeError:
                self._store_is_gone = True
            found = [peer for peer in self._peers.values() if condition(peer)]
            ended = any(peer.is_dead or peer.state == "failed" for peer in self._peers.values())
            if not found or ended or time.monotonic() > deadline:
                return found
            time.sleep(0.1)

    def _publish(self) -> None:
        self._beat += 1
        assert self._board is not None
        mine = [self._rank, self.step, self._line(), self._state, os.getpid(), _machine(), self._beat + self._ticks]
        self._board.write(self._rank, json.dumps([*mine, self._ticks]))

    def _try_to_publish(self) -> None:
        try:
            if self._board is not None and not self._store_is_gone:
                self._publish()
        except RuntimeError:
            self._store_is_gone = True

    def _look(self) -> None:
        """Read what the others wrote."""
        assert self._board is not None
        ticks = self._ticks
        for text in self._board.read_others(self._rank, self._size):
            *values, others = json.loads(text)
            ticks += others
            peer = Peer(*values, seen=time.monotonic())
            known = self._peers.get(peer.rank)
            if known is not None and known.beat == peer.beat:
                peer.seen = known.seen
            self._peers[peer.rank] = peer
        if ticks != self._moved[0]:
            self._moved = (ticks, time.monotonic())

    def _line(self) -> str:
        """The innermost line of ours or the user's that the main thread is in."""
        frame = sys._current_frames().get(self._main)
        while frame is not None:
            path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
            if _PACKAGE in path.parents:
                return f"{path.relative_to(_PACKAGE)}:{frame.f_lineno} ({name})"
            if path.is_absolute() and not any(library in path.parents for library in _LIBRARIES):
                return f"{path}:{frame.f_lineno} ({name})"
            frame = frame.f_back
        return "code that is not ours"

    def _run(self) -> None:
        interval = max(1.0, self._size / 64)
        trouble: float | None = None
        while not self._end.wait(interval):
            if os.getppid() != self._parent:  # nobody is left to end this process
                self._request.ask("the end of its launcher")
            try:
                if not self._store_is_gone:
                    self._publish()
                    self._look()
            except RuntimeError:
                self._store_is_gone = True
            if self.others_stop:
                self._request.ask("another rank")
            if any(peer.state == "failed" or peer.is_dead for peer in self._peers.values()):
                trouble = trouble or time.monotonic()
                if time.monotonic() - trouble > _PATIENCE:
                    self._leave()
            self._warn_of_stall()

    def _leave(self) -> None:
        """The main thread waits for a rank that will not come. NCCL would have it wait for as long as its timeout."""
        dead = [peer for peer in self._peers.values() if peer.is_dead]
        if dead and not self.note.has_reader and self.claims_saying():
            print(f"\nerror: {'; '.join(f'{peer}, and has died' for peer in dead)}", file=sys.stderr, flush=True)
        self.note.write(state="failed")
        os._exit(1)

    def _warn_of_stall(self) -> None:
        """Say who is where when nothing moves, well before the timeout ends the run."""
        ticks, since = self._moved
        if self._rank != 0 or self.step == 0 or time.monotonic() - since < self._timeout / 2:
            return
        self._moved = (ticks, float("inf"))  # once
        me = f"rank 0 is at step {self.step}, in {self._line()}"
        print(
            f"\nwarning: no rank has begun a step or a batch for {self._timeout / 2:g} s:\n  "
            + "\n  ".join([me, *(str(peer) for _, peer in sorted(self._peers.items()))]),
            file=sys.stderr,
            flush=True,
        )


def _machine() -> str:
    """Process ids mean the same where this is the same."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {os.readlink(namespace) if namespace.exists() else ''}"
