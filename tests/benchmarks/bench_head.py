"""What the loss head costs: with metrics against without, and against the ways others compute a loss.

    python tests/benchmarks/bench_head.py [--quick] [--tokens N] [--dtype fp32|bf16] [--json PATH]

Every contestant makes the loss, the gradient of the hidden states and that of the output weight. They take turns in one
process; peak memory is that of a fresh process each, above its inputs. On a CPU: hidden 896 and the vocabulary of
Qwen2.5, 4,096 tokens (the naive way then takes about 12 GB; --tokens makes all smaller alike). On a GPU: hidden 3584
in bf16, 8,192 tokens, where our head runs compiled too. Ends with a non-zero status when a target is missed.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from torchtune.modules.loss import CEWithChunkedOutputLoss

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.reference import IGNORE_INDEX, logit_statistics  # noqa: E402
from torchtune_agent.data import TokenClass  # noqa: E402
from torchtune_agent.losses import head  # noqa: E402
from torchtune_agent.metrics.table import add_rows, empty_table  # noqa: E402

SHARES = (0.3, 1.0)  # of the tokens that are supervised


@dataclass(frozen=True)
class Case:
    """The size of one comparison."""

    device: str
    dtype: str
    hidden: int
    vocabulary: int
    tokens: int
    share: float


class Inputs:
    """What every contestant starts from."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.dtype]
        on = {"device": case.device, "dtype": dtype}
        self.device = case.device
        self.hidden = torch.randn(1, case.tokens, case.hidden, **on).requires_grad_()
        self.weight = torch.empty(case.vocabulary, case.hidden, **on).normal_(0, 0.04).requires_grad_()
        self.labels = torch.randint(0, case.vocabulary, (1, case.tokens), device=case.device)
        supervised = torch.randperm(case.tokens)[: round(case.tokens * case.share)].sort().values
        self.supervised = supervised.to(case.device)
        self.masked = torch.full_like(self.labels, IGNORE_INDEX)
        self.masked[0, self.supervised] = self.labels[0, self.supervised]
        self.classes = torch.randint(1, len(TokenClass), (len(supervised),), device=case.device)
        self.weights = torch.ones(len(supervised), device=case.device)

    def finish(self, loss: torch.Tensor) -> None:
        (loss / len(self.supervised)).backward()
        self.hidden.grad = self.weight.grad = None
        if self.device == "cuda":
            torch.cuda.synchronize()


def ours(x: Inputs, measure: bool, compiled: bool = False) -> torch.Tensor:
    rows = x.hidden.flatten(0, 1).index_select(0, x.supervised)
    labels = x.labels.flatten()[x.supervised]
    chunking = head.Chunking(compiled=compiled)
    projection = head.Projection((rows, x.weight))
    loss, tokens = head.cross_entropy(projection, labels, x.weights, chunking, 10 if measure else None)
    if tokens is not None:
        add_rows(empty_table(x.device), tokens, x.classes)
    return loss


def torchtune_chunked(x: Inputs) -> torch.Tensor:
    """As its recipes do without compiling: the model's output in chunks, then the loss of each."""
    loss = CEWithChunkedOutputLoss()
    logits = [F.linear(chunk, x.weight) for chunk in x.hidden.chunk(loss.num_output_chunks, dim=1)]
    return loss(logits, x.masked) * len(x.supervised)


def torch_fused(x: Inputs) -> torch.Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x.hidden[0], x.weight, x.masked[0], reduction="sum", options=options)


def naive(x: Inputs) -> torch.Tensor:
    logits = F.linear(x.hidden[0], x.weight).float()
    with torch.no_grad():
        found = logit_statistics(logits[x.supervised], x.labels[0, x.supervised])
        rows = torch.stack([torch.ones_like(found["nll"]), *found.values()], 1)
        add_rows(empty_table(x.device), rows, x.classes)
    return F.cross_entropy(logits, x.masked[0], reduction="sum")


def matrix_products(x: Inputs) -> torch.Tensor:
    """The three products no way can do without, on the supervised rows; no loss."""
    with torch.no_grad():
        rows = x.hidden[0, x.supervised]
        logits = rows @ x.weight.t()
        logits @ x.weight  # noqa: B018
        logits.t() @ rows  # noqa: B018
    return (x.hidden[0, 0, 0] + x.weight[0, 0]) * 0


def contestants(device: str) -> dict[str, Callable[[Inputs], torch.Tensor]]:
    found: dict[str, Callable[[Inputs], torch.Tensor]] = {
        "ours": lambda x: ours(x, True),
        "ours, no metrics": lambda x: ours(x, False),
        "torchtune chunked": torchtune_chunked,
        "naive with metrics": naive,
        "matrix products": matrix_products,
    }
    if hasattr(F, "linear_cross_entropy"):
        found["torch fused"] = torch_fused
    if device == "cuda":
        found |= {
            "ours compiled": lambda x: ours(x, True, True),
            "ours compiled, no metrics": lambda x: ours(x, False, True),
        }
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore
        except ImportError:
            print("Liger is not installed and left out")
        else:
            liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
            found["liger"] = lambda x: liger(x.weight, x.hidden[0], x.masked[0])
    return found


def times(case: Case, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, the contestants taking turns; a first round is thrown away."""
    inputs, runs = Inputs(case), contestants(case.device)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        names = list(runs) if number % 2 else list(reversed(runs))  # whoever comes after a big one pays for it
        for name in names:
            began = time.perf_counter()
            inputs.finish(runs[name](inputs))
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def resident() -> int:
    """Bytes of memory of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_of(name: str, case: Case) -> int:
    """Bytes the contestant takes at most beyond its inputs; this process must be a fresh one."""
    inputs, run = Inputs(case), contestants(case.device)[name]
    if case.device == "cuda":
        inputs.finish(run(inputs))  # what compiling takes does not count
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        inputs.finish(run(inputs))
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident()
    inputs.finish(run(inputs))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 - before


def peaks(case: Case) -> dict[str, int]:
    found = {}
    for name in contestants(case.device):
        command = [sys.executable, __file__, "--peak-of", name, "--case", json.dumps(asdict(case))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = int(done.stdout.splitlines()[-1])
    return found


def compare(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds, gigabytes, and the median of every round's ratio to ours."""
    seconds, memory = times(case, rounds), peaks(case)
    print(f"\n{case}")
    table = {}
    for name, own in seconds.items():
        row = {"seconds": statistics.median(own), "gigabytes": memory[name] / 1e9}
        table[name] = row | {"rounds": own}
        print(f"  {name:26} {row['seconds']:8.3f} s {row['gigabytes']:8.2f} GB")
    return table


def ratio(table: dict, one: str, other: str, key: str) -> float:
    if key == "gigabytes":
        return table[one][key] / table[other][key]
    return statistics.median(a / b for a, b in zip(table[one]["rounds"], table[other]["rounds"], strict=True))


def cpu_results(tables: dict[float, dict]) -> list[tuple[str, float, float]]:
    some = tables[0.3]
    return [
        ("metrics on / off, time, 30 %", ratio(some, "ours", "ours, no metrics", "seconds"), 1.02),
        ("metrics on / off, time, 100 %", ratio(tables[1.0], "ours", "ours, no metrics", "seconds"), 1.02),
        ("ours / torchtune chunked, time", ratio(some, "ours", "torchtune chunked", "seconds"), 0.30),
        ("ours / torchtune chunked, memory", ratio(some, "ours", "torchtune chunked", "gigabytes"), 0.25),
        ("ours / naive with metrics, time", ratio(some, "ours", "naive with metrics", "seconds"), 0.25),
        ("ours / naive with metrics, memory", ratio(some, "ours", "naive with metrics", "gigabytes"), 0.15),
    ]


def gpu_results(tables: dict[float, dict]) -> list[tuple[str, float, float]]:
    whole, best = tables[1.0], "ours compiled"
    peers = [name for name in whole if not name.startswith("ours") and name != "matrix products"]
    return [
        ("metrics on / off, time", ratio(whole, best, "ours compiled, no metrics", "seconds"), 1.03),
        ("ours / matrix products, time", ratio(whole, best, "matrix products", "seconds"), 1.4),
        *((f"ours / {peer}, memory", ratio(whole, best, peer, "gigabytes"), 1.0) for peer in peers),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small vocabulary; its ratios mean less")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--dtype", choices=("fp32", "bf16"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print(peak_of(options.peak_of, Case(**json.loads(options.case))))
        return 0
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    on_gpu = torch.cuda.is_available()
    hardware = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{hardware}, torch {torch.__version__}, commit {commit}")
    device, dtype, hidden, tokens = ("cuda", "bf16", 3584, 8192) if on_gpu else ("cpu", "fp32", 896, 4096)
    vocabulary = 151_936
    if options.quick and not on_gpu:
        vocabulary, tokens = 32_768, 1024
    sizes = (device, options.dtype or dtype, hidden, vocabulary, options.tokens or tokens)
    rounds = options.rounds or (5 if options.quick or not on_gpu else 21)
    tables = {share: compare(Case(*sizes, share), rounds) for share in SHARES}
    results = (gpu_results if on_gpu else cpu_results)(tables)
    print()
    for name, value, target in results:
        print(f"{name:36} {value:8.3f}   target <= {target:g}   {'ok' if value <= target else 'MISSED'}")
    if options.json:
        rows = {name: {"value": value, "target": f"<= {target:g}"} for name, value, target in results}
        report = {"commit": commit, "hardware": hardware, "sizes": sizes, "results": rows, "tables": tables}
        options.json.write_text(json.dumps(report, indent=1))
    return 0 if all(value <= target for _, value, target in results) else 1


if __name__ == "__main__":
    sys.exit(main())
