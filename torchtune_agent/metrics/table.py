"""Sums per token class: what a step measures, before any mean is taken.

A table is one float64 tensor [classes, columns] of sums and counts. Tables add up over micro-batches and
ranks; means are taken once, at the end, so every token weighs the same wherever it was computed.
"""

import math

import torch

from torchtune_agent.data.token_class import TokenClass
from torchtune_agent.metrics import softmax

TOP_K = (1, 2, 5, 10)
COLUMNS = (
    "count",
    "nll",
    "entropy",
    "topk_entropy",
    "exact_entropy",
    *(f"top{k}_prob" for k in TOP_K),
    "correct",
)
NUM_CLASSES = len(TokenClass)


def empty_table(device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.zeros(NUM_CLASSES, len(COLUMNS), dtype=torch.float64, device=device)


def token_statistics(logits: torch.Tensor, labels: torch.Tensor, entropy_k: int = 10) -> torch.Tensor:
    """One row of COLUMNS for every token.

    Args:
        logits: [tokens, vocabulary]
        labels: int64 [tokens]
    """
    return statistics_of(softmax.read(logits, labels, measure=True), labels, entropy_k)


def statistics_of(sums: softmax.RowSums, labels: torch.Tensor, entropy_k: int = 10) -> torch.Tensor:
    """One row of COLUMNS for every token, from a measuring read of its logits.

    With p the softmax of a row, sorted so that p1 >= p2 >= ...:
      nll            -log p[label]
      entropy        binary Shannon entropy of the top token, in bits: -p1 log2 p1 - (1 - p1) log2 (1 - p1)
      topk_entropy   of the `entropy_k` most likely tokens with all others as one outcome, in nats
      exact_entropy  -sum p log p over the whole vocabulary, in nats
      topK_prob      p1 + ... + pK
      correct        1 where the label has the largest logit (the lowest id wins a tie)
    """
    assert sums.spread is not None and sums.largest is not None and sums.best is not None
    log_total = sums.total.log()
    nll = -sums.log_p
    largest = (sums.largest - sums.peak[:, None] - log_total[:, None]).exp()  # [tokens, 10]
    mass = largest.cumsum(-1).clamp(max=1.0)
    top1 = largest[:, :1]
    correct = (sums.best == labels).to(nll.dtype)
    columns = [
        torch.ones_like(nll),
        nll,
        _entropy(torch.cat([top1, 1 - top1], -1)) / math.log(2),
        _entropy(torch.cat([largest[:, :entropy_k], 1 - mass[:, entropy_k - 1 : entropy_k]], -1)),
        log_total - sums.spread / sums.total,
        *(mass[:, k - 1] for k in TOP_K),
        torch.where(nll.isnan(), nll, correct),  # the argmax of NaN is no prediction
    ]
    return torch.stack(columns, -1)


def _entropy(outcomes: torch.Tensor) -> torch.Tensor:
    """Shannon entropy in nats of the outcomes in the last dimension; NaN stays NaN."""
    return torch.special.entr(outcomes).sum(-1)


@torch.no_grad()
def add_tokens(
    table: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, token_class: torch.Tensor, entropy_k: int = 10
) -> None:
    """Add every token's statistics to its class's row of `table`."""
    add_rows(table, token_statistics(logits, labels, entropy_k), token_class)


def add_rows(table: torch.Tensor, statistics: torch.Tensor, token_class: torch.Tensor) -> None:
    """Add `statistics` [tokens, COLUMNS] to the rows of `table` that `token_class` [tokens] names."""
    table.index_add_(0, token_class.long(), statistics.double())
