"""Where trials happen: a folder for each, runs without a fault to compare with, and what makes two runs equal."""

import itertools
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.table import Table
from tests.training_runs import Left, launch
from torchtune_agent.training.checkpoints import CheckpointFolder, Stored

AUTO = "resume_from_checkpoint=auto"
# Two epochs of ten steps on two ranks, of which the last is short in rows and in micro-batches. Dropout, so that a lost
# random state shows. Steps 6, 12 and 18 are validated and saved.
TWENTY = (
    "dataset.num_tasks=39",
    "save_every_n_steps=3",
    "run_val_every_n_steps=6",
    "model.attn_dropout=0.1",
    "batch_size=1",
)
LAST_STEP = 20
# A fault is said in a line or a few; a traceback is for what nobody foresaw.
_TRACEBACK = re.compile(r"^Traceback \(most recent call last\)", re.MULTILINE)


@dataclass
class Place:
    """What every trial is given."""

    folder: Path
    table: Table
    seed: int
    _number: itertools.count = field(default_factory=itertools.count)
    _whole: dict[tuple[str, ...], Left] = field(default_factory=dict)
    _locks: dict[tuple[str, ...], threading.Lock] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def new(self, name: str) -> Path:
        """A folder for one trial."""
        folder = self.folder / f"{next(self._number):04}_{re.sub('[^a-z0-9]+', '_', name.lower())}"
        folder.mkdir()
        return folder

    def whole(self, *options: str, size: int = 2) -> Left:
        """The run with these options that nothing happens to; made once."""
        key = (str(size), *options)
        with self._lock:
            own = self._locks.setdefault(key, threading.Lock())
        with own:
            if key not in self._whole:
                run = launch(self.new("whole"), *options, size=size, limit=900)
                assert run.codes == [0] * size, run.output
                self._whole[key] = run
            return self._whole[key]


Job = Callable[[], None]


def resumed(run: Left, *options: str, whole: Left, size: int = 2) -> Left:
    """Go on with `run` to its end, which must be that of `whole`."""
    ended = launch(run.folder, *options, AUTO, size=size)
    assert ended.codes == [0] * size, f"resuming ended with {ended.codes}: {ended.output[-3000:]}"
    check_equal(ended, whole)
    return ended


def check_equal(run: Left, whole: Left) -> None:
    """Not a byte of what was trained, drawn, logged or saved may differ, nor a sample be lost or repeated."""
    different = [
        name
        for name in ("digests", "samples", "rows", "tables", "ledger")
        if repr(getattr(run, name)) != repr(getattr(whole, name))  # for which a NaN is equal to itself
    ]
    if run.saved[: len(whole.saved)] != whole.saved:  # one that was killed before it was pruned goes at the next save
        different.append("saved")
    for epoch in {of for of, _ in whole.samples}:
        trained = [one for (of, _), samples in run.samples.items() if of == epoch for one in samples]
        if len(trained) != len(set(trained)):
            different.append(f"samples repeated in epoch {epoch}")
    stored = [{name: Stored.of(left.out / name) for name in _weights(left)} for left in (run, whole)]
    if stored[0] != stored[1]:
        different.append("weights")
    assert not different, f"differs from the run without a break in: {', '.join(different)}"


def _weights(run: Left) -> list[str]:
    return sorted(path.relative_to(run.out).as_posix() for path in run.out.rglob("*.safetensors"))


def check_said(output: str, *texts: str) -> None:
    """The message is there, and no traceback."""
    for text in texts:
        assert text in output, f"not said: {text!r}. Said: {output[-3000:]}"
    assert not _TRACEBACK.search(output), f"a traceback: {output[-3000:]}"


def good_steps(run: Left) -> list[int]:
    """Steps of the checkpoints that are whole to their last byte."""
    from torchtune_agent.training.checkpoints import Checkpoint, Damaged

    folder, good = CheckpointFolder(run.out / "checkpoints"), []
    for step in folder.steps():
        try:
            checkpoint = Checkpoint.open(folder.of_step(step))
        except Damaged:
            continue
        if not any(checkpoint.problem_of(name) for name in checkpoint.manifest.files):
            good.append(step)
    return good
