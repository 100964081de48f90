"""The parameter seam: which parameters a run has, and which of them it trains."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import DictConfig
from torch import nn
from torchtune import training
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params

from torchtune_agent.config import instantiate
from torchtune_agent.errors import UserError
from torchtune_agent.models.experts import idle_weights
from torchtune_agent.training.settings import Settings


class ParameterSetup(Protocol):
    """What a recipe plugs into the Trainer as parameters."""

    def build(self, cfg: DictConfig, settings: Settings) -> TransformerDecoder:
        """The model on the meta device, every parameter's `requires_grad` set."""
        ...

    def groups(self, model: TransformerDecoder) -> Iterable[nn.Parameter] | Iterable[dict[str, Any]]:
        """What the optimizer is made with."""
        ...

    def starting(self, base: Mapping[str, torch.Tensor], model: TransformerDecoder) -> Mapping[str, torch.Tensor]:
        """All weights of `model` before the first step, from those of the base model."""
        ...

    def finished(self, weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Those of a plain model that does what the trained one does, from all weights of the trained one."""
        ...

    def write_own(self, weights: Mapping[str, torch.Tensor], folder: Path, checkpointer: Any) -> bool:
        """Write what was trained, where that is less than the whole model; returns whether there was such."""
        ...


class FullParameters:
    """Train every weight, but for those that the config freezes."""

    def build(self, cfg: DictConfig, settings: Settings) -> TransformerDecoder:
        with training.set_default_dtype(settings.torch_dtype), torch.device("meta"):
            model: TransformerDecoder = instantiate(cfg.model, "model")
        if isinstance(model, nn.Module):
            self._check(model, settings)
        if settings.freeze:
            freeze(model, settings.freeze)
        return model

    def _check(self, model: nn.Module, settings: Settings) -> None:
        if get_adapter_params(model):
            raise UserError(
                "model: it has adapters, and the config says nothing of them. Add a section, for example "
                "adapter.rank=8 adapter.alpha=16, with the numbers the model has."
            )
        if settings.tensor_parallel_dim > 1 and any(idle_weights(model)):
            raise UserError(
                f"tensor_parallel_dim={settings.tensor_parallel_dim}: experts are not split by tensor parallelism. Set "
                "tensor_parallel_dim=1; their weights are sharded over all ranks anyway."
            )

    def groups(self, model: TransformerDecoder) -> Iterable[nn.Parameter]:
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    def starting(self, base: Mapping[str, torch.Tensor], model: TransformerDecoder) -> Mapping[str, torch.Tensor]:
        return base

    def finished(self, weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return weights

    def write_own(self, weights: Mapping[str, torch.Tensor], folder: Path, checkpointer: Any) -> bool:
        return False


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Leave the weights of `model` whose names match one of `patterns` (`tok_embeddings.*`, `layers.[0-7].*`) alone."""
    names = dict(model.named_parameters())
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            first = next(iter(names), None)
            raise UserError(f"freeze: no weight's name matches {pattern!r}. Names are like {first!r} and 'norm.scale'.")
        for name in matched:
            names[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise UserError("freeze: leaves nothing to train. Name fewer weights.")
