"""What it takes to pick 10,000 of 1,000,000 samples by greedy k-center, and how good the picks are.

    python tests/benchmarks/bench_selection.py [--quick] [--json PATH]

`--quick` picks 2,000 of 100,000 and has a fiftieth of the time. Picks are compared with those of the plain loop on
20,000 samples. Ends with a non-zero status when a target is missed.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks import turns  # noqa: E402
from torchtune_agent.selection.kcenter import k_center  # noqa: E402

WIDTH = 256
SECONDS, GIBIBYTES, RADIUS = 300.0, 4.0, 1.05


def isotropic(number: int) -> torch.Tensor:
    return torch.randn(number, WIDTH)


def clusters(number: int) -> torch.Tensor:
    centers = torch.randn(200, WIDTH)
    vectors = torch.randn(number, WIDTH).mul_(0.3)
    for block in vectors.split(65536):
        block += centers[torch.randint(len(centers), (len(block),))]
    return vectors


def few_directions(number: int) -> torch.Tensor:
    """Near a plane of eight dimensions."""
    directions = torch.randn(8, WIDTH)
    vectors = torch.randn(number, WIDTH).mul_(0.01)
    for block in vectors.split(65536):
        block += torch.randn(len(block), 8) @ directions
    return vectors


KINDS: dict[str, Callable[[int], torch.Tensor]] = {
    "isotropic": isotropic,
    "clusters": clusters,
    "few directions": few_directions,
}


def made(kind: str, number: int) -> torch.Tensor:
    torch.manual_seed(0)
    vectors = KINDS[kind](number)
    for block in vectors.split(65536):
        block /= block.norm(dim=1, keepdim=True)
    return vectors


def plain_radius(vectors: torch.Tensor, number: int) -> float:
    """Of the picks of the plain loop, which starts where ours does."""
    pick = int((vectors - vectors.mean(0)).norm(dim=1).argmin())
    nearest = torch.full((len(vectors),), torch.inf)
    for _ in range(number):
        nearest = torch.minimum(nearest, (vectors - vectors[pick]).square().sum(1))
        pick = int(nearest.argmax())
    return float(nearest.max().sqrt())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # so that seconds are the processor's, whoever else uses the machine
    print(turns.hardware())
    number, picks, limit = (100_000, 2_000, SECONDS / 50) if options.quick else (1_000_000, 10_000, SECONDS)
    results: list[turns.Result] = []
    for kind in KINDS:
        subset = made(kind, 20_000)
        ratio = k_center(subset, 200).radius / plain_radius(subset, 200)
        results.append((f"{kind}: radius, of the plain loop's", ratio, RADIUS))
        vectors = made(kind, number)
        began = time.process_time()
        k_center(vectors, picks)
        results.append((f"{kind}: seconds, {picks:,} of {number:,}", time.process_time() - began, limit))
        del vectors
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    results.append(("GiB at most, vectors included", peak, GIBIBYTES))
    return turns.report(results, options.json, {"width": WIDTH})


if __name__ == "__main__":
    sys.exit(main())
