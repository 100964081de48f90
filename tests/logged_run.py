"""A run as it is logged, of any length, with values that tests know: for what reads and draws logs."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# First and last loss of every group, and its tokens in a row
GROUPS = {
    "overall": (7.0, 2.0, 1000),
    "reasoning": (6.0, 2.5, 600),
    "tool_call": (8.0, 1.25, 400),
    "call_syntax": (7.5, 0.05, 220),
    "call_name": (7.0, 1.5, 60),
    "arg_name": (7.1, 1.7, 50),
    "arg_value": (7.2, 4.4, 70),
}


def class_metrics(split: str, share: float, groups: dict[str, tuple[float, float, int]] = GROUPS) -> dict[str, float]:
    """Every metric of every class when `share` of what a run learns has been learned."""
    row: dict[str, float] = {}
    for group, (first, last, count) in groups.items():
        nll = first + (last - first) * share
        prefix = f"{split}_" if group == "overall" else f"{split}_{group}_"
        sure = math.exp(-nll)
        row |= {f"{prefix}{name}": nll * scale for name, scale in ENTROPIES.items()}
        row |= {f"{prefix}top{k}_prob": 1 - (1 - sure) ** k for k in (1, 2, 5, 10)}
        row |= {f"{prefix}perplexity": math.exp(nll), f"{prefix}accuracy": sure, f"{prefix}num_tokens": count}
    return row


ENTROPIES = {"nll": 1.0, "entropy": 0.1, "topk_entropy": 0.8, "exact_entropy": 0.9}


def rows(num_steps: int, *, every: int = 1, val_every: int = 10) -> Iterator[dict[str, Any]]:
    """Training rows at every step, class metrics in the first and every `every`-th, and validation rows."""
    for step in range(1, num_steps + 1):
        share = 1 - math.exp(-5 * step / num_steps)
        row = {"step": step, "time": 1e9 + 2.0 * step, "loss": 7 - 5 * share, "lr": 1e-5, "grad_norm": 1 / step}
        row["tokens_per_second_per_gpu"] = 12_000.0
        yield row | (class_metrics("train", share) if step == 1 or step % every == 0 else {})
        if step % val_every == 0:
            validation = {"step": step, "time": row["time"] + 1, "val_loss": 7.1 - 5 * share}
            yield validation | class_metrics("val", share)


def write(logs: Path, logged: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> Path:
    """A `metrics.jsonl` in the folder `logs`."""
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / "metrics.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in logged)
    return path
