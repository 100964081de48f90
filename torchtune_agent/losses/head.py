"""The loss head: loss, statistics and gradients from hidden states, without ever making all logits.

Logits exist for one chunk of rows at a time. While they do, they are read once for the loss and the statistics, turned
into their own gradient in place, and multiplied into the gradients of hidden states and weight: the backward pass has
nothing left to do but scale. `token_logprobs` must know the gradient of every row first, so it makes each chunk again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from torchtune_agent.distributed import VocabularyShare
from torchtune_agent.metrics import softmax
from torchtune_agent.metrics.table import COLUMNS, statistics_of

_MAX_CHUNK_BYTES = 2**29


@dataclass(frozen=True)
class Projection:
    """What logits would be made of."""

    terms: tuple[torch.Tensor, ...]  # inputs [rows, k], weight [vocabulary, k], and so on: logits are the products' sum
    share: VocabularyShare | None = None  # where this rank has only some of the vocabulary


@dataclass(frozen=True)
class Chunking:
    """How logits are made and read.

    `size` rows at a time, or as many as fit into half a gibibyte. Few large chunks are faster than many small ones, as
    every chunk reads and writes the gradient of the whole weight.
    """

    size: int = 2048
    compiled: bool = False

    def logits(self, projection: Projection) -> Iterator[tuple[slice, torch.Tensor]]:
        """Slices of rows, and their logits, which the caller may overwrite and the next chunk will."""
        inputs, weight = projection.terms[:2]
        num_rows, num_columns = len(inputs), len(weight)
        widest = projection.share.width if projection.share else num_columns  # every rank makes the same chunks
        limit = max(1, min(self.size, _MAX_CHUNK_BYTES // (widest * weight.element_size())))
        size = -(-num_rows // max(1, -(-num_rows // limit)))  # chunks of one size, as few as the limit allows
        buffer = inputs.new_empty(size, num_columns)
        for start in range(0, num_rows, max(1, size)):
            rows = slice(start, min(start + size, num_rows))
            logits = buffer[: rows.stop - rows.start]
            torch.mm(inputs[rows], weight.t(), out=logits)
            for more, other in _pairs(projection.terms)[1:]:
                logits.addmm_(more[rows], other.t())
            yield rows, logits

    def read(
        self, logits: torch.Tensor, labels: torch.Tensor, share: VocabularyShare | None, *, measure: bool
    ) -> softmax.RowSums:
        first_id = share.first_id if share else None
        sums = softmax.read(logits, labels, measure=measure, first_id=first_id, compiled=self.compiled)
        return softmax.merge(sums, share.gather) if share else sums

    def gradient_(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        sums: softmax.RowSums,
        size: torch.Tensor,
        share: VocabularyShare | None,
    ) -> torch.Tensor:
        first_id = share.first_id if share else None
        return softmax.gradient_(logits, labels, sums, size, first_id=first_id, compiled=self.compiled)


class _Gradients:
    """Of the terms that need one, filled chunk by chunk; rows that no chunk reached have none to add."""

    def __init__(self, terms: tuple[torch.Tensor, ...], needed: tuple[bool, ...]) -> None:
        self.terms = terms
        empty = len(terms[0]) == 0
        new = torch.zeros_like if empty else torch.empty_like
        self.tensors = [new(term) if need else None for term, need in zip(terms, needed, strict=True)]

    def add(self, rows: slice, logits: torch.Tensor, sign: torch.Tensor) -> None:
        """Add the part of `rows`, where `logits` is their gradient but for the sign of each row."""
        sign = sign[:, None].to(logits.dtype)
        for (inputs, weight), (of_inputs, of_weight) in zip(_pairs(self.terms), _pairs(self.tensors), strict=True):
            if of_inputs is not None:
                torch.mm(logits, weight, out=of_inputs[rows])
                of_inputs[rows] *= sign
            if of_weight is not None:
                first = rows.start == 0  # then what is there is not even read
                torch.addmm(of_weight, logits.t(), inputs[rows] * sign, beta=0 if first else 1, out=of_weight)


def _pairs(terms: Any) -> list[tuple[Any, Any]]:
    return list(zip(terms[::2], terms[1::2], strict=True))


def cross_entropy(
    projection: Projection, labels: torch.Tensor, weights: torch.Tensor, chunking: Chunking, entropy_k: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weighted sum of -log p[label], with gradient, and the statistics of every row [rows, COLUMNS].

    Args:
        projection: of the rows
        labels: int64 [rows]
        weights: [rows], of a row in the sum; statistics are not weighted
        chunking: see there
        entropy_k: of the statistics; None: measure nothing
    """
    options = (chunking, projection.share, entropy_k, torch.is_grad_enabled())
    return _CrossEntropy.apply(labels, weights, options, *projection.terms)  # pyright: ignore[reportReturnType]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, labels: torch.Tensor, weights: torch.Tensor, options: Any, *terms: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        chunking, share, entropy_k, with_gradient = options
        dtype = torch.promote_types(terms[0].dtype, torch.float32)
        loss_sum = torch.zeros((), dtype=dtype, device=labels.device)
        statistics = None
        if entropy_k is not None:
            statistics = torch.empty(len(labels), len(COLUMNS), dtype=dtype, device=labels.device)
        gradients = _Gradients(terms, ctx.needs_input_grad[3:]) if with_gradient else None
        for rows, logits in chunking.logits(Projection(terms, share)):
            sums = chunking.read(logits, labels[rows], share, measure=statistics is not None)
            loss_sum -= (sums.log_p * weights[rows]).sum()
            if statistics is not None and entropy_k is not None:
                statistics[rows] = statistics_of(sums, labels[rows], entropy_k)
            if gradients is not None:
                size, sign = weights[rows].abs(), weights[rows].sign()
                gradients.add(rows, chunking.gradient_(logits, labels[rows], sums, size, share), sign)
        # Not in save_for_backward, from where activation offloading would carry them to the host and back.
        ctx.gradients = gradients.tensors if gradients is not None else None
        if statistics is not None:
            ctx.mark_non_differentiable(statistics)
        return loss_sum, statistics

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the gradients of the loss were used already"
        return None, None, None, *(None if g is None else g.mul_(grads[0]) for g in gradients)


def log_p(projection: Projection, labels: torch.Tensor, chunking: Chunking) -> torch.Tensor:
    """log p[label] of every row [rows], with gradient."""
    return _LogP.apply(labels, (chunking, projection.share), *projection.terms)  # pyright: ignore[reportReturnType]


class _LogP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, labels: torch.Tensor, options: Any, *terms: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        chunking, share = options
        dtype = torch.promote_types(terms[0].dtype, torch.float32)
        sums = torch.empty(3, len(labels), dtype=dtype, device=labels.device)
        for rows, logits in chunking.logits(Projection(terms, share)):
            sums[:, rows] = torch.stack(chunking.read(logits, labels[rows], share, measure=False)[:3])
        ctx.save_for_backward(labels, sums, *terms)
        ctx.options = options
        return softmax.RowSums(*sums).log_p

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore
        labels, sums, *terms = ctx.saved_tensors
        chunking, share = ctx.options
        gradients = _Gradients(tuple(terms), ctx.needs_input_grad[2:])
        for rows, logits in chunking.logits(Projection(tuple(terms), share)):
            size, sign = grad[rows].abs(), -grad[rows].sign()
            own = softmax.RowSums(*sums[:, rows])
            gradients.add(rows, chunking.gradient_(logits, labels[rows], own, size, share), sign)
        return None, None, *gradients.tensors
