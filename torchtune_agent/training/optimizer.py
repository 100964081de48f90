"""One optimizer and its schedule, stepped after the backward pass or inside it.

With `optimizer_in_bwd` every parameter has an optimizer of its own, which steps as soon as the gradient is
there and frees it: gradients of the whole model never exist together.
"""

from typing import Any

import torch
from omegaconf import DictConfig
from torchtune import training
from torchtune.modules import TransformerDecoder

from torchtune_agent.config import instantiate
from torchtune_agent.distributed import clip_gradients, gradient_norm
from torchtune_agent.training.parameters import ParameterSetup
from torchtune_agent.training.settings import Settings

_WRAPPED = "_checkpoint_wrapped_module."


class Stepper:
    """Owns the optimizer(s) and the learning-rate schedule(s) of a run."""

    def __init__(
        self, model: TransformerDecoder, parameters: ParameterSetup, cfg: DictConfig, settings: Settings
    ) -> None:
        self._model = model
        self._max_norm = None if settings.clip_grad_norm is None else float(settings.clip_grad_norm)
        self.updates_in_backward = settings.optimizer_in_bwd
        # A wrapper around a layer (activation checkpointing) is no part of a parameter's name in a checkpoint.
        self.names = {p: name.replace(_WRAPPED, "") for name, p in model.named_parameters() if p.requires_grad}
        self.schedules: list[Any] = []
        if self.updates_in_backward:
            by_parameter = {p: instantiate(cfg.optimizer, "optimizer", [p]) for p in self.names}
            training.register_optim_in_bwd_hooks(model, by_parameter)
            self.optimizers = list(by_parameter.values())
        else:
            self.optimizers = [instantiate(cfg.optimizer, "optimizer", parameters.groups(model))]

    def schedule(self, cfg: DictConfig | None, *, num_steps: int, steps_done: int = 0) -> None:
        """Set up the learning-rate schedule as it stands after `steps_done`; without one the rate stays constant."""
        if cfg is None:
            return
        for optimizer in self.optimizers:
            if steps_done:
                for group in optimizer.param_groups:
                    group.setdefault("initial_lr", group["lr"])
            self.schedules.append(
                instantiate(cfg, "lr_scheduler", optimizer, num_training_steps=num_steps, last_epoch=steps_done - 1)
            )

    @property
    def learning_rate(self) -> float:
        return float(self.optimizers[0].param_groups[0]["lr"])

    def gradient_norm(self) -> torch.Tensor | None:
        """The norm of the whole gradient; None where it never exists as a whole."""
        return None if self.updates_in_backward else gradient_norm(self._model.parameters())

    def step(self, norm: torch.Tensor | None, *, update: bool = True) -> None:
        """Clip, update, clear the gradients, advance the schedule. Without `update` the gradients are thrown away."""
        if not self.updates_in_backward:
            if update:
                if self._max_norm is not None and norm is not None:
                    clip_gradients(self._model.parameters(), self._max_norm, norm)
                self.optimizers[0].step()
            self.optimizers[0].zero_grad(set_to_none=True)
        for schedule in self.schedules:
            schedule.step()
