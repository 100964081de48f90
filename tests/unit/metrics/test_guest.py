"""A metric logger that raises, blocks or is slow, and a disk that is full: training never waits and never ends."""

import json
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig
from torchtune.training.metric_logging import MetricLoggerInterface

from torchtune_agent.errors import UserError
from torchtune_agent.metrics import RunLog, read_rows
from torchtune_agent.metrics.guest import Guest
from torchtune_agent.metrics.rows import RowFile


class Logger(MetricLoggerInterface):
    """Keeps what it is told. `trouble` is called before each row."""

    def __init__(self, trouble: Any = lambda: None) -> None:
        self.rows: list[int] = []
        self.threads: set[str] = set()
        self.is_closed = False
        self._trouble = trouble

    def log(self, name: str, data: Any, step: int) -> None:
        raise AssertionError("rows come whole")

    def log_config(self, config: DictConfig) -> None: ...

    def log_dict(self, payload: Any, step: int) -> None:
        self._trouble()
        self.threads.add(threading.current_thread().name)
        self.rows.append(step)

    def close(self) -> None:
        self.is_closed = True


def rows_to(guest: Guest, number: int) -> None:
    for step in range(number):
        guest.call("log_dict", lambda logger, step=step: logger.log_dict({}, step=step))


def test_rows_reach_the_logger_in_order_and_before_it_is_closed(tmp_path: Path) -> None:
    logger = Logger(lambda: time.sleep(0.002))
    log = RunLog(tmp_path, DictConfig({}), lambda: logger)
    for step in range(50):
        log.log({"loss": 1.0}, step)
    log.close()
    assert logger.rows == list(range(50)) and logger.is_closed
    assert logger.threads == {"metric_logger"}


def test_one_that_raises_is_named_once_and_gets_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def trouble() -> None:
        raise ConnectionError("no route \x1b[2J to https://me:canary-password@board")

    logger = Logger(trouble)
    log = RunLog(tmp_path, DictConfig({}), lambda: logger)
    for step in range(5):
        log.log({"loss": 1.0}, step)
        time.sleep(0.02)
    log.close()
    warned = capsys.readouterr().err
    assert warned.count("warning") == 1
    assert r"Logger.log_dict raised ConnectionError: no route \x1b[2J to https://***@board" in warned
    assert not logger.rows and not logger.is_closed
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 5


def test_one_that_cannot_be_made_costs_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    def make() -> MetricLoggerInterface:
        raise SystemExit(3)  # some libraries do

    guest = Guest(make, "Look elsewhere.")
    rows_to(guest, 3)
    guest.close()
    assert "metric_logger raised SystemExit: 3" in capsys.readouterr().err


def test_a_mistake_in_its_config_is_the_users_to_mend() -> None:
    def make() -> MetricLoggerInterface:
        raise UserError("metric_logger.projct: no such option")

    with pytest.raises(UserError, match="projct"):
        Guest(make, "")


def test_one_that_blocks_loses_rows_that_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    forever = threading.Event()
    logger = Logger(forever.wait)
    guest = Guest(lambda: logger, "Look elsewhere.", most_waiting=10, close_seconds=0.2)
    rows_to(guest, 1)
    time.sleep(0.1)  # it takes the first, and blocks
    rows_to(guest, 100)
    guest.close()
    warned = capsys.readouterr().err
    assert warned.count("some are dropped") == 1
    assert "did not finish within 0.2 s" in warned and "missed 100 calls" in warned
    forever.set()


def test_one_that_takes_long_to_start_gets_its_rows_later(capsys: pytest.CaptureFixture[str]) -> None:
    logger, may_start = Logger(), threading.Event()

    def make() -> MetricLoggerInterface:
        may_start.wait()
        return logger

    guest = Guest(make, "", start_seconds=0.05)
    assert "is not ready after 0.05 s" in capsys.readouterr().err
    rows_to(guest, 3)
    may_start.set()
    guest.close()
    assert logger.rows == [0, 1, 2]


def test_a_full_disk_costs_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    file = RowFile(Path("/dev/full"))
    for step in range(3):
        file.write({"step": step})
    file.close()
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == 2
    assert "/dev/full cannot be written: No space left on device. Training goes on" in warned[0]
    assert "3 rows are not in /dev/full" in warned[1]


def test_rows_that_waited_for_space_come_whole_and_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    file = RowFile(path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    file.write({"step": 0})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (25, before[1]))  # room for one row and a part of the next
        for step in range(1, 4):
            file.write({"step": step})
        assert path.stat().st_size == 25
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    file.write({"step": 4})
    file.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4]
    warned = capsys.readouterr().err
    assert warned.count("cannot be written") == 1 and warned.count("can be written again") == 1
