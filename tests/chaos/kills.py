"""kill -9 of a rank: at every step, in every phase of saving, validating, writing weights, resuming, and at random."""

import random
import shutil
import time
from functools import partial

from tests.chaos.place import AUTO, LAST_STEP, TWENTY, Job, Place, check_equal, resumed
from tests.training_runs import Left, Started, launch

_OF_SAVING = {  # phase: the ranks that have it
    "begun": (0,),
    "files": (0, 1),
    "tensors": (0, 1),
    "tensors written": (0, 1),
    "hashed": (0,),
    "manifest": (0,),
    "renamed": (0,),
    "published": (0,),
    "pruning": (0,),
}
_IN_BACKGROUND = "enable_async_checkpointing=True"
_NUM_RANDOM = 100
# Two hundred steps: long enough for a hundred kills, each a step or three after the run has gone on
_SOAK = (*TWENTY, "dataset.num_tasks=400", "save_every_n_steps=1", "run_val_every_n_steps=50")


def jobs(place: Place) -> list[Job]:
    place.whole(*TWENTY)
    found: list[Job] = [partial(_soak, place)]
    for rank in (0, 1):
        for step in range(1, LAST_STEP + 1):
            found.append(partial(_trial, place, f"kill -9 of rank {rank} at a step (1 to 20)", [f"step:{step}:{rank}"]))
    for options, steps in (((), (6, 10, 20)), ((_IN_BACKGROUND,), (6, 20))):
        for phase, ranks in _OF_SAVING.items():
            fault = f"kill -9 while {'saving in the background' if options else 'saving'}: {phase}"
            found += [
                partial(_trial, place, fault, [f"{phase}:{step}:{rank}"], *options) for rank in ranks for step in steps
            ]
    for phase, steps in (
        ("validating", (6, 10)),
        ("epoch's end", (10, 20)),
        ("weights", (10, 20)),
        ("weights written", (10, 20)),
    ):
        found += [
            partial(_trial, place, f"kill -9 at {phase}", [f"{phase}:{step}:{rank}"])
            for rank in (0, 1)
            for step in steps
        ]
    for phase, ranks in (("recovered", (0,)), ("rewinding", (0,)), ("rewound", (0,)), ("restored", (0, 1))):
        fault = f"kill -9 while resuming: {phase}"
        found += [partial(_trial, place, fault, ["step:11:0", f"{phase}:0:{rank}"]) for rank in ranks]
    for phase in ("hashed", "manifest", "renamed", "published", "pruning"):
        # A run that is stopped while it validates saves, and saves again when it has validated.
        plans = ["validating:6:0:SIGTERM", f"{phase}:6:0"]
        found.append(partial(_trial, place, f"kill -9 while a checkpoint is replaced: {phase}", plans))
    return found


def _trial(place: Place, fault: str, plans: list[str], *options: str) -> None:
    folder = place.new(fault)
    with place.table.trial(fault, folder):
        run: Left | None = None
        for plan in plans:
            run = launch(folder, *TWENTY, *options, AUTO, kill=plan)
            phase, _, rank, *signals = plan.split(":")
            expected = 75 if signals else -9
            assert run.codes[int(rank)] == expected, f"{phase} did not happen: {run.codes} {run.output[-2000:]}"
        assert run is not None
        resumed(run, *TWENTY, *options, whole=place.whole(*TWENTY))


def _soak(place: Place) -> None:
    """One run that is killed a hundred times, at random moments and on random ranks."""
    whole = place.whole(*_SOAK)
    rng, folder = random.Random(place.seed), place.new("soak")
    fault = "100 random kills in one soak"
    killed = 0
    while killed < _NUM_RANDOM:
        with place.table.trial(fault, quiet=True):
            started = Started(folder, *_SOAK, AUTO)
            _wait_a_while(started, rng)
            assert started.is_running, "the run ended before it was killed"
            started.kill(*rng.choice([(0,), (1,), (0, 1)]))
            run = started.finish()
            assert -9 in run.codes and set(run.codes) <= {-9, 1}, f"{run.codes} {run.output[-2000:]}"
            assert "has no good checkpoint" not in run.output, run.output[-2000:]
        killed += 1
    with place.table.trial("the soaked run's end: same final hash"):
        ended = launch(folder, *_SOAK, AUTO, limit=900)
        assert ended.codes == [0, 0], ended.output[-3000:]
        check_equal(ended, whole)
        shutil.rmtree(folder)


def _wait_a_while(started: Started, rng: random.Random) -> None:
    """Most runs are killed in a few steps after they have gone on, some while they start."""
    if rng.random() < 0.15:
        time.sleep(rng.uniform(0, 0.6))
        return
    records = started.folder / "records" / "samples_0.jsonl"

    def num_begun() -> int:
        return records.read_bytes().count(b"\n") if records.exists() else 0

    until, deadline = num_begun() + rng.randint(1, 3), time.monotonic() + 60
    while started.is_running and num_begun() < until and time.monotonic() < deadline:
        time.sleep(0.003)
    time.sleep(rng.uniform(0, 0.06))
