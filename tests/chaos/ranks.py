"""A rank that dies, hangs, freezes or raises under the real launcher, restarts by it, and another number of ranks."""

import os
import random
import signal
import time
from functools import partial

from tests.chaos.launched import Launched
from tests.chaos.place import AUTO, TWENTY, Job, Place, check_said, resumed
from tests.faulty import CANARY
from tests.training_runs import LAST_STEP, launch

_TIMEOUT = 12  # seconds, of the process group
_FAULTY = ("dataset=tests.faulty.dataset", "trusted_components=[tests]", "dataset.at=15")  # of step 8
_FAULTS = {  # the options it is tried with, in how many seconds that must be said, and how
    "die": ((), 15, ("(pid ", "was killed by SIGKILL (out of memory?) at step 8")),
    "raise": ((), 15, ("at step 8: RuntimeError: a sample broke",)),
    "hang": (
        (f"process_group_timeout_seconds={_TIMEOUT}",),
        _TIMEOUT + 30,
        ("faulty.py:", "(_hang)", f"waited {_TIMEOUT} s for it at step 8", "no rank has begun a step or a batch for"),
    ),
    "freeze": (
        (f"process_group_timeout_seconds={_TIMEOUT}",),
        _TIMEOUT + 30,
        ("no sign of life for", f"waited {_TIMEOUT} s for it at step 8"),  # what it last wrote is a second old
    ),
}
_NUM_RESTARTS = 3


def jobs(place: Place) -> list[Job]:
    place.whole(*TWENTY)
    found: list[Job] = [
        partial(_fault, place, fault, rank) for fault in ("freeze", "hang", "die", "raise") for rank in (0, 1)
    ]
    found += [partial(_restarts, place, number) for number in range(2)]
    found += [partial(_killed, place, rank) for rank in (0, 1)]
    found += [partial(_other_worlds, place, sizes) for sizes in ((2, 1, 2), (1, 2, 1))]
    found += [partial(_epochs_end, place, rank) for rank in (0, 1)]
    return found


def _fault(place: Place, what: str, rank: int) -> None:
    options, seconds, texts = _FAULTS[what]
    fault = f"rank 0 or 1: {what} (said within {seconds} s)"
    folder = place.new(fault)
    with place.table.trial(fault, folder):
        started = Launched(folder, *TWENTY, *_FAULTY, f"dataset.fault={what}", f"dataset.rank={rank}", *options, AUTO)
        path = folder / "records" / "fault"
        started.wait_until(lambda: path.exists() and path.read_text() != "", "the fault")
        begun = float(path.read_text())
        while not started.errors and started.process.poll() is None and time.time() < begun + seconds:
            time.sleep(0.05)
        said = time.time() - begun
        run = started.finish()
        ended = time.time() - begun
        assert run.codes == [1], f"{run.codes} {run.output[-3000:]}"
        assert len(started.errors) == 1, f"{len(started.errors)} errors: {started.errors}"
        assert f"rank {rank}" in started.errors[0]
        for text in texts:
            assert text in run.output, f"not said: {text!r}. Said: {run.output[-3000:]}"
        num_traces = run.output.count("Traceback (most recent call last)")
        assert num_traces == (what == "raise"), f"{num_traces} tracebacks: {run.output[-3000:]}"
        assert CANARY not in run.output and "\x1b[2J" not in run.output
        # torchrun waits 30 s for a process that it has asked to end, and cannot, before it kills it
        assert said < seconds and ended < seconds + 30, f"said after {said:.1f} s, ended after {ended:.1f} s"
        assert run.saved == [6, 3]


def _killed(place: Place, rank: int) -> None:
    """The whole road: the launcher, kill -9 from outside, the launcher again."""
    fault = "`tune run`, kill -9 of a worker, `tune run` again"
    folder = place.new(fault)
    with place.table.trial(fault, folder):
        started = Launched(folder, *TWENTY, AUTO)
        started.wait_for_step(random.Random(f"{place.seed} {rank}").randint(4, 18))
        worker = started.worker(rank)
        os.kill(worker, signal.SIGKILL)
        run = started.finish()
        assert run.codes == [1], f"{run.codes} {run.output[-3000:]}"
        check_said(run.output, f"rank {rank} (pid {worker}) was killed by SIGKILL (out of memory?) at step")
        assert len(started.errors) == 1, started.errors
        again = Launched(folder, *TWENTY, AUTO).finish()
        assert again.codes == [0], again.output[-3000:]
        check_said(again.output, "resuming")
        resumed(again, *TWENTY, whole=place.whole(*TWENTY))


def _restarts(place: Place, number: int) -> None:
    fault = f"--max-restarts {_NUM_RESTARTS} with auto: {_NUM_RESTARTS} kills of a worker, one command"
    folder, rng = place.new(fault), random.Random(f"{place.seed} restarts {number}")
    with place.table.trial(fault, folder):
        started = Launched(folder, *TWENTY, AUTO, launch=("--max-restarts", str(_NUM_RESTARTS)))
        path, begun = folder / "records" / "samples_0.jsonl", 0
        for _ in range(_NUM_RESTARTS):
            started.wait_for_step(begun + rng.randint(2, 5))
            begun = path.read_text().count("\n")
            os.kill(started.worker(rng.randint(0, 1)), signal.SIGKILL)
            started.wait_until(lambda before=begun: path.read_text().count("\n") > before + 1, "the next attempt")
            begun = path.read_text().count("\n")
        run = started.finish()
        assert run.codes == [0], f"{run.codes} {run.output[-3000:]}"
        assert run.output.count("resuming") >= 1
        resumed(run, *TWENTY, whole=place.whole(*TWENTY))


def _other_worlds(place: Place, sizes: tuple[int, ...]) -> None:
    """The same samples in the same order, and the same losses up to rounding."""
    fault = f"world {' -> '.join(map(str, sizes))}"
    folder = place.new(fault)
    with place.table.trial(fault, folder):
        rows = {1: "gradient_accumulation_steps=4", 2: "gradient_accumulation_steps=2"}
        whole = launch(folder / "whole", rows[sizes[0]], size=sizes[0])
        changing, kills = folder / "changing", ("step:4:0", "step:10:0", None)
        runs = [launch(changing, AUTO, rows[n], size=n, kill=kill) for n, kill in zip(sizes, kills, strict=True)]
        run = runs[-1]
        assert run.codes == [0] * sizes[-1], run.output[-3000:]
        trained = [[(line["step"], line["sample"]) for line in one.ledger] for one in (run, whole)]
        assert trained[0] == trained[1], "other samples"
        losses = [[row["loss"] for row in one.rows if "loss" in row] for one in (run, whole)]
        assert len(losses[0]) == len(losses[1]) == LAST_STEP
        assert all(abs(a - b) <= 1e-6 * abs(b) for a, b in zip(*losses, strict=True)), losses


def _epochs_end(place: Place, rank: int) -> None:
    """Killed when the checkpoint of the epoch's end was the last thing that happened."""
    fault = "resumed from an epoch's end"
    folder = place.new(fault)
    with place.table.trial(fault, folder):
        run = launch(folder, *TWENTY, AUTO, kill=f"step:11:{rank}")
        assert run.codes[rank] == -9 and run.saved[0] == 10, run.output[-2000:]
        ended = resumed(run, *TWENTY, whole=place.whole(*TWENTY))
        check_said(ended.output, "step_10, after 1 whole epochs")
