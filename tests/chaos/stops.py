"""A run that is told to stop: which signal, to whom, when, and how often makes no difference to what it ends with."""

import signal
import time
from functools import partial

from tests.chaos.launched import Launched
from tests.chaos.place import AUTO, TWENTY, Job, Place, check_said, good_steps, resumed
from tests.training_runs import Left, launch

_MOMENTS = {  # of a signal: what the run does then, after which step
    "in a step": "step:8",
    "in the epoch's last step": "step:10",
    "in the run's last step": "step:20",
    "while validating": "validating:6",
    "while validating at the epoch's end": "validating:10",
    "at the epoch's end": "epoch's end:10",
    "while weights are written": "weights:10",
    "while weights are written at the end": "weights:20",
    "while saving": "tensors:6",
    "while publishing": "hashed:6",
}
_SIGNALS = {"SIGTERM": 0, "SIGUSR1": 1, "SIGTERM+SIGUSR1": 0, "SIGUSR1+SIGTERM+SIGTERM": 1}  # and to which rank
_WHILE_IMPORTING = (0.2, 1.0, 2.0, 3.0, 4.0, 5.0, 6.5, 8.0)  # seconds after the start


def jobs(place: Place) -> list[Job]:
    place.whole(*TWENTY)
    found: list[Job] = [
        partial(_to_launcher, place, (signal.SIGTERM,)),
        partial(_to_launcher, place, (signal.SIGUSR1, signal.SIGTERM)),
        partial(_launcher_killed, place),
    ]
    found += [partial(_at_start, place, seconds) for seconds in _WHILE_IMPORTING]
    for what, moment in _MOMENTS.items():
        found += [partial(_to_rank, place, what, moment, sent, rank) for sent, rank in _SIGNALS.items()]
    found.append(partial(_at_start_of_ranks, place))
    return found


def _to_rank(place: Place, what: str, moment: str, sent: str, rank: int) -> None:
    phase, step = moment.split(":")
    if phase in ("tensors", "hashed"):
        rank = 0
    fault = f"SIGTERM, SIGUSR1, a second signal {what}"
    folder = place.new(fault)
    with place.table.trial(fault, folder):
        run = launch(folder, *TWENTY, AUTO, kill=f"{moment}:{rank}:{sent}")
        if run.codes == [0, 0]:  # its last step was done, and all it still had to do it did
            assert int(step) == 20, f"not stopped: {run.output[-2000:]}"
        else:
            assert run.codes == [75, 75], f"{run.codes} {run.output[-3000:]}"
            by = sent.split("+")[0] if rank == 0 else "another rank"
            check_said(run.output, f"stopped by {by}, with a checkpoint saved")
        resumed(run, *TWENTY, whole=place.whole(*TWENTY))


def _to_launcher(place: Place, numbers: tuple[signal.Signals, ...]) -> None:
    fault = f"{' then '.join(number.name for number in numbers)} to `tune run`"
    folder = place.new(fault)
    with place.table.trial(fault, folder):
        started = Launched(folder, *TWENTY, AUTO)
        started.wait_for_step(7)
        started.signal(*numbers)
        run = started.finish()
        assert run.codes == [75], f"{run.codes} {run.output[-3000:]}"
        check_said(run.output, f"stopped by {numbers[0].name}, with a checkpoint saved")
        assert not started.errors
        again = Launched(folder, *TWENTY, AUTO).finish()
        assert again.codes == [0] and "resuming" in again.output, again.output[-3000:]
        resumed(again, *TWENTY, whole=place.whole(*TWENTY))


def _launcher_killed(place: Place) -> None:
    fault = "kill -9 of `tune run`: workers save and end by themselves within 30 s"
    folder = place.new(fault)
    with place.table.trial(fault, folder):
        started = Launched(folder, *TWENTY, AUTO, "epochs=100")
        started.wait_for_step(7)
        started.signal(signal.SIGKILL)
        started.wait_for_workers(30)
        check_said(started.output, "stopped by the end of its launcher, with a checkpoint saved")
        run = Left(folder, [], started.output)
        assert good_steps(run)
        ended = launch(folder, *TWENTY, AUTO, "epochs=100", kill=f"step:{good_steps(run)[0] + 3}:0")
        check_said(ended.output, "resuming")


def _at_start(place: Place, seconds: float) -> None:
    """The launcher's and the workers' handlers are there only when Python has imported what holds them."""
    fault = f"SIGTERM to `tune run` while it starts, after {_WHILE_IMPORTING[0]:g} to {_WHILE_IMPORTING[-1]:g} s"
    folder = place.new(fault)
    with place.table.trial(fault, folder):
        started = Launched(folder, *TWENTY, AUTO)
        time.sleep(seconds)
        started.signal(signal.SIGTERM)
        run = started.finish(60)
        # -15 (a shell says 143): before anything of ours was imported; 75: afterwards
        assert run.codes[0] in (-15, 75), f"{run.codes} {run.output[-3000:]}"
        assert not started.errors, started.errors
        check_said(run.output)
        resumed(run, *TWENTY, whole=place.whole(*TWENTY))


def _at_start_of_ranks(place: Place) -> None:
    """SIGTERM to one rank alone while it starts: nothing to save yet."""
    fault = "SIGTERM to a rank before its first step"
    for phase, rank in (("recovered", 0), ("loading", 1), ("restored", 0), ("restored", 1)):
        folder = place.new(fault)
        with place.table.trial(fault, folder):
            if phase != "loading":
                launch(folder, *TWENTY, AUTO, kill="step:8:0")
            run = launch(folder, *TWENTY, AUTO, kill=f"{phase}:0:{rank}:SIGTERM")
            assert run.codes == [75, 75], f"{run.codes} {run.output[-2000:]}"
            check_said(run.output, "before the first step; nothing was lost (exit code 75)")
            resumed(run, *TWENTY, whole=place.whole(*TWENTY))
