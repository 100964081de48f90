"""Every fault that a run must survive, tried for real; ends in a table, and with 1 where anything did not survive.

    python -m tests.chaos [PART ...] [--seed N] [--at-once N] [--record PATH]

Runs in a mount namespace of its own where the system allows that, for disks that are full or read-only.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests.chaos import damage, disks, hostile, kills, loggers, numbers, ranks, stops
from tests.chaos.place import Job, Place
from tests.chaos.table import Table

# Those that mostly wait come first, so that others work meanwhile.
_PARTS = {
    "loggers": loggers.jobs,
    "ranks": ranks.jobs,
    "kills": kills.jobs,
    "stops": stops.jobs,
    "disks": disks.jobs,
    "numbers": numbers.jobs,
    "hostile": hostile.jobs,
    "damage": damage.jobs,
}
_IN_NAMESPACE = "CHAOS_IN_NAMESPACE"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(_PARTS)}; all without one")
    parser.add_argument("--seed", type=int, default=0)
    # On two cores three, because a trial waits for disks and its ranks for one another
    parser.add_argument("--at-once", type=int, default=3, help="trials that run at the same time (3)")
    parser.add_argument("--record", type=Path, help="write table and hardware there (.md), and beside it .json")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(_PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    _enter_namespace()
    os.environ["OMP_NUM_THREADS"] = "1"
    started, table = time.monotonic(), Table()
    place = Place(Path(tempfile.mkdtemp(prefix="chaos_")), table, args.seed)
    os.environ["TORCHTUNE_AGENT_CACHE"] = str(place.folder / "cache")
    found: list[Job] = []
    for name in args.parts or _PARTS:
        found += _PARTS[name](place)
    with ThreadPoolExecutor(args.at_once) as pool:
        for future in [pool.submit(job) for job in found]:
            future.result()
    minutes = (time.monotonic() - started) / 60
    print(f"\n{table.text()}\n\n{minutes:.1f} minutes, seed {args.seed}")
    if args.record:
        args.record.write_text(_record(table, minutes, args.seed, args.parts or list(_PARTS)), encoding="utf-8")
        args.record.with_suffix(".json").write_text(table.to_json(), encoding="utf-8")
    if table.all_survived:
        shutil.rmtree(place.folder, ignore_errors=True)
    return 0 if table.all_survived else 1


def _enter_namespace() -> None:
    """Start again where this process may mount, and where its mounts end with it."""
    if _IN_NAMESPACE in os.environ:
        return
    command = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    os.environ[_IN_NAMESPACE] = "yes"
    try:
        is_allowed = subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        is_allowed = False
    if is_allowed:
        os.execvp(command[0], [*command, sys.executable, "-m", "tests.chaos", *sys.argv[1:]])
    os.environ[_IN_NAMESPACE] = "no"


def _record(table: Table, minutes: float, seed: int, parts: list[str]) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return (
        f"# make chaos: what was tried, and what survived\n\n{os.cpu_count()} CPU cores ({platform.machine()}), "
        f"Python {platform.python_version()}, torch {torch.__version__}, commit {commit.stdout.strip()}; "
        f"seed {seed}, {minutes:.1f} minutes, system load {os.getloadavg()[1]:.1f}; parts: {', '.join(parts)}\n\n"
        f"{table.text()}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
