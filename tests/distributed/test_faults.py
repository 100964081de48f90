"""A rank that dies, hangs or raises, and a run that is told to stop: real runs on two ranks."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests import tune
from tests.faulty import CANARY
from torchtune_agent.metrics import read_rows

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

FAULTS = {
    "hang": ("process_group_timeout_seconds=12",),
    "die": (),
    "raise": (),
    "signal launcher": (),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[CompletedProcess[str], Path]]:
    """A run with each fault, on rank 1 while it reads the data of step 5. Two at a time: one of them only waits."""

    def run(fault: str) -> tuple[CompletedProcess[str], Path]:
        folder = tmp_path_factory.mktemp(fault.replace(" ", "_"))
        overrides = (*tune.SMALL, *tune.FAULTY, f"dataset.fault={fault}", *FAULTS[fault], "epochs=3")
        return tune.train(*overrides, cwd=folder, env=tune.FAULTY_ENV), folder / "out"

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FAULTS, pool.map(run, FAULTS), strict=True))


def errors(result: CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


def test_a_rank_that_dies_is_named_once_with_its_signal_and_step(runs) -> None:
    result, out = runs["die"]
    (error,) = errors(result)
    assert result.returncode == 1
    assert error.startswith("error: rank 1 (pid ") and error.endswith(
        "was killed by SIGKILL (out of memory?) at step 5"
    )
    assert "Traceback" not in result.stderr and "ChildFailedError" not in result.stderr
    assert [row["step"] for row in read_rows(out / "logs" / "metrics.jsonl") if "loss" in row] == [1, 2, 3, 4]


def test_a_rank_that_does_not_come_is_named_with_the_line_it_is_in(runs) -> None:
    result, _ = runs["hang"]
    (error,) = errors(result)
    assert result.returncode == 1
    assert error.startswith("error: rank 1 (pid ") and "faulty.py:" in error and "(_hang)" in error
    assert "waited 12 s for it at step 5 (process_group_timeout_seconds)" in error
    assert "no rank has begun a step or a batch for 6 s" in result.stderr  # while there is still time to look
    assert "Traceback" not in result.stderr


def test_an_exception_on_one_rank_is_shown_once_and_cannot_drive_the_terminal(runs) -> None:
    result, _ = runs["raise"]
    (error,) = errors(result)
    assert result.returncode == 1
    assert error.startswith(
        r"error: rank 1 at step 5: RuntimeError: a sample broke \x1b[2J\x1b]0;owned\x07 https://***@"
    )
    assert result.stderr.count("Traceback (most recent call last)") == 1
    assert "in _raise" in result.stderr  # where it happened
    assert CANARY not in result.stdout + result.stderr
    assert "\x1b[2J" not in result.stderr and "\x07" not in result.stderr


def test_a_signal_ends_the_run_after_a_step_with_a_checkpoint(runs) -> None:
    result, out = runs["signal launcher"]
    assert result.returncode == 75, result.stderr
    assert "step 5: stopped by SIGTERM, with a checkpoint saved" in result.stderr
    assert not errors(result) and "Traceback" not in result.stderr
    assert (out / "checkpoints" / "step_5" / "manifest.json").exists()
    assert read_rows(out / "logs" / "metrics.jsonl")[-1]["step"] == 5
