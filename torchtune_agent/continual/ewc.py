"""Elastic weight consolidation: an objective that holds on to what earlier phases need, around any other.

loss + strength / 2 * sum F (theta - anchor)^2, with F the diagonal Fisher information of earlier phases and the anchor
the parameters at the end of the last one (online EWC: Schwarz et al., 2018, after Kirkpatrick et al., 2017).
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from torchtune_agent.continual.fisher import (
    DiagonalFisher,
    Shards,
    local,
    own_shard,
    sample_gradients,
    trained_parameters,
    whole,
)
from torchtune_agent.data.collate import Batch
from torchtune_agent.distributed import World
from torchtune_agent.errors import UserError
from torchtune_agent.losses import LossOutput, Objective


class ElasticWeights:
    """The objective `inner`, with a penalty for moving weights that earlier phases need.

    Nothing is penalised before the first `consolidate`, nor where no gradient is asked for, so a validation loss is
    that of `inner`. Only parameters that are trained have a part in it, so it works with adapters. An optimizer that
    steps inside the backward pass does not work with it: it would step once for the penalty and once for the loss.

    Args:
        inner: what is minimized without the penalty.
        world: of the run.
        strength: of the penalty, in the unit of `inner` per target.
        decay: what is left of the Fisher information of earlier phases when one is added.
    """

    def __init__(self, inner: Objective, world: World, *, strength: float, decay: float = 1.0) -> None:
        if not (math.isfinite(strength) and strength >= 0):
            raise UserError(f"ewc.strength={strength}: must be a number of 0 or more.")
        if not 0 <= decay <= 1:
            raise UserError(f"ewc.decay={decay}: must be from 0 to 1.")
        if world.mesh["tp"].size() > 1:
            raise UserError("ewc: works with data parallelism only. Set tensor_parallel_dim=1.")
        self._inner, self._world = inner, world
        self._strength, self._decay = strength, decay
        self._parameters: dict[str, nn.Parameter] = {}
        self._fisher: Shards = {}
        self._anchor: Shards = {}
        self._loaded: dict[str, dict[str, torch.Tensor]] | None = None

    def num_targets(self, batch: Batch) -> float:
        return self._inner.num_targets(batch)

    def __call__(self, model: nn.Module, batch: Batch, *, with_statistics: bool) -> LossOutput:
        if not torch.is_grad_enabled():
            return self._inner(model, batch, with_statistics=with_statistics)
        self._attach(model)
        output = self._inner(model, batch, with_statistics=with_statistics)
        if self._fisher and self._strength:
            # The Trainer divides by the targets of all ranks and micro-batches: as many of them as this micro-batch
            # has on all ranks make the penalty count once. FSDP does not average the gradient of a shard that is used
            # as a shard, while the Trainer has made up for that, so the gradient is divided by the ranks.
            targets = float(self._world.sum(torch.tensor(self._inner.num_targets(batch), dtype=torch.float64)))
            ranks = self._world.dp_size
            for name, fisher in self._fisher.items():
                part = _Pull.apply(local(self._parameters[name]), fisher, self._anchor[name], self._strength, ranks)
                output.loss_sum = output.loss_sum + (part * targets).to(output.loss_sum.device)  # pyright: ignore
        return output

    def _attach(self, model: nn.Module) -> None:
        """Know the model's parameters as shards, which they are before the forward pass."""
        if not self._parameters:
            self._parameters = trained_parameters(model)
            if self._world.dp_size > 1:
                assert all(isinstance(p, DTensor) for p in self._parameters.values()), "every rank has all of a weight"
        if self._loaded is not None:
            self._take_up(self._loaded)
            self._loaded = None

    def _take_up(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        unknown = sorted(state["fisher"].keys() - self._parameters.keys())
        if unknown:
            raise UserError(
                f"ewc: the checkpoint holds on to {len(unknown)} weights not trained now, such as {unknown[0]}. "
                "Train what the earlier run trained, or start without its state."
            )
        for name, target in (("fisher", self._fisher), ("anchor", self._anchor)):
            target |= {key: own_shard(value, self._parameters[key]) for key, value in state[name].items()}

    def consolidate(self, model: nn.Module, samples: Iterable[Batch]) -> None:
        """A phase has ended: hold on to the weights as they are, as far as its `samples` need them.

        `samples` are batches of one sample, the same on every rank; some hundreds do. Each costs a backward pass.
        """
        self._attach(model)
        fresh = DiagonalFisher()
        for gradients in sample_gradients(model, self._inner, samples):
            fresh.add(gradients)
        if fresh.count == 0:
            raise UserError("ewc: a phase without samples cannot be held on to. Give consolidate some of its samples.")
        for name, parameter in self._parameters.items():
            value = fresh.values.get(name)
            if value is not None:
                before = self._fisher.get(name)
                self._fisher[name] = value if before is None else before.mul_(self._decay).add_(value)
            self._anchor[name] = local(parameter.detach()).clone()

    def penalty(self, model: nn.Module) -> float:
        """What the penalty adds to the loss now. Every rank calls it."""
        self._attach(model)
        total = torch.zeros((), dtype=torch.float64)
        with torch.no_grad():
            for name, fisher in self._fisher.items():
                here = local(self._parameters[name])
                total += _Pull.apply(here, fisher, self._anchor[name], self._strength, 1).double().cpu()  # pyright: ignore
        return float(self._world.sum(total.to(self._world.device)))

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors on the host, the same on every rank, which all take part."""
        if self._loaded is not None:
            return dict(self._loaded)
        parts = {"fisher": self._fisher, "anchor": self._anchor}
        return {
            part: {name: whole(shard, self._parameters[name]) for name, shard in shards.items()}
            for part, shards in parts.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Taken up when the model is seen next, split as it is then."""
        self._fisher, self._anchor = {}, {}
        self._loaded = {part: dict(state.get(part, {})) for part in ("fisher", "anchor")}


class _Pull(torch.autograd.Function):
    """strength / 2 * sum F (theta - anchor)^2 of a shard; its gradient is divided by `ranks`. Copies no theta."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, theta: torch.Tensor, fisher: torch.Tensor, anchor: torch.Tensor, strength: float, ranks: int
    ) -> torch.Tensor:
        # Not in save_for_backward, from where activation offloading would carry weights to the host and back.
        ctx.parts = theta.detach(), fisher, anchor, strength / ranks
        return strength / 2 * (fisher * (theta.float() - anchor.float()).square()).sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore
        theta, fisher, anchor, scale = ctx.parts
        pull = fisher * (theta.float() - anchor.float()) * (grads[0] * scale)
        return pull.to(theta.dtype), None, None, None, None
