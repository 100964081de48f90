"""Where numbers go: a JSON Lines file that is always written, and the user's metric logger beside it.

Only rank 0 has a RunLog. Neither a full disk nor the user's logger, which is a guest, can end a run.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune.training.metric_logging import MetricLoggerInterface

from torchtune_agent.config import redacted, resolved
from torchtune_agent.metrics import boards, breakdown
from torchtune_agent.metrics.guest import Guest
from torchtune_agent.metrics.rows import RowFile, drop_unfinished_line


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
            drop_unfinished_line(self.path)
        self.config_path = folder / "config.yaml"
        safe = OmegaConf.create(redacted(resolved(cfg)))
        OmegaConf.save(safe, self.config_path)
        self._rows = RowFile(self.path)
        self._guest: Guest | None = None
        if make_logger is not None:
            self._guest = Guest(make_logger, f"Everything is in {self.path}.")
            style = cfg.get("metric_names", "flat")
            self._guest.call("prepare", lambda logger: boards.prepare(logger, style))
            self._guest.call("log_config", lambda logger: logger.log_config(safe))

    def log(
        self, metrics: Mapping[str, float], step: int, histograms: Mapping[str, Sequence[float]] | None = None
    ) -> None:
        """Write a row. `histograms`, counts per bucket of metrics.histogram, are for the logger only."""
        self._rows.write(
            {"step": step, "time": round(time.time(), 3)} | {k: _json_number(v) for k, v in metrics.items()}
        )
        if self._guest is None:
            return
        values = dict(metrics)  # the caller's may have changed by the time it is logged
        self._guest.call("log_dict", lambda logger: logger.log_dict(values, step=step))
        if histograms:
            self._guest.call("add_histograms", lambda logger: boards.add_histograms(logger, histograms, step))

    def log_table(self, by: str, split: str, rows: Mapping[str, Mapping[str, float]], step: int) -> None:
        """Write numbers per tool or per data source, see metrics.breakdown."""
        try:
            breakdown.write_rows(self.path.parent, by, split, rows, step)
        except OSError as error:
            print(f"warning: the table by {by} of step {step} is not written: {error}", file=sys.stderr)
        if self._guest is not None:
            name, lines = f"{split}_by_{by}", breakdown.as_lines(by, rows)
            self._guest.call("add_table", lambda logger: boards.add_table(logger, name, lines, step))

    def close(self, seconds: float | None = None) -> None:
        """Finish the file and the logger; `seconds` limits how long is waited for the latter."""
        self._rows.close()
        if self._guest is not None:
            self._guest.call("close", lambda logger: logger.close())
            self._guest.close(seconds)


def _json_number(value: float) -> float | str:
    """JSON has no NaN or infinity; say so in words instead of losing them."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, numbers as numbers."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: float(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows]
