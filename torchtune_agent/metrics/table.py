"""Sums per token class: what a step measures, before any mean is taken.

A table is one float64 tensor [classes, columns] of sums and counts. Tables add up over micro-batches and
ranks; means are taken once, at the end, so every token weighs the same wherever it was computed.
"""

import math

import torch

from torchtune_agent.data.token_class import TokenClass

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
_CHUNK_ROWS = 1024  # logits rows upcast at a time


def empty_table(device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.zeros(NUM_CLASSES, len(COLUMNS), dtype=torch.float64, device=device)


def token_statistics(logits: torch.Tensor, labels: torch.Tensor, entropy_k: int = 10) -> torch.Tensor:
    """One row of COLUMNS for every token.

    With p the softmax of a row, sorted so that p1 >= p2 >= ...:
      nll            -log p[label]
      entropy        binary Shannon entropy of the top token, in bits: -p1 log2 p1 - (1 - p1) log2 (1 - p1)
      topk_entropy   of the `entropy_k` most likely tokens with all others as one outcome, in nats
      exact_entropy  -sum p log p over the whole vocabulary, in nats
      topK_prob      p1 + ... + pK
      correct        1 where the label has the largest logit (the lowest id wins a tie)

    Args:
        logits: [tokens, vocabulary]
        labels: int64 [tokens]
    """
    log_p = logits.float().log_softmax(-1) if logits.dtype != torch.float64 else logits.log_softmax(-1)
    p = log_p.exp()
    largest = p.topk(min(max(*TOP_K, entropy_k), p.shape[-1]), dim=-1).values  # [tokens, k]
    mass = largest.cumsum(-1).clamp(max=1.0)
    top1 = largest[:, :1]
    nll = -log_p.gather(1, labels[:, None])[:, 0]
    correct = (logits.argmax(-1) == labels).to(p.dtype)
    columns = [
        torch.ones_like(nll),
        nll,
        _entropy(torch.cat([top1, 1 - top1], -1)) / math.log(2),
        _entropy(torch.cat([largest[:, :entropy_k], 1 - mass[:, :entropy_k][:, -1:]], -1)),
        torch.special.entr(p).sum(-1),
        *(mass[:, min(k, mass.shape[1]) - 1] for k in TOP_K),
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
    for start in range(0, len(labels), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        statistics = token_statistics(logits[rows], labels[rows], entropy_k)
        table.index_add_(0, token_class[rows].long(), statistics.double())
