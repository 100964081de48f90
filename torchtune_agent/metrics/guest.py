"""The user's metric logger, in a thread of its own: whatever it does, training does not wait for it.

One that raises is named once and gets no more rows. One that blocks fills a queue; what does not fit is dropped,
counted, and said. At the end it gets some time to finish, and no more.
"""

import sys
import threading
from collections.abc import Callable
from queue import Empty, Full, Queue
from typing import Any

from torchtune.training.metric_logging import MetricLoggerInterface

from torchtune_agent.errors import UserError
from torchtune_agent.screen import shown

_MOST_WAITING = 1_000  # calls
_START_SECONDS = 120.0  # longer than WandB waits for its server
_CLOSE_SECONDS = 60.0

Call = Callable[[MetricLoggerInterface], Any]


class Guest:
    """Makes a logger with `make` and runs calls on it, in the order they come in.

    A mistake in the logger's config, a UserError, is raised here: it is the user's to mend. All else is reported.

    Args:
        make: makes the logger.
        fallback: what a warning ends with: where the numbers are anyway.
        most_waiting: calls that may wait.
        start_seconds: how long the run waits for the logger to be made.
        close_seconds: how long it waits for the calls that are left at the end.
    """

    def __init__(
        self,
        make: Callable[[], MetricLoggerInterface],
        fallback: str,
        *,
        most_waiting: int = _MOST_WAITING,
        start_seconds: float = _START_SECONDS,
        close_seconds: float = _CLOSE_SECONDS,
    ) -> None:
        self._make = make
        self._fallback = fallback
        self._close_seconds = close_seconds
        self._calls: Queue[tuple[str, Call]] = Queue(most_waiting)
        self._num_dropped = 0
        self._name = "metric_logger"
        self._off = False
        self._mistake: UserError | None = None
        self._ready = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metric_logger", daemon=True)
        self._thread.start()
        if not self._ready.wait(start_seconds):
            self._warn(f"is not ready after {start_seconds:g} s. The run goes on; rows wait for it.")
        if self._mistake is not None:
            raise self._mistake

    def call(self, what: str, call: Call) -> None:
        """Have `call` called with the logger, later; `what` names it in a warning."""
        if self._off:
            return
        try:
            self._calls.put_nowait((what, call))
        except Full:
            if self._num_dropped == 0:
                self._warn(f"takes rows more slowly than they come; some are dropped. {self._fallback}")
            self._num_dropped += 1

    def close(self, seconds: float | None = None) -> None:
        """Wait for the calls that are left, for a limited time."""
        seconds = self._close_seconds if seconds is None else seconds
        self._closing.set()
        self._thread.join(seconds)
        num_left = 0 if self._off else self._calls.qsize()
        if self._thread.is_alive():
            self._off = True
            self._warn(f"did not finish within {seconds:g} s. {self._fallback}")
        if self._num_dropped or num_left:
            self._warn(f"missed {self._num_dropped + num_left:,} calls. {self._fallback}")

    def _run(self) -> None:
        try:
            logger = self._make()
            self._name = type(logger).__name__
        except UserError as error:
            self._mistake, self._off = error, True
            return
        except BaseException as error:  # whatever a logging service throws must not end a training run
            self._give_up("", error)
            return
        finally:
            self._ready.set()
        while not self._off:
            try:
                what, call = self._calls.get(timeout=0.05 if self._closing.is_set() else 0.5)
            except Empty:
                if self._closing.is_set():
                    return
                continue
            try:
                call(logger)
            except BaseException as error:  # as above
                self._give_up(what, error)

    def _give_up(self, what: str, error: BaseException) -> None:
        self._off = True
        self._name += f".{what}" if what else ""
        self._warn(
            f"raised {type(error).__name__}: {error}\n         It gets no more rows in this run. {self._fallback}"
        )

    def _warn(self, text: str) -> None:
        print(shown(f"warning: {self._name} {text}"), file=sys.stderr)
