"""Being asked to stop: SIGTERM and SIGUSR1, which schedulers send before they take a machine away.

A run that is asked finishes its step, saves, and ends with EXIT_STOPPED. Before the first step there is nothing to
save, so it ends at once. Asking again changes nothing.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: a run that was stopped, and goes on when it is started again
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(SystemExit):
    """The run was asked to stop, and does. Where every rank ends here (`together`), they can part in order."""

    def __init__(self, *, together: bool = False) -> None:
        super().__init__(EXIT_STOPPED)
        self.together = together


class StopRequest:
    """Whether this process was asked to stop, and by what."""

    def __init__(self) -> None:
        self.by: str | None = None
        self._has_started = False

    def start(self) -> None:
        """From here on there is something to save: the training loop looks for requests itself."""
        self._has_started = True
        if self.by is not None:  # it came where an exception was swallowed
            raise Stopped()

    def ask(self, by: str) -> None:
        self.by = self.by or by

    @property
    def ends_start(self) -> bool:
        """Whether whatever goes wrong now does so because the run ends before it began."""
        return self.by is not None and not self._has_started

    def handle(self, number: int, frame: FrameType | None) -> None:
        is_first = self.by is None
        self.ask(signal.Signals(number).name)
        if is_first and not self._has_started:
            raise Stopped()


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Hear the signals meanwhile. After one was heard they stay without effect, so that a second cannot disturb the
    end of the process."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to no other
        yield request
        return
    before = {number: signal.signal(number, request.handle) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if request.by is not None else handler)
