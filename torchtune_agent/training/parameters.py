"""The parameter seam: which parameters a run has, and which of them it trains."""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from omegaconf import DictConfig
from torch import nn
from torchtune import training
from torchtune.modules import TransformerDecoder

from torchtune_agent.config import instantiate
from torchtune_agent.training.settings import Settings


class ParameterSetup(Protocol):
    """What a recipe plugs into the Trainer as parameters."""

    def build(self, cfg: DictConfig, settings: Settings) -> TransformerDecoder:
        """The model on the meta device, every parameter's `requires_grad` set."""
        ...

    def groups(self, model: TransformerDecoder) -> Iterable[nn.Parameter] | Iterable[dict[str, Any]]:
        """What the optimizer is made with."""
        ...


class FullParameters:
    """Train every weight."""

    def build(self, cfg: DictConfig, settings: Settings) -> TransformerDecoder:
        with training.set_default_dtype(settings.torch_dtype), torch.device("meta"):
            return instantiate(cfg.model, "model")

    def groups(self, model: TransformerDecoder) -> Iterable[nn.Parameter]:
        return [parameter for parameter in model.parameters() if parameter.requires_grad]
