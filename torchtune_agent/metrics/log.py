"""Where numbers go: a JSON Lines file that is always written, and the user's metric logger beside it.

Only rank 0 has a RunLog. The user's logger is a guest: when it raises it is reported once and left alone.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from torchtune.training.metric_logging import MetricLoggerInterface

from torchtune_agent.config import redacted, resolved
from torchtune_agent.errors import UserError
from torchtune_agent.metrics import boards, breakdown

T = TypeVar("T")


class RunLog:
    """Writes `metrics.jsonl` and `config.yaml` under `folder`, and passes every row on to the logger.

    The rows of an earlier run in the same folder are kept under another name, unless this one continues it.
    """

    def __init__(
        self,
        folder: Path,
        cfg: DictConfig,
        make_logger: Callable[[], MetricLoggerInterface] | None = None,
        *,
        continues: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        if self.path.exists() and not continues:
            earlier = len(list(folder.glob("metrics.earlier-*.jsonl"))) + 1
            for path in (self.path, *(breakdown.path_of(folder, by) for by in breakdown.KINDS)):
                if path.exists():
                    path.rename(folder / f"{path.stem}.earlier-{earlier}.jsonl")
        if self.path.exists():
            _drop_unfinished_line(self.path)
        self.config_path = folder / "config.yaml"
        self._file = self.path.open("a", encoding="utf-8")
        safe = OmegaConf.create(redacted(resolved(cfg)))
        OmegaConf.save(safe, self.config_path)
        self._logger: MetricLoggerInterface | None = None
        if make_logger is not None:
            self._logger = self._guarded("metric_logger", make_logger)
            self._tell_board(boards.prepare, cfg.get("metric_names", "flat"))
            self._call_logger("log_config", safe)

    def log(
        self, metrics: Mapping[str, float], step: int, histograms: Mapping[str, Sequence[float]] | None = None
    ) -> None:
        """Write a row. `histograms`, counts per bucket of metrics.histogram, are for the logger only."""
        row = {"step": step, "time": round(time.time(), 3)} | {k: _json_number(v) for k, v in metrics.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._call_logger("log_dict", metrics, step=step)
        if histograms:
            self._tell_board(boards.add_histograms, histograms, step)

    def log_table(self, by: str, split: str, rows: Mapping[str, Mapping[str, float]], step: int) -> None:
        """Write numbers per tool or per data source, see metrics.breakdown."""
        breakdown.write_rows(self.path.parent, by, split, rows, step)
        self._tell_board(boards.add_table, f"{split}_by_{by}", breakdown.as_lines(by, rows), step)

    def close(self) -> None:
        self._file.close()
        self._call_logger("close")

    def _call_logger(self, method: str, *args: Any, **kwargs: Any) -> None:
        if self._logger is not None:
            name = f"{type(self._logger).__name__}.{method}"
            self._guarded(name, partial(getattr(self._logger, method), *args, **kwargs))

    def _tell_board(self, tell: Callable[..., None], *args: Any) -> None:
        if self._logger is not None:
            self._guarded(f"{type(self._logger).__name__}: {tell.__name__}", partial(tell, self._logger, *args))

    def _guarded(self, name: str, call: Callable[[], T]) -> T | None:
        """Run a piece of the user's logger. A mistake in its config is the user's to mend; anything else is reported
        and ends the logger, not the run."""
        try:
            return call()
        except UserError:
            raise
        except Exception as error:  # whatever a logging service throws must not end a training run
            print(
                f"warning: {name} raised {type(error).__name__}: {redacted(str(error))}\n"
                f"         It gets no more rows in this run; everything is in {self.path}.",
                file=sys.stderr,
            )
            self._logger = None
            return None


def _drop_unfinished_line(path: Path) -> None:
    """A run that was killed may have left half a row, which the next one would spoil."""
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            file.seek(end - 1)
            if file.read(1) == b"\n":
                break
            end -= 1
        file.truncate(end)


def _json_number(value: float) -> float | str:
    """JSON has no NaN or infinity; say so in words instead of losing them."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, numbers as numbers."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: float(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows]
