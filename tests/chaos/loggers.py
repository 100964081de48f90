"""Metric loggers that raise, block, or take rows too slowly: a run must lose nothing by them but a warning."""

import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from torchtune.training.metric_logging import MetricLoggerInterface

from tests.chaos.place import TWENTY, Job, Place, check_equal, check_said
from tests.training_runs import launch

_MISSED = "Everything is in "
_FAULTS = {  # what goes wrong in which call of the logger, and what is said
    "raise in __init__": ("__init__ raises", "warning: metric_logger raised RuntimeError: no such host"),
    "raise in log_config": ("log_config raises", "log_config raised RuntimeError: no such host"),
    "raise in log_dict": ("log_dict raises", "log_dict raised RuntimeError: no such host"),
    "raise in close": ("close raises", "close raised RuntimeError: no such host"),
    "exit in log_dict": ("log_dict exits", "log_dict raised SystemExit: 3"),
    "block in __init__": ("__init__ blocks", "is not ready after 120 s. The run goes on; rows wait for it."),
    "block in log_dict": ("log_dict blocks", "did not finish within 60 s. Everything is in "),
    "block in close": ("close blocks", "did not finish within 60 s. Everything is in "),
}


class Faulty(MetricLoggerInterface):
    """Does `what`, CALL raises|exits|blocks, to whoever calls CALL. Named in a config like any user's."""

    def __init__(self, what: str = "", seconds: float = 0.0, **options: Any) -> None:
        self._call, _, self._fault = what.partition(" ")
        self._seconds = seconds
        self._do("__init__")

    def _do(self, call: str) -> None:
        if call == self._call and self._fault == "raises":
            raise RuntimeError("no such host")
        if call == self._call and self._fault == "exits":
            sys.exit(3)
        if call == self._call and self._fault == "blocks":
            time.sleep(10_000)

    def log_config(self, config: Any) -> None:
        self._do("log_config")

    def log(self, name: str, data: Any, step: int) -> None:
        self._do("log")

    def log_dict(self, payload: Mapping[str, Any], step: int) -> None:
        self._do("log_dict")
        time.sleep(self._seconds)

    def close(self) -> None:
        self._do("close")


def jobs(place: Place) -> list[Job]:
    return [partial(_fault, place, name) for name in reversed(_FAULTS)] + [partial(_slow, place)]


def _of(what: str) -> tuple[str, ...]:
    component = "tests.chaos.loggers.Faulty"
    return (f"metric_logger={component}", f"metric_logger.what={what}", "trusted_components=[tests]")


def _fault(place: Place, name: str) -> None:
    what, text = _FAULTS[name]
    fault = f"metric logger: {name}"
    folder = place.new(fault)
    with place.table.trial(fault, folder):
        run = launch(folder, *TWENTY, *_of(what), limit=400)
        assert run.codes == [0, 0], f"{run.codes} {run.output[-3000:]}"
        check_said(run.output, text, _MISSED)
        assert run.output.count("warning: ") <= 3, run.output[-3000:]
        check_equal(run, place.whole(*TWENTY))


def _slow(place: Place) -> None:
    """A thousand calls wait; what is more is dropped and counted. No row of ours is lost."""
    fault = "metric logger: slower than training"
    folder = place.new(fault)
    options = ("dataset.num_tasks=1100", "batch_size=1", "gradient_accumulation_steps=1", "epochs=1")
    seldom = ("save_every_n_steps=null", "run_val_every_n_steps=null", "metric_logger.seconds=5")
    with place.table.trial(fault, folder):
        run = launch(folder, *options, *seldom, *_of("nothing"), size=1, limit=900)
        assert run.codes == [0], f"{run.codes} {run.output[-3000:]}"
        check_said(run.output, "takes rows more slowly than they come; some are dropped", "missed", _MISSED)
        assert [row["step"] for row in run.rows if "loss" in row] == list(range(1, 1101))
