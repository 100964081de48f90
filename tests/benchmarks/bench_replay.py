"""What replay costs beside the replayed tokens: keeping and drawing, in a full buffer against an empty one and a step.

    python tests/benchmarks/bench_replay.py [--quick] [--json PATH]

A step offers 32 new samples and draws 8. Buffers hold 1,000,000 samples, each a number as a run keeps them. A step of
the tiny model on as many samples stands beside it: the smallest there is, so the share is the largest. Ends with a
non-zero status when a target is missed.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchtune.models.qwen2 import qwen2

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks import turns  # noqa: E402
from torchtune_agent.continual import STRATEGIES, ReplayBuffer  # noqa: E402
from torchtune_agent.continual.held import NUM_CLASSES  # noqa: E402
from torchtune_agent.data import Collator  # noqa: E402
from torchtune_agent.data.toolworld import toolworld_dataset, toolworld_tokenizer  # noqa: E402
from torchtune_agent.losses import CrossEntropy  # noqa: E402

HELD, NEW, REPLAYED = 1_000_000, 32, 8
SMALL = 1_000
STEPS = 50  # of the buffer, in a round
# The trees of a large buffer are twice as high and do not fit into a processor's cache.
SLOWDOWN, SHARE = 4.0, 0.03


def offered(rng: np.random.Generator, number: int) -> dict[str, Any]:
    shares = np.zeros(NUM_CLASSES)
    shares[2:6] = rng.random(4)
    return {"importance": rng.random() + 1e-3, "tools": (f"tool_{number % 1200}",), "class_shares": shares}


def filled(strategy: str, size: int) -> ReplayBuffer:
    """Full, and with as many samples seen again, as a stream goes on."""
    buffer, rng = ReplayBuffer(size, strategy=strategy), np.random.default_rng(0)
    for number in range(2 * size):
        buffer.offer(number, **offered(rng, number))
    return buffer


def stepper(buffer: ReplayBuffer) -> Callable[[], None]:
    rng, count = np.random.default_rng(1), 0

    def steps() -> None:
        nonlocal count
        for _ in range(STEPS):
            count += 1
            for number in range(NEW):
                buffer.offer(number, **offered(rng, number))
            buffer.draw(REPLAYED, key=[count], progress=0.5)

    return steps


def offers_alone() -> Callable[[], None]:
    """What the benchmark itself does to make the samples' facts."""
    rng = np.random.default_rng(1)

    def steps() -> None:
        for number in range(NEW * STEPS):
            offered(rng, number)

    return steps


def train_step() -> Callable[[], None]:
    """Of the tiny configuration, on the new and replayed samples of one step."""
    torch.manual_seed(0)
    model = qwen2(2048, 4, 4, 2, 128, 384, 1024, tie_word_embeddings=True)
    data = toolworld_dataset(toolworld_tokenizer(640), num_tasks=NEW + REPLAYED, num_tools=100)
    batches = [Collator(0)([[data[i]] for i in range(k, k + 4)]) for k in range(0, NEW + REPLAYED, 4)]
    optimizer, objective = torch.optim.AdamW(model.parameters(), 1e-3), CrossEntropy()

    def step() -> None:
        for batch in batches:
            (objective(model, batch, with_statistics=False).loss_sum / 1e4).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="50,000 samples instead of 1,000,000")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(turns.hardware())
    rounds = 5 if options.quick else 11
    step, alone = train_step(), offers_alone()
    results, details = [], {}
    for strategy in STRATEGIES:
        large = HELD // 20 if options.quick else HELD
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.process_time()
        buffers = {"small": filled(strategy, SMALL), "large": filled(strategy, large)}
        seconds = time.process_time() - began
        mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        contestants = {name: stepper(buffer) for name, buffer in buffers.items()}
        times = turns.seconds({**contestants, "alone": alone, "step": step}, rounds)
        own = {
            name: [max(0.0, a - b) / STEPS for a, b in zip(times[name], times["alone"], strict=True)]
            for name in contestants
        }
        slowdown = turns.ratio(own, "large", "small")
        share = turns.ratio({"large": own["large"], "step": times["step"]}, "large", "step")
        microseconds = 1e6 * float(np.median(own["large"]))
        details[strategy] = {"samples": large, "microseconds a step": microseconds, "seconds to fill": seconds}
        print(
            f"{strategy:14} {large:>9,} samples, filled in {seconds:5.1f} s, {mib:5.0f} MiB more at the peak: "
            f"{microseconds:6.0f} us a step, {1e6 * float(np.median(own['small'])):6.0f} with {SMALL:,}"
        )
        results += [
            (f"{strategy}: full over small", slowdown, SLOWDOWN),
            (f"{strategy}: share of a step", share, SHARE),
        ]
        del buffers, contestants
    return turns.report(results, options.json, details)


if __name__ == "__main__":
    sys.exit(main())
