"""What a step measures, added up where it is made: over micro-batches on the device, over ranks with one collective.

No sum is brought to the host before the last; the names and means are made there (see DetailedMetricsTracker).
"""

from dataclasses import dataclass
from typing import Any

import torch

from torchtune_agent.data.collate import Batch
from torchtune_agent.distributed import World
from torchtune_agent.metrics.calls import CALL_SUMS, call_sums, call_table
from torchtune_agent.metrics.histogram import add_losses, empty_counts
from torchtune_agent.metrics.table import COLUMNS, NUM_CLASSES, add_rows, empty_table

_NLL = COLUMNS.index("nll")


@dataclass
class Sums:
    """Of a step or a validation. All but the loss are of tokens that were measured."""

    loss: torch.Tensor  # weighted, as it is minimized
    table: torch.Tensor  # see metrics.table
    weighted: torch.Tensor  # [classes]: weight * nll, the class's part of the loss
    calls: torch.Tensor  # CALL_SUMS
    histogram: torch.Tensor  # see metrics.histogram

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> "Sums":
        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device)

        return cls(zeros(), empty_table(device), zeros(NUM_CLASSES), zeros(len(CALL_SUMS)), empty_counts(device))

    @torch.no_grad()
    def add(self, loss_sum: torch.Tensor, tokens: torch.Tensor | None, batch: Batch) -> None:
        """Add a micro-batch: its loss, and the statistics [supervised tokens, COLUMNS] where it was measured."""
        self.loss += loss_sum
        if tokens is None:
            return
        classes = batch.token_class.flatten()[batch.supervised]
        weights = batch.weights.flatten()[batch.supervised]
        add_rows(self.table, tokens, classes)
        self.weighted.index_add_(0, classes.long(), tokens[:, _NLL].double() * weights)
        self.calls += call_sums(call_table(tokens, batch))
        add_losses(self.histogram, tokens[:, _NLL], classes)

    def reduced(self, world: World) -> "Sums":
        """The sums over all ranks, on the host."""
        fields: dict[str, Any] = vars(self)
        flat = world.sum(torch.cat([field.flatten() for field in fields.values()])).cpu()
        parts = flat.split([field.numel() for field in fields.values()])
        return Sums(**{name: part.view_as(fields[name]) for name, part in zip(fields, parts, strict=True)})
