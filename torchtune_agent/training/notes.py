"""What a worker leaves for the launcher on its machine: a line in a file, current at any moment, also after kill -9.

The launcher alone sees how a process ended, and the process alone knows what it was doing. Imports nothing heavy.
"""

import json
import os
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "TORCHTUNE_AGENT_NOTES"  # set by our launcher, see launch.py
_SIZE = 256  # bytes; a note of one size is replaced in one write


class Note:
    """This process's line. Without our launcher nobody reads one, and none is written."""

    def __init__(self, rank: int) -> None:
        folder = os.environ.get(FOLDER_VARIABLE)
        self._file = -1
        self._values: dict[str, Any] = {"rank": rank, "pid": os.getpid(), "step": 0, "state": "starting", "said": False}
        if folder and Path(folder).is_dir():
            self._file = os.open(Path(folder) / f"rank_{rank}.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self.write()

    @property
    def has_reader(self) -> bool:
        return self._file >= 0

    def write(self, **values: Any) -> None:
        """Change values: `step`; `state`: starting, training, stopped, ended, failed; `said`: the user knows why."""
        self._values |= values
        if self._file >= 0:
            os.pwrite(self._file, json.dumps(self._values).ljust(_SIZE).encode(), 0)


def read_notes(folder: Path) -> dict[int, dict[str, Any]]:
    """The last note of every rank on this machine."""
    notes = {}
    for path in folder.glob("rank_*.json"):
        text = path.read_text()
        if text.strip():
            note = json.loads(text)
            notes[note["rank"]] = note
    return notes
