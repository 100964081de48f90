"""One read of logits: all that a loss, its gradient and every statistic need to know of them.

Per row the largest logit (`peak`), the sum of exp(x - peak) and the sum of (x - peak) exp(x - peak) give the softmax
and its exact entropy. The ten largest logits lie in the ten blocks with the largest maxima, so that they are looked for
among 1,280 candidates and not in the whole vocabulary. What is known of shares of a vocabulary can be merged.

Everything is computed in float32 at least, a tile of rows at a time: what is between a read and its sums stays small
(in the cache of a CPU), and no second copy of the logits is ever made. With `compiled` it never leaves the registers.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional

NUM_LARGEST = 10
_BLOCK = 128
_TILE_ELEMENTS = {"cpu": 2**19}
_TILE_ELEMENTS_ELSEWHERE = 2**25
_NO_WEIGHT = -1000.0  # the exponential of this is 0 in float64 too


class RowSums(NamedTuple):
    """What is known of every row of logits; the last three only where statistics are measured."""

    peak: torch.Tensor  # [rows] largest logit
    total: torch.Tensor  # [rows] sum of exp(x - peak)
    label: torch.Tensor  # [rows] the label's logit
    spread: torch.Tensor | None = None  # [rows] sum of (x - peak) exp(x - peak), never above 0
    largest: torch.Tensor | None = None  # [rows, NUM_LARGEST] in descending order; minus infinity beyond the vocabulary
    best: torch.Tensor | None = None  # [rows] id of the largest logit, the lowest one of a tie

    @property
    def log_p(self) -> torch.Tensor:
        """log of the label's probability, [rows]. (peak + log(total) would lose the second where logits are huge.)"""
        return (self.label - self.peak) - self.total.log()


def read(
    logits: torch.Tensor, labels: torch.Tensor, *, measure: bool, first_id: int | None = None, compiled: bool = False
) -> RowSums:
    """Read `logits` [rows, vocabulary] once.

    Args:
        logits: [rows, vocabulary]; left as they are
        labels: int64 [rows]
        measure: keep what statistics need, beyond what the loss does
        first_id: where the columns are only a share of the vocabulary, the id of the first of them; a label outside
            of it has the logit 0 here
        compiled: use torch.compile
    """
    run = _compiled if compiled else _by_tiles
    maxima, total, spread = run(_sums, logits, measure=measure)
    peak = maxima.amax(1).to(total.dtype)
    label, inside = _at_labels(logits, labels, first_id)
    label = label.to(total.dtype)
    if inside is not None:
        label = torch.where(inside, label, 0.0)
    if not measure:
        return RowSums(peak, total, label)
    best = _best(logits, maxima)
    return RowSums(peak, total, label, spread, _largest(logits, maxima).to(total.dtype), best + (first_id or 0))


def merge(share: RowSums, gather: Callable[[torch.Tensor], torch.Tensor]) -> RowSums:
    """What is known of the whole vocabulary, from this share of it and what `gather` stacks upon it of the others'."""
    shares = RowSums(*(None if field is None else gather(field) for field in share))  # pyright: ignore
    peak = shares.peak.amax(0)
    below = shares.peak - peak
    scale = below.exp()
    total, label = (scale * shares.total).sum(0), shares.label.sum(0)
    if shares.spread is None or shares.largest is None or shares.best is None:
        return RowSums(peak, total, label)
    spread = (scale * (shares.spread + below * shares.total)).sum(0)
    largest = shares.largest.transpose(0, 1).flatten(1)
    largest = largest.topk(NUM_LARGEST).values
    best = torch.where(shares.peak == peak, shares.best, torch.iinfo(shares.best.dtype).max).amin(0)
    return RowSums(peak, total, label, spread, largest, best)


def gradient_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    sums: RowSums,
    size: torch.Tensor,
    *,
    first_id: int | None = None,
    compiled: bool = False,
) -> torch.Tensor:
    """Turn `logits`, in place, into the gradient of -log p[label], softmax minus one at the label, times `size`.

    `size` [rows] must not be negative: its logarithm joins the exponent, so that what is written is rounded once.
    """
    run = _compiled if compiled else _by_tiles
    below_one = sums.total.log() - size.to(sums.total.dtype).log()
    run(_exponentials_, logits, sums.peak[:, None], below_one[:, None])
    at_label = (torch.expm1(sums.log_p) * size).to(logits.dtype)  # p - 1 would lose digits where p is near 1
    before, inside = _at_labels(logits, labels, first_id)
    if inside is not None:
        at_label = torch.where(inside, at_label, before)
    columns = labels if first_id is None else (labels - first_id).clamp(0, logits.shape[1] - 1)
    return logits.scatter_(1, columns[:, None], at_label[:, None])


def _sums(logits: torch.Tensor, measure: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Block maxima, sum of exp(x - peak), and sum of (x - peak) exp(x - peak) of a tile of whole rows."""
    maxima = _block_maxima(logits)
    peak = maxima.amax(1, keepdim=True).to(torch.promote_types(logits.dtype, torch.float32))
    below = logits - peak
    if not measure:
        return maxima, below.exp_().sum(1), None
    below.clamp_(min=_NO_WEIGHT)  # minus infinity times its weight, 0, would not be a number
    weights = below.exp()
    return maxima, weights.sum(1), below.mul_(weights).sum(1)


def _exponentials_(logits: torch.Tensor, peak: torch.Tensor, below: torch.Tensor) -> None:
    torch.exp((logits - peak).sub_(below), out=logits)


def _block_maxima(logits: torch.Tensor) -> torch.Tensor:
    """[rows, blocks]; the last block may be shorter."""
    whole = logits.shape[1] // _BLOCK * _BLOCK
    maxima = []
    if whole:
        maxima.append(logits[:, :whole].unflatten(1, (-1, _BLOCK)).amax(2))
    if whole < logits.shape[1]:
        maxima.append(logits[:, whole:].amax(1, keepdim=True))
    return torch.cat(maxima, 1)


def _largest(logits: torch.Tensor, maxima: torch.Tensor) -> torch.Tensor:
    """The largest logits of every row. A block that is not among the ten with the largest maxima holds none of them."""
    num_blocks = logits.shape[1] // _BLOCK
    candidates = logits[:, num_blocks * _BLOCK :]
    if num_blocks:
        blocks = logits[:, : num_blocks * _BLOCK].unflatten(1, (num_blocks, _BLOCK))
        promising = maxima[:, :num_blocks].topk(min(NUM_LARGEST, num_blocks), sorted=False).indices
        rows = torch.arange(len(logits), device=logits.device)[:, None]
        candidates = torch.cat([blocks[rows, promising].flatten(1), candidates], 1)
    missing = max(0, NUM_LARGEST - candidates.shape[1])
    return functional.pad(candidates, (0, missing), value=-torch.inf).topk(NUM_LARGEST).values


def _best(logits: torch.Tensor, maxima: torch.Tensor) -> torch.Tensor:
    start = maxima.argmax(1, keepdim=True) * _BLOCK
    columns = (start + torch.arange(_BLOCK, device=logits.device)).clamp(max=logits.shape[1] - 1)
    return start[:, 0] + logits.gather(1, columns).argmax(1)


def _at_labels(
    logits: torch.Tensor, labels: torch.Tensor, first_id: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The entries [rows] at the labels, and which labels are columns of `logits` (None: all of them)."""
    if first_id is None:
        return logits.gather(1, labels[:, None])[:, 0], None
    columns = labels - first_id
    inside = (columns >= 0) & (columns < logits.shape[1])
    return logits.gather(1, columns.clamp(0, logits.shape[1] - 1)[:, None])[:, 0], inside


def _by_tiles(function: Callable[..., Any], logits: torch.Tensor, *rows: torch.Tensor, **options: Any) -> Any:
    """`function` of a tile of rows after the other; its results, if any, joined."""
    size = max(1, _TILE_ELEMENTS.get(logits.device.type, _TILE_ELEMENTS_ELSEWHERE) // logits.shape[1])
    tiles = [tile.split(size) for tile in (logits, *rows)]
    results = [function(*tile, **options) for tile in zip(*tiles, strict=True)]
    if results[0] is None:
        return None
    return tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*results, strict=True))


def _compiled(function: Callable[..., Any], logits: torch.Tensor, *rows: torch.Tensor, **options: Any) -> Any:
    """`function` compiled once for any number of rows."""
    if len(logits) < 2:  # would be compiled for this number alone
        return function(logits, *rows, **options)
    for tensor in (logits, *rows):
        torch._dynamo.mark_dynamic(tensor, 0)
    return _compile(function)(logits, *rows, **options)


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
