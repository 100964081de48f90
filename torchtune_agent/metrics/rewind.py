"""A run that goes on from an earlier step: what it had logged after that step is put aside, not mixed with what comes.

So the logs of a run that was resumed, however often, are those of one that was never interrupted.
"""

import json
import re
from pathlib import Path

from torchtune_agent.metrics import breakdown
from torchtune_agent.metrics.detail import LEDGER

_OF_VALIDATION = re.compile(r"val[_/]|split$")  # tables, which have a split, are made at validations
_LEDGER_FILE = re.compile(r"steps_(\d+)_rank_\d+\.parquet")


def rewind(logs: Path, step: int, *, before_validation: bool = False) -> None:
    """Move the rows after `step` to `metrics.earlier-N.jsonl` and its like; with `before_validation` also what was
    logged at the validation after that step."""
    for path in (logs / "metrics.jsonl", *(breakdown.path_of(logs, by) for by in breakdown.KINDS)):
        if path.exists():
            _split(path, step, before_validation)
    # A file of the ledger ends where a checkpoint was saved, so none has steps from before and after one.
    ledger = logs / LEDGER
    later = [path for path in ledger.glob("*") if (m := _LEDGER_FILE.fullmatch(path.name)) and int(m[1]) > step]
    if later:
        aside = _free(ledger)
        aside.mkdir()
        for path in later:
            path.rename(aside / path.name)


def _split(path: Path, step: int, before_validation: bool) -> None:
    kept, later = [], []
    with path.open("rb") as lines:
        for line in lines:
            (kept if _is_until(line, step, before_validation) else later).append(line)
    if not later:
        return
    _free(path).write_bytes(b"".join(later))
    draft = path.with_name(f".{path.name}.partial")
    draft.write_bytes(b"".join(kept))
    draft.replace(path)


def _is_until(line: bytes, step: int, before_validation: bool) -> bool:
    """Whether a line is a whole row of a step up to `step`; a run that was killed may have left half a row."""
    try:
        row = json.loads(line)
        is_last = before_validation and row["step"] == step and any(_OF_VALIDATION.match(name) for name in row)
        return line.endswith(b"\n") and row["step"] <= step and not is_last
    except (ValueError, KeyError, TypeError):
        return False


def _free(path: Path) -> Path:
    """`path` under a name for what is earlier, which nothing has yet."""
    number = 1
    while (aside := path.with_name(f"{path.stem}.earlier-{number}{path.suffix}")).exists():
        number += 1
    return aside
