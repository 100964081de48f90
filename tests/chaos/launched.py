"""The real `tune run`, started, watched and signalled from outside, as users and schedulers do it."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from tests.training_runs import CONFIG, ROOT, SMALL, SMALL_MODEL, Left
from tests.tune import TUNE

_MARK = "CHAOS_TRIAL"
_LIMIT = 600.0  # seconds; a machine that others work on too can be slow


class Launched:
    """`tune run` of tests/training_runs.py, whose runs leave digests, on `size` ranks."""

    def __init__(
        self, folder: Path, *overrides: str, launch: tuple[str, ...] = (), env: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self._log = folder / f"log_{len(list(folder.glob('log_*')))}.txt"
        self._mark = f"{folder}#{time.monotonic_ns()}"
        command = [str(TUNE), "run", "--nproc_per_node", "2", *launch, "tests/training_runs.py"]
        arguments = ["--config", str(CONFIG), f"output_dir={folder / 'out'}", *SMALL, *SMALL_MODEL, *overrides]
        own = {"OMP_NUM_THREADS": "1", "RECORDS": str(folder / "records"), _MARK: self._mark, "PYTHONPATH": str(ROOT)}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *arguments],
                cwd=ROOT,
                env={**os.environ, **own, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def errors(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("error: ")]

    def wait_for_step(self, step: int) -> None:
        """Until `step` of all steps that were ever begun has been."""
        path = self.folder / "records" / "samples_0.jsonl"
        self.wait_until(lambda: path.exists() and path.read_text().count("\n") >= step, f"step {step}")

    def wait_until(self, is_so: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _LIMIT
        while not is_so():
            assert self.process.poll() is None, f"ended before {what}: {self.output[-3000:]}"
            assert time.monotonic() < deadline, f"no {what}: {self.output[-3000:]}"
            time.sleep(0.005)

    def signal(self, *numbers: signal.Signals) -> None:
        """To the launcher alone."""
        for number in numbers:
            self.process.send_signal(number)
            time.sleep(0.05)

    def worker(self, rank: int) -> int:
        """The process that is `rank` now."""
        found = {pid: variables for pid, variables in self._processes().items() if variables.get("RANK") == str(rank)}
        assert len(found) == 1, f"{len(found)} processes are rank {rank}"
        return next(iter(found))

    def finish(self, limit: float = _LIMIT) -> Left:
        """Wait for the launcher, and see that nothing of it is left."""
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self._end_all()
            raise AssertionError(f"still running after {limit:g} s: {self.output[-3000:]}") from None
        deadline = time.monotonic() + 20
        while (left := self._processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        self._end_all()
        assert not left, f"{len(left)} processes were left behind: {self.output[-3000:]}"
        return Left(self.folder, [code], self.output)

    def wait_for_workers(self, seconds: float) -> None:
        """Until nothing of this run is left, the launcher included."""
        deadline = time.monotonic() + seconds
        while self._processes() and time.monotonic() < deadline:
            self.process.poll()
            time.sleep(0.1)
        left = self._processes()
        self._end_all()
        assert not left, f"{len(left)} processes are still there after {seconds:g} s: {self.output[-3000:]}"

    def _end_all(self) -> None:
        for pid in self._processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def _processes(self) -> dict[int, dict[str, str]]:
        """Every process of this run, by the mark in its environment, which it has from its launcher."""
        found = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                text = (folder / "environ").read_bytes().decode(errors="replace")
                is_dead = re.search(r"\) [ZX] ", (folder / "stat").read_text())
            except OSError:
                continue
            if self._mark in text and not is_dead:
                pairs = (pair.partition("=") for pair in text.split("\0"))
                found[int(folder.name)] = {name: value for name, _, value in pairs}
        return found
