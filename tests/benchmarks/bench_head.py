"""What the loss head costs: with metrics against without, and against the ways others compute a loss.

    python tests/benchmarks/bench_head.py [--quick] [--tokens N] [--rounds N] [--threads N] [--json PATH]

Every contestant makes the loss, the gradient of the hidden states and that of the output weight. They take turns in one
process; peak memory is that of a fresh process each, above its inputs. On a CPU: fp32, hidden 896 and the vocabulary of
Qwen2.5, 4,096 tokens (the naive way then takes about 12 GB; --tokens makes all smaller alike). On a GPU: bf16, hidden
3584, 8,192 tokens, where our head is compiled. Ends with a non-zero status when a target is missed.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torchtune.modules.loss import CEWithChunkedOutputLoss

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks import turns  # noqa: E402
from tests.reference import IGNORE_INDEX, logit_statistics  # noqa: E402
from torchtune_agent.data import TokenClass  # noqa: E402
from torchtune_agent.losses import head  # noqa: E402
from torchtune_agent.metrics.table import add_rows, empty_table  # noqa: E402


@dataclass(frozen=True)
class Case:
    """The size of one comparison."""

    device: str
    dtype: str
    hidden: int
    vocabulary: int
    tokens: int
    share: float  # of the tokens that are supervised
    chunk: int = 2048  # rows of ours


class Inputs:
    """What every contestant starts from."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        on: dict[str, Any] = {"device": case.device, "dtype": getattr(torch, case.dtype)}
        self.case = case
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
        if self.case.device == "cuda":
            torch.cuda.synchronize()


def ours(x: Inputs, measure: bool, compiled: bool = False) -> torch.Tensor:
    rows = x.hidden.flatten(0, 1).index_select(0, x.supervised)
    labels = x.labels.flatten()[x.supervised]
    chunking = head.Chunking(x.case.chunk, compiled)
    projection = head.Projection((rows, x.weight))
    loss, tokens = head.cross_entropy(projection, labels, x.weights, chunking, 10 if measure else None)
    if tokens is not None:
        add_rows(empty_table(x.case.device), tokens, x.classes)
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
    """All logits, their softmax, `topk`, and then a look at where the supervised tokens are."""
    logits = F.linear(x.hidden[0], x.weight).float()
    with torch.no_grad():
        found = logit_statistics(logits, x.labels[0])
        rows = torch.stack([torch.ones_like(found["nll"]), *found.values()], 1)[x.supervised]
        add_rows(empty_table(x.case.device), rows, x.classes)
    return F.cross_entropy(logits, x.masked[0], reduction="sum")


def matrix_products(x: Inputs) -> torch.Tensor:
    """The three products no way can do without, on the supervised rows; no loss."""
    with torch.no_grad():
        rows = x.hidden[0, x.supervised]
        logits = rows @ x.weight.t()
        torch.mm(logits, x.weight)
        torch.mm(logits.t(), rows)
    return (x.hidden[0, 0, 0] + x.weight[0, 0]) * 0


Contestant = Callable[[Inputs], torch.Tensor]
SLOW = "torch fused, slow"  # on a CPU it takes five times as long as the plain way: one round is enough
JUDGED = ("ours", "torchtune chunked", "naive with metrics")  # by their memory, on a CPU


def contestants(case: Case) -> dict[str, Contestant]:
    found: dict[str, Contestant] = {
        "ours": lambda x: ours(x, True),
        "ours, no metrics": lambda x: ours(x, False),
        "torchtune chunked": torchtune_chunked,
        "naive with metrics": naive,
        "matrix products": matrix_products,
    }
    if case.device == "cuda":
        found["ours compiled"] = lambda x: ours(x, True, True)
        found["ours compiled, no metrics"] = lambda x: ours(x, False, True)
        if hasattr(F, "linear_cross_entropy"):
            found["torch fused"] = torch_fused
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore
        except ImportError:
            print("Liger is not installed and left out")
        else:
            liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
            found["liger"] = lambda x: liger(x.weight, x.hidden[0], x.masked[0])
    elif case.vocabulary > 100_000 and hasattr(F, "linear_cross_entropy"):
        found[SLOW] = torch_fused
    return found


def resident() -> int:
    """Bytes of memory of this process, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_of(name: str, case: Case) -> int:
    """Bytes the contestant takes at most beyond its inputs; this process must be a fresh one."""
    run = contestants(case)[name]
    tiny = Inputs(case if case.device == "cuda" else replace(case, tokens=64, vocabulary=256))
    tiny.finish(run(tiny))  # what compiling takes does not count, nor does the code of libraries
    del tiny
    inputs = Inputs(case)
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        inputs.finish(run(inputs))
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident()
    inputs.finish(run(inputs))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 - before


def peaks(case: Case, names: list[str]) -> dict[str, int]:
    found = {}
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed is given back, and does not count again
    for name in names:
        command = [sys.executable, __file__, "--peak-of", name, "--case", json.dumps(asdict(case))]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        found[name] = int(done.stdout.splitlines()[-1])
    return found


@dataclass(frozen=True)
class Plan:
    """What is compared where. In earnest all three are one; the quick ones are too small for the other questions."""

    metrics: Case  # with metrics against without: a difference of a percent needs many rounds
    times: Case  # against the others: needs enough tokens, as every way makes the gradient of the whole weight
    memory: Case
    rounds: int


@dataclass
class Table:
    """What was measured where one share of the tokens is supervised."""

    metrics: turns.Times
    times: turns.Times
    memory: dict[str, int]

    def memory_ratio(self, one: str, other: str) -> float:
        return self.memory[one] / self.memory[other]


def take_turns(case: Case, names: Collection[str], rounds: int, *, warm_up: bool = True) -> turns.Times:
    inputs, runs = Inputs(case), contestants(case)
    return turns.seconds(
        {name: lambda run=runs[name]: inputs.finish(run(inputs)) for name in names}, rounds, warm_up=warm_up
    )


def measure(plan: Plan, *, others_once: bool = False) -> Table:
    names = contestants(plan.times).keys() - {SLOW}
    metrics = take_turns(plan.metrics, [name for name in names if name.startswith("ours")], max(9, plan.rounds))
    times = take_turns(plan.times, sorted(names), 1 if others_once else plan.rounds, warm_up=not others_once)
    if SLOW in contestants(plan.times):
        times |= take_turns(plan.times, [SLOW], 1, warm_up=False)
    memory = peaks(plan.memory, [name for name in times if name in JUDGED or plan.memory == plan.times])
    print(f"\ntime: {plan.times}\nmemory: {plan.memory}")
    for name, own in times.items():
        peak = f"{memory[name] / 1e9:8.2f} GB" if name in memory else ""
        print(f"  {name:26} {statistics.median(own):8.3f} s {peak}")
    return Table(metrics, times, memory)


def cpu_results(tables: dict[float, Table]) -> list[turns.Result]:
    some = tables[0.3]
    return [
        *(
            (f"metrics on / off, time, {share:.0%}", turns.ratio(table.metrics, "ours", "ours, no metrics"), 1.02)
            for share, table in tables.items()
        ),
        ("ours / torchtune chunked, time", turns.ratio(some.times, "ours", "torchtune chunked"), 0.30),
        ("ours / torchtune chunked, memory", some.memory_ratio("ours", "torchtune chunked"), 0.25),
        ("ours / naive with metrics, time", turns.ratio(some.times, "ours", "naive with metrics"), 0.25),
        ("ours / naive with metrics, memory", some.memory_ratio("ours", "naive with metrics"), 0.15),
    ]


def gpu_results(tables: dict[float, Table]) -> list[turns.Result]:
    whole, best = tables[1.0], "ours compiled"
    peers = [name for name in whole.times if not name.startswith("ours") and name != "matrix products"]
    return [
        ("metrics on / off, time", turns.ratio(whole.metrics, best, "ours compiled, no metrics"), 1.03),
        ("ours / matrix products, time", turns.ratio(whole.times, best, "matrix products"), 1.4),
        *((f"ours / {peer}, memory", whole.memory_ratio(best, peer), 1.0) for peer in peers),
    ]


def plan_for(options: argparse.Namespace, share: float) -> Plan:
    if torch.cuda.is_available():
        case = Case("cuda", "bfloat16", 3584, 151_936, options.tokens or 8192, share)
    else:
        case = Case("cpu", "float32", 896, 151_936, options.tokens or 4096, share)
        if options.quick:
            return Plan(
                metrics=replace(case, vocabulary=65_536, tokens=256),
                times=replace(case, vocabulary=16_384, tokens=2048),
                memory=replace(case, vocabulary=32_768, chunk=615),  # chunks as in earnest, where they are limited
                rounds=options.rounds or 2,
            )
    return Plan(case, case, case, options.rounds or (21 if case.device == "cuda" else 5))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller, within a minute on a CPU")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        torch.set_num_threads(2)
        print(peak_of(options.peak_of, Case(**json.loads(options.case))))
        return 0
    print(turns.hardware())
    on_gpu = torch.cuda.is_available()
    shares = (0.3,) if options.quick and not on_gpu else (0.3, 1.0)
    # On a CPU nothing is asked of the others where all tokens are supervised, and they take minutes: once is enough.
    tables = {share: measure(plan_for(options, share), others_once=share == 1.0 and not on_gpu) for share in shares}
    results = (gpu_results if on_gpu else cpu_results)(tables)
    return turns.report(results, options.json, {share: asdict(table) for share, table in tables.items()})


if __name__ == "__main__":
    sys.exit(main())
