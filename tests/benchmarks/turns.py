"""How benchmarks compare: contestants take turns, ratios are taken round by round, targets stand beside them."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]

Times = dict[str, list[float]]  # seconds of every round
Result = tuple[str, float, float]  # what, its value, and what it may be at most


def seconds(contestants: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: bool = True) -> Times:
    """Seconds of every round; to warm up, a first one is thrown away.

    On a CPU with one thread they are the processor's, which other programs on the machine change little.
    """
    alone = not torch.cuda.is_available() and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    times: Times = {name: [] for name in contestants}
    for number in range(0 if warm_up else 1, rounds + 1):
        names = list(contestants)
        for name in names if number % 2 else reversed(names):
            began = clock()
            contestants[name]()
            if number:
                times[name].append(clock() - began)
    return times


def ratio(times: Times, one: str, other: str) -> float:
    """The median over the rounds of how much longer `one` took than `other`."""
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def hardware() -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    on = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return f"{on}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, commit {commit.strip()}"


def report(results: Sequence[Result], path: Path | None, details: Any) -> int:
    """Print the results beside their targets, write them to `path`; the exit status."""
    print()
    for name, value, target in results:
        print(f"{name:40} {value:8.3f}   target <= {target:g}   {'ok' if value <= target else 'MISSED'}")
    if path is not None:
        rows = {name: {"value": value, "target": f"<= {target:g}"} for name, value, target in results}
        path.write_text(json.dumps({"hardware": hardware(), "results": rows, "details": details}, indent=1))
    return 0 if all(value <= target for _, value, target in results) else 1
