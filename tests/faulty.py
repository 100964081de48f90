"""A dataset in which something goes wrong on one rank when it reaches a sample: what real runs are tested with.

It is named in a config like any user's: `dataset._component_=tests.faulty.dataset trusted_components=[tests]`.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from torchtune_agent.data import IGNORE_INDEX, AgentSFTDataset, toolworld_dataset

CANARY = "canary-in-an-exception-1234"


def dataset(
    tokenizer: Any,
    *,
    fault: str = "none",
    rank: int = 1,
    at: int = 9,
    times: int = 1,
    api_token: str = "",
    url: str = "",
    **options: Any,
) -> Any:
    """ToolWorld's training data. When `rank` (-1: every rank) reads its sample number `at`, `fault` happens to it, and
    to `times` samples in all; the time goes to a file `fault` in the folder that `RECORDS` in the environment names.
    `api_token` and `url` are secrets that a config may hold."""
    made = toolworld_dataset(tokenizer, **options)
    made.__class__ = _Faulty
    assert isinstance(made, _Faulty)
    made.fault = fault if rank in (-1, int(os.environ.get("RANK", 0))) else "none"
    made.first, made.last, made.num_read = at, at + times - 1, 0
    return made


class _Faulty(AgentSFTDataset):
    fault: str
    first: int
    last: int
    num_read: int

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        self.num_read += 1
        if self.fault == "none" or not self.first <= self.num_read <= self.last:
            return sample
        if records := os.environ.get("RECORDS"):
            (Path(records) / "fault").write_text(str(time.time()))
        return _FAULTS[self.fault](sample)


def _die(sample: dict[str, Any]) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return sample


def _die_at_first(sample: dict[str, Any]) -> dict[str, Any]:
    return _die(sample) if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else sample


def _hang(sample: dict[str, Any]) -> dict[str, Any]:
    time.sleep(1000)
    return sample


def _freeze(sample: dict[str, Any]) -> dict[str, Any]:
    """All threads of the process at once, as in the kernel's hands."""
    os.kill(os.getpid(), signal.SIGSTOP)
    return sample


def _raise(sample: dict[str, Any]) -> dict[str, Any]:
    raise RuntimeError(f"a sample broke \x1b[2J\x1b]0;owned\x07 https://user:{CANARY}@example.org")


def _signal_launcher(sample: dict[str, Any]) -> dict[str, Any]:
    for number in (signal.SIGTERM, signal.SIGUSR1):  # a second one does no harm
        os.kill(os.getppid(), number)
        time.sleep(0.2)
    return sample


def _signal_self(sample: dict[str, Any]) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGUSR1)
    return sample


def _infinite(sample: dict[str, Any]) -> dict[str, Any]:
    return {**sample, "weights": np.full(len(sample["tokens"]), np.inf, np.float32)}


def _untrained(sample: dict[str, Any]) -> dict[str, Any]:
    return {**sample, "labels": np.full(len(sample["tokens"]), IGNORE_INDEX, np.int64)}


_FAULTS = {
    "none": lambda sample: sample,
    "die": _die,
    "die at first": _die_at_first,
    "hang": _hang,
    "freeze": _freeze,
    "raise": _raise,
    "signal launcher": _signal_launcher,
    "signal self": _signal_self,
    "infinite": _infinite,
    "untrained": _untrained,
}
