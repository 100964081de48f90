"""The objective of supervised fine-tuning: next-token cross entropy on the supervised tokens, and their statistics.

The objective seam is a callable `(model, batch) -> LossOutput`. It returns sums; the Trainer divides once,
by the number of supervised tokens on all ranks and micro-batches of the step.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from torchtune.modules.attention_utils import packed_block_causal_mask

from torchtune_agent.data.collate import Batch
from torchtune_agent.metrics.table import add_tokens, empty_table


@dataclass
class LossOutput:
    loss_sum: torch.Tensor  # scalar, with gradient
    table: torch.Tensor | None = None  # sums per token class, see metrics.table; None where they were not asked for


class Objective(Protocol):
    """What a recipe plugs into the Trainer as its loss."""

    def num_targets(self, batch: Batch) -> float:
        """How many tokens (pairs, ...) of the batch the loss is a sum over, weighted as they are in it.

        Known before the forward pass."""
        ...

    def __call__(self, model: nn.Module, batch: Batch, *, with_statistics: bool) -> LossOutput: ...


@dataclass(frozen=True)
class CrossEntropy:
    """Weighted cross entropy on the supervised tokens; the other rows of the logits are never upcast.

    The loss of a step is sum(weight * loss) / sum(weight) over its tokens, so weights change what is learned and not
    how large a step is.

    Args:
        chunk_size: supervised tokens whose logits are held in fp32 at a time.
        entropy_k: see DetailedMetricsTracker.
    """

    chunk_size: int = 2048
    entropy_k: int = 10

    def num_targets(self, batch: Batch) -> float:
        return batch.total_weight

    def __call__(self, model: nn.Module, batch: Batch, *, with_statistics: bool) -> LossOutput:
        logits = forward(model, batch)[batch.supervised]  # [supervised tokens, vocabulary]
        labels = batch.labels.flatten()[batch.supervised]
        weights = batch.weights.flatten()[batch.supervised]
        chunks = [slice(start, start + self.chunk_size) for start in range(0, len(labels), self.chunk_size)]
        losses = [(F.cross_entropy(logits[c].float(), labels[c], reduction="none") * weights[c]).sum() for c in chunks]
        # Without a label the sum of no logits is a zero with a gradient, so that this rank's backward still runs.
        loss_sum = torch.stack(losses).sum() if losses else logits.float().sum()
        table = None
        if with_statistics:
            table = empty_table(labels.device)
            token_class = batch.token_class.flatten()[batch.supervised]
            add_tokens(table, logits.detach(), labels, token_class, self.entropy_k)
        return LossOutput(loss_sum, table)


def forward(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits of every position, flat: [batch * sequence, vocabulary]."""
    inputs: dict[str, Any] = {}
    if batch.seq_lens is not None:
        inputs = {"mask": packed_block_causal_mask(batch.seq_lens), "input_pos": batch.input_pos}
        if isinstance(inputs["mask"], torch.Tensor):
            inputs["mask"] = inputs["mask"].to(batch.tokens.device)
    output = model(tokens=batch.tokens, **inputs)
    if isinstance(output, list):  # set_num_output_chunks keeps the model from upcasting all logits
        output = output[0] if len(output) == 1 else torch.cat(output, dim=1)
    return output.flatten(0, 1)
