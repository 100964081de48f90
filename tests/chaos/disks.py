"""A disk that is full, at any moment, and a folder that turns read-only: real ones, mounted for the trial.

Mounts need a namespace of our own (see __main__) in which we are root. Root may write into any folder whatever its
permissions are, so folders are made read-only by mounting them so, which holds for root too.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.chaos.place import AUTO, TWENTY, Job, Place, check_said, good_steps, resumed
from tests.chaos.table import NotTried
from tests.training_runs import Left, Started, launch

_IN_BACKGROUND = "enable_async_checkpointing=True"
_SHARES = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)  # of the space that a run needs
_NO_ROOM = "No space left on device"
_PART = "the disk took only part of a file"


def jobs(place: Place) -> list[Job]:
    place.whole(*TWENTY)
    found: list[Job] = [
        partial(_full, place, share, options) for share in _SHARES for options in ((), (_IN_BACKGROUND,))
    ]
    found += [partial(_read_only_from_the_start, place), partial(_full_logs, place)]
    found += [partial(_turns_read_only, place, options) for options in ((), (_IN_BACKGROUND,))]
    return found


def _mount(*arguments: str) -> None:
    if os.environ.get("CHAOS_IN_NAMESPACE") != "yes":
        raise NotTried("no mount namespace")
    found = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if found.returncode:
        raise NotTried(f"mount: {found.stderr.strip()}")


@contextmanager
def _disk(folder: Path, kib: int) -> Iterator[None]:
    """A disk of so many KiB at `folder`; what is on it stays there, as plain files."""
    folder.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder))
    try:
        yield
    finally:
        kept = folder.with_name(f"{folder.name}.kept")
        shutil.copytree(folder, kept, symlinks=True)
        subprocess.run(["umount", "--lazy", str(folder)], check=False)
        folder.rmdir()
        kept.rename(folder)


def _needed(run: Left) -> int:
    """KiB that all files of a run take, in whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4 for path in run.out.rglob("*") if path.is_file())


def _full(place: Place, share: float, options: tuple[str, ...]) -> None:
    """A run whose disk is too small stops with the reason, leaves good checkpoints, and goes on when there is room."""
    fault = f"ENOSPC on a small tmpfs{', saving in the background' if options else ''}"
    folder, whole = place.new(fault), place.whole(*TWENTY)
    with place.table.trial(fault, folder):
        with _disk(folder / "out", int(_needed(whole) * share)):
            run = launch(folder, *TWENTY, *options, AUTO)
            good = good_steps(run)
            assert good == run.saved, f"a checkpoint of {run.saved} is bad: good are {good}"
            if run.codes != [0, 0]:  # 0: there was room for all but logs or plots
                assert run.codes == [1, 1], f"{run.codes} {run.output[-3000:]}"
                check_said(run.output)
                assert _NO_ROOM in run.output or _PART in run.output, run.output[-3000:]
                assert run.output.count("\nerror: ") == 1, run.output[-3000:]
            else:
                check_said(run.output)
            left = sorted(path.name for path in (run.out / "checkpoints").glob(".step_*")) if good else []
            assert not left, f"left half written: {left}"
        resumed(run, *TWENTY, *options, whole=whole)


def _full_logs(place: Place) -> None:
    """The disk is full for some steps in which nothing is saved: rows wait, and come when there is room."""
    fault = "a disk that is full for a while: no row is lost"
    folder, options = place.new(fault), (*TWENTY[:1], "save_every_n_steps=null", *TWENTY[2:], "epochs=40")
    with place.table.trial(fault, folder):
        with _disk(folder / "out", 60_000):
            started = Started(folder, *options, "max_steps_per_epoch=5")
            rows = folder / "out" / "logs" / "metrics.jsonl"
            while started.is_running and not (rows.exists() and rows.stat().st_size > 1000):
                time.sleep(0.01)
            filler = folder / "out" / "filler"
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
            time.sleep(0.5)
            filler.unlink()
            run = started.finish(300)
            if run.codes == [0, 0]:  # otherwise it wanted to save or write weights just then, which is tried above
                assert [row["step"] for row in run.rows if "loss" in row] == list(range(1, 201))
            else:
                assert _NO_ROOM in run.output or _PART in run.output, run.output[-3000:]


def _read_only_from_the_start(place: Place) -> None:
    fault = "output_dir on a read-only mount"
    folder = place.new(fault)
    with place.table.trial(fault, folder):
        with _disk(folder / "out", 1000):
            _mount("-o", "remount,ro", str(folder / "out"))
            run = launch(folder, *TWENTY, AUTO)
            assert run.codes == [1, 1], run.output[-2000:]
            check_said(run.output, f"output_dir={run.out}: cannot be written to. Name another folder, or change its")


def _turns_read_only(place: Place, options: tuple[str, ...]) -> None:
    """The folder of checkpoints becomes read-only while the run trains."""
    fault = f"checkpoints turn read-only in mid-run{', saving in the background' if options else ''} (bind mount)"
    folder = place.new(fault)
    with place.table.trial(fault, folder):
        started = Started(folder, *TWENTY, *options, AUTO)
        checkpoints = folder / "out" / "checkpoints"
        while started.is_running and not (checkpoints / "latest").exists():
            time.sleep(0.002)
        _mount("--bind", str(checkpoints), str(checkpoints))
        try:
            _mount("-o", "remount,bind,ro", str(checkpoints))
            run = started.finish()
            good = good_steps(run)
        finally:
            subprocess.run(["umount", "--lazy", str(checkpoints)], check=False)
        assert run.codes == [1, 1], f"{run.codes} {run.output[-3000:]}"
        check_said(run.output, "the checkpoint cannot be saved: Read-only file system", "is untouched")
        assert good and good == run.saved
        resumed(run, *TWENTY, *options, whole=place.whole(*TWENTY))
