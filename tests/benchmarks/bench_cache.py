"""What opening a data set costs: memory while it is tokenized, and time when its tokens are there.

    python tests/benchmarks/bench_cache.py [--quick] [--json PATH]

Writes a JSON Lines file of 2 GB (20 MB with --quick) of which a tenth is conversation, as in logs that carry much else.
Memory is that of the process that trains, without the pages of mapped files, which the system takes back when it
needs them. Ends with a non-zero status when a target is missed.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from torchtune_agent.data import AgentSFTDataset  # noqa: E402
from torchtune_agent.data.toolworld import toolworld_tokenizer  # noqa: E402
from torchtune_agent.toolworld import ToolWorld  # noqa: E402


def write_data(path: Path, size: int) -> None:
    rng = np.random.default_rng(0)
    rows = [
        json.dumps(row | {"log": rng.bytes(6000).hex()}) + "\n"
        for row in ToolWorld(num_tools=200, seed=0).conversations("train", 500)
    ]
    block = "".join(rows)
    with path.open("w") as file:
        for _ in range(max(1, size // len(block))):
            file.write(block)


def resident_mb() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    fields = {line.split(":")[0]: line.split()[1] for line in status if line.startswith("Rss")}
    return int(fields["RssAnon"]) / 1024


class Peak:
    """The most memory in use while it watches, beyond what was in use before."""

    def __enter__(self) -> "Peak":
        self._before = self._most = resident_mb()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self._most = max(self._most, resident_mb())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.growth = max(self._most, resident_mb()) - self._before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tokenizer = toolworld_tokenizer(4096)
    tokenizer.encode("loads what is loaded once")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.jsonl"
        write_data(path, 20_000_000 if arguments.quick else 2_000_000_000)

        def open_dataset() -> AgentSFTDataset:
            return AgentSFTDataset(tokenizer, data_files=str(path), cache_dir=f"{folder}/cache")

        began = time.perf_counter()
        with Peak() as first:
            dataset = open_dataset()
        first_seconds = time.perf_counter() - began
        time.sleep(2.1)  # a file that changed this moment is read again, see fingerprint.of_file
        open_dataset()
        began = time.perf_counter()
        with Peak() as again:
            dataset = open_dataset()
        again_seconds = time.perf_counter() - began
        chosen = np.random.default_rng(0).integers(0, len(dataset), 2000)
        began = time.perf_counter()
        for index in chosen.tolist():
            dataset[index]
        read_seconds = time.perf_counter() - began
        result = {
            "file_mb": path.stat().st_size / 1e6,
            "samples": len(dataset),
            "tokens": int(dataset.lengths.sum()),
            "first_open_seconds": first_seconds,
            "first_open_growth_mb": first.growth,
            "reopen_seconds": again_seconds,
            "reopen_growth_mb": again.growth,
            "reopen_over_first": again_seconds / first_seconds,
            "microseconds_per_random_read": read_seconds / len(chosen) * 1e6,
        }
    for name, value in result.items():
        print(f"{name:32}{value:>16,.4g}")
    targets = {"first_open_growth_mb": 300, "reopen_growth_mb": 300, "reopen_seconds": 5}
    missed = [f"{name} is {result[name]:.4g}, target {most}" for name, most in targets.items() if result[name] > most]
    print("\n".join(missed) if missed else "targets met: " + ", ".join(f"{k} <= {v}" for k, v in targets.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
