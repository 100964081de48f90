"""The objective of supervised fine-tuning: next-token cross entropy on the supervised tokens, and their statistics.

The objective seam is a callable `(model, batch) -> LossOutput`. It returns sums; the Trainer divides once,
by the number of supervised tokens on all ranks and micro-batches of the step.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from torchtune_agent.data.collate import Batch
from torchtune_agent.errors import UserError
from torchtune_agent.losses import head
from torchtune_agent.losses.output import at_output


@dataclass
class LossOutput:
    loss_sum: torch.Tensor  # scalar, with gradient
    # What was measured of every token [supervised tokens, metrics.table.COLUMNS], without gradient; None where
    # statistics were not asked for.
    tokens: torch.Tensor | None = None


class Objective(Protocol):
    """What a recipe plugs into the Trainer as its loss."""

    def num_targets(self, batch: Batch) -> float:
        """How many tokens (pairs, ...) of the batch the loss is a sum over, weighted as they are in it.

        Known before the forward pass."""
        ...

    def __call__(self, model: nn.Module, batch: Batch, *, with_statistics: bool) -> LossOutput: ...


@dataclass(frozen=True)
class CrossEntropy:
    """Weighted cross entropy on the supervised tokens, computed and measured without ever making all logits.

    The loss of a step is sum(weight * loss) / sum(weight) over its tokens, so weights change what is learned and not
    how large a step is.

    Args:
        chunk_size: supervised tokens whose logits are held at a time; fewer where they would exceed half a gibibyte.
        entropy_k: see DetailedMetricsTracker.
        compile: use torch.compile for what is done to the logits; worth it on a GPU.
    """

    chunk_size: int = 2048
    entropy_k: int = 10
    compile: bool = False

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise UserError(f"loss.chunk_size={self.chunk_size}: must be at least 1.")

    def num_targets(self, batch: Batch) -> float:
        return batch.total_weight

    def __call__(self, model: nn.Module, batch: Batch, *, with_statistics: bool) -> LossOutput:
        labels = batch.labels.flatten()[batch.supervised]
        weights = batch.weights.flatten()[batch.supervised]
        chunking = head.Chunking(self.chunk_size, self.compile)
        entropy_k = self.entropy_k if with_statistics else None
        loss_sum, tokens = at_output(
            model, batch, lambda projection: head.cross_entropy(projection, labels, weights, chunking, entropy_k)
        )
        return LossOutput(loss_sum, tokens)


def token_logprobs(model: nn.Module, batch: Batch, *, chunk_size: int = 2048, compile: bool = False) -> torch.Tensor:
    """log p[label] of every supervised token, with gradient: [len(batch.supervised)], in the order of that.

    For objectives that need more than a weighted sum of them (DPO, PPO). Takes the memory of CrossEntropy, and the
    time of making the logits once more in the backward pass.
    """
    labels = batch.labels.flatten()[batch.supervised]
    chunking = head.Chunking(chunk_size, compile)
    return at_output(model, batch, lambda projection: head.log_p(projection, labels, chunking))
