"""Gradients of single samples, and the diagonal Fisher information made of them, in the shards the parameters are in.

FSDP adds up the gradients of all ranks, so a sample has a gradient of its own only where all ranks run the same sample
at a time. That is what is done here: any number of ranks finds the same numbers as one, each for its own shards.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from torchtune_agent.data.collate import Batch
from torchtune_agent.losses import Objective

Shards = dict[str, torch.Tensor]  # by parameter name: what this rank has of it


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by the names they have in a checkpoint; those that FSDP shards, as shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward pass without a backward one, some are still whole
    named = ((name.replace("_checkpoint_wrapped_module.", ""), p) for name, p in model.named_parameters())
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(shard: torch.Tensor, like: nn.Parameter) -> torch.Tensor:
    """The tensor on the host that is split as `like` is, of which this rank has `shard`."""
    if isinstance(like, DTensor):
        split = DTensor.from_local(shard, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
        shard = split.full_tensor()
    return shard.detach().cpu().clone()


def own_shard(tensor: torch.Tensor, like: nn.Parameter) -> torch.Tensor:
    """This rank's shard of a whole tensor, split as `like` is."""
    tensor = tensor.to(like.device)
    if isinstance(like, DTensor):
        split = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
        return split.to_local().clone()
    return tensor.clone()


def sample_gradients(model: nn.Module, objective: Objective, samples: Iterable[Batch]) -> Iterator[Shards]:
    """Of every sample's loss per target, one batch of one sample after the other; every rank gives the same samples.

    The model is as it was afterwards, its gradients cleared. The tensors are overwritten by the next sample's.
    """
    parameters = trained_parameters(model)
    device = next(iter(parameters.values())).device
    was_training = model.training
    model.eval()
    try:
        for sample in samples:
            model.zero_grad(set_to_none=True)
            num_targets = objective.num_targets(sample)
            if num_targets:
                loss = objective(model, sample.to(device), with_statistics=False).loss_sum / num_targets
                loss.backward()
            yield {name: local(p.grad) for name, p in parameters.items() if p.grad is not None}
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)


class DiagonalFisher:
    """A running mean of squared gradients of samples (the empirical Fisher: labels are those of the data).

    Args:
        decay: what is left of the past when a sample is added; None: the plain mean of all samples.
    """

    def __init__(self, decay: float | None = None) -> None:
        self._decay = decay
        self.count = 0
        self.values: Shards = {}

    def add(self, gradients: Mapping[str, torch.Tensor]) -> None:
        self.count += 1
        weight = 1 / self.count if self._decay is None else 1 - self._decay
        for name in self.values.keys() - gradients.keys():
            self.values[name].mul_(1 - weight)
        for name, gradient in gradients.items():
            square = gradient.float().square()
            if name in self.values:
                self.values[name].lerp_(square, weight)
            else:
                self.values[name] = square * weight

    def risk(self, gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """sum F g^2 over this rank's shards: how much a step along `gradients` moves what past samples hold on to."""
        parts = [
            (self.values[name] * gradient.float().square()).sum(dtype=torch.float64)
            for name, gradient in gradients.items()
            if name in self.values
        ]
        return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)
