"""What `tune run --nproc_per_node` adds to torchrun: signals that save instead of kill, and one message instead of
torchrun's own report and traceback when a run fails.

Workers say themselves what they know (see training.run), and leave notes. What only the launcher can see is how a
process died.
"""

import logging
import os
import signal
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from torchtune_agent.training.notes import FOLDER_VARIABLE, read_notes
from torchtune_agent.training.signals import EXIT_STOPPED, STOP_SIGNALS

_SAVE_SECONDS = 300  # for workers to finish a step and save; torchrun's own 30 are too few for large models
_INTERRUPTED = 128 + signal.SIGINT
# Their lines name processes that ended, which we say ourselves
_LOGGERS = (
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.multiprocessing.api",
    "torch.distributed.elastic.multiprocessing.errors.error_handler",
)


def launch(run_workers: Callable[[], None], args: Namespace) -> None:
    """Run torchrun's `run_workers` with its `args`. Ends the process unless the workers succeeded."""
    _give_time_to_save(args)
    if args.max_restarts and args.nnodes not in ("1", "1:1"):
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # see distributed.process_group
    if not args.max_restarts:  # with restarts, how an earlier attempt ended is said nowhere else
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="torchtune_agent_") as folder:
        os.environ[FOLDER_VARIABLE] = folder
        try:
            run_workers()
        except ChildFailedError as error:
            _end_failed(error, read_notes(Path(folder)))
        except SignalException as error:
            _end_stopped(signal.Signals(error.sigval), read_notes(Path(folder)))
        finally:
            os.environ.pop(FOLDER_VARIABLE)


def _give_time_to_save(args: Namespace) -> None:
    """torchrun hands a signal on to the workers and kills them some time later. It does not hear SIGUSR1, and a second
    signal would interrupt its waiting and leave workers behind."""
    if getattr(args, "shutdown_timeout", None) is None and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in os.environ:
        args.shutdown_timeout = _SAVE_SECONDS
    ours = {number.name for number in STOP_SIGNALS}
    args.signals_to_handle = ",".join(name for name in args.signals_to_handle.split(",") if name not in ours)

    def hand_on(number: int, frame: FrameType | None) -> None:
        for one in STOP_SIGNALS:
            signal.signal(one, signal.SIG_IGN)
        raise SignalException(f"launcher got {signal.Signals(number).name}", signal.Signals(number))

    for number in STOP_SIGNALS:
        signal.signal(number, hand_on)


def _end_stopped(by: signal.Signals, notes: Mapping[int, Mapping[str, Any]]) -> NoReturn:
    if by not in STOP_SIGNALS:
        sys.exit(_INTERRUPTED if by is signal.SIGINT else 128 + by)
    if any(note["said"] and note["state"] == "failed" for note in notes.values()):
        sys.exit(1)
    killed = [note for note in notes.values() if note["state"] == "training"]
    for note in killed:
        _say(
            f"rank {note['rank']} (pid {note['pid']}) had not saved step {note['step']} when its time after {by.name} "
            "was over, and was killed. Give it more with --shutdown-timeout SECONDS, or save more often."
        )
    sys.exit(1 if killed else EXIT_STOPPED)


def _end_failed(error: ChildFailedError, notes: Mapping[int, Mapping[str, Any]]) -> NoReturn:
    """Say which process died of what, unless it was able to say so itself."""
    failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
    codes = {failure.exitcode for failure in failures}
    if EXIT_STOPPED in codes and codes <= {EXIT_STOPPED, -signal.SIGTERM}:
        sys.exit(EXIT_STOPPED)
    if any(note["said"] for note in notes.values()):
        sys.exit(1)
    of_processes = {note["pid"]: note for note in notes.values()}  # of this attempt, or an earlier one's

    def follows(failure: ProcessFailure) -> bool:
        """Whether it failed because another did: torchrun ended it, or its own note says so."""
        return failure.exitcode == -signal.SIGTERM or of_processes.get(failure.pid, {}).get("state") == "failed"

    first = next((failure for failure in failures if not follows(failure)), failures[0])
    if first.exitcode >= 0:
        raise error
    ranks = {failure.pid: rank for rank, failure in error.failures.items()}
    _say(_death(first, ranks[first.pid], of_processes.get(first.pid)))
    sys.exit(1)


def _death(failure: ProcessFailure, rank: int, note: Mapping[str, Any] | None) -> str:
    by = signal.Signals(-failure.exitcode)
    hint = " (out of memory?)" if by is signal.SIGKILL else ""
    where = f"at step {note['step']}" if note is not None and note["step"] else "before its first step"
    return f"rank {rank} (pid {failure.pid}) was killed by {by.name}{hint} {where}"


def _say(text: str) -> None:
    print(f"\nerror: {text}", file=sys.stderr, flush=True)
