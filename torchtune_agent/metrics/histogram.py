"""How the losses of a class's tokens are spread: counts in fixed buckets, added up like the sums of metrics.table.

A bucket is an eighth of a decade between 1e-4 and 100 nats. The first and the last hold what lies beyond.
"""

import torch

from torchtune_agent.metrics.table import NUM_CLASSES

_LOWEST, _DECADES, _PER_DECADE = -4, 6, 8  # powers of ten
NUM_BUCKETS = _DECADES * _PER_DECADE
UPPER_EDGES = [10 ** (_LOWEST + (i + 1) / _PER_DECADE) for i in range(NUM_BUCKETS)]


def empty_counts(device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.zeros(NUM_CLASSES, NUM_BUCKETS, dtype=torch.float64, device=device)


@torch.no_grad()
def add_losses(counts: torch.Tensor, nll: torch.Tensor, token_class: torch.Tensor) -> None:
    """Count every token's loss in its class's row of `counts`, on the device. Losses that are not finite are not
    counted; the class's mean tells of them."""
    place = ((nll.float().log10() - _LOWEST) * _PER_DECADE).floor()
    bucket = place.nan_to_num(0).clamp(0, NUM_BUCKETS - 1).long()
    counts.view(-1).index_add_(0, token_class.long() * NUM_BUCKETS + bucket, nll.isfinite().to(counts.dtype))
