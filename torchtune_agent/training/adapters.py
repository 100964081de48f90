"""Adapters on any decoder, by module names: LoRA, rsLoRA, DoRA, over a base that may be quantized (QLoRA, QDoRA).

torchtune has a second builder per model family for this; here the linears of a finished model are exchanged, on the
meta device or off it, so a model needs no builder of its own, and torchtune's `lora_*` builders still work.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torchtune import training
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import DoRALinear, LoRALinear, get_adapter_params, set_trainable_params

from torchtune_agent.config import instantiate
from torchtune_agent.errors import UserError
from torchtune_agent.models.adapted import adapted, check_blocks
from torchtune_agent.models.adapter import PARTS, AdapterSettings, is_meant
from torchtune_agent.models.adapter_weights import AdaptedWeights, merge_adapters
from torchtune_agent.models.checkpointer import HFCheckpointer
from torchtune_agent.models.experts import ExpertStacks, idle_weights
from torchtune_agent.models.peft_format import save_peft
from torchtune_agent.training.parameters import FullParameters, ParameterSetup
from torchtune_agent.training.settings import Settings


class AdapterParameters:
    """A recipe's parameters: train adapters, and modules that are named; freeze all else.

    A model from one of torchtune's `lora_*` builders keeps the adapters it has.
    """

    def __init__(self, adapter: AdapterSettings) -> None:
        self.adapter = adapter
        self._learning_rate = 0.0

    def build(self, cfg: DictConfig, settings: Settings) -> TransformerDecoder:
        """The model on the meta device, its adapters on it; `requires_grad` is true of theirs and `modules_to_save`."""
        self._check(cfg, settings)
        with training.set_default_dtype(settings.torch_dtype), torch.device("meta"):
            model = instantiate(cfg.model, "model")
            if not isinstance(model, TransformerDecoder):
                raise UserError(f"model: {type(model).__name__} is not a text decoder; adapters need one.")
            if adapter_parameters(model):
                self._check_builder(model)
                set_trainable_params(model, adapter_parameters(model))
            else:
                add_adapters(model, self.adapter, num_shards=int(os.environ.get("WORLD_SIZE", 1)))
            train_whole(model, self.adapter.modules_to_save)
        return model

    def _check(self, cfg: DictConfig, settings: Settings) -> None:
        if settings.freeze:
            raise UserError("freeze: with adapters all other weights are frozen anyway. Take one of the two out.")
        if settings.tensor_parallel_dim > 1:
            raise UserError(
                f"tensor_parallel_dim={settings.tensor_parallel_dim}: adapters are not split by tensor parallelism. "
                "Set tensor_parallel_dim=1; the frozen base is sharded over all ranks anyway."
            )
        if self.adapter.quantize_base and settings.fsdp_cpu_offload:
            raise UserError(
                "fsdp_cpu_offload=True: an NF4 base is not offloaded. Set one of it and adapter.quantize_base only."
            )
        if self.adapter.lora_plus_lr_ratio is None:
            return
        if settings.optimizer_in_bwd:
            raise UserError(
                "optimizer_in_bwd=True: every parameter then has an optimizer with one learning rate, so "
                "adapter.lora_plus_lr_ratio would be lost. Set one of them only."
            )
        if cfg.optimizer.get("lr") is None:
            raise UserError("optimizer.lr: adapter.lora_plus_lr_ratio multiplies it, so it must be given.")
        self._learning_rate = float(cfg.optimizer.lr)

    def _check_builder(self, model: nn.Module) -> None:
        """What is merged and exported by the config's numbers must have been made with them."""
        for name, module in model.named_modules():
            if isinstance(module, LoRALinear | DoRALinear):
                made, given = (module.rank, module.alpha), (self.adapter.rank, self.adapter.alpha)
                if made != given:
                    raise UserError(
                        f"adapter: rank and alpha are {given[0]} and {given[1]:g}, but the model's builder made {name} "
                        f"with {made[0]} and {made[1]:g}. Set adapter.rank={made[0]} adapter.alpha={made[1]:g}."
                    )

    def groups(self, model: TransformerDecoder) -> Iterable[nn.Parameter] | Iterable[dict[str, Any]]:
        ratio = self.adapter.lora_plus_lr_ratio
        if ratio is None:
            return [parameter for parameter in model.parameters() if parameter.requires_grad]
        return lora_plus_groups(model, self._learning_rate, ratio)

    def starting(self, base: Mapping[str, torch.Tensor], model: TransformerDecoder) -> Mapping[str, torch.Tensor]:
        return AdaptedWeights(base, model, self.adapter.seed)

    def finished(self, weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return merge_adapters(weights, self.adapter)

    def write_own(self, weights: Mapping[str, torch.Tensor], folder: Path, checkpointer: Any) -> bool:
        """In peft's format, which knows the names of Hugging Face folders only."""
        if not isinstance(checkpointer, HFCheckpointer):
            return False
        save_peft(weights, folder, self.adapter, checkpointer.architecture, str(checkpointer.model_dir))
        return True


def parameter_setup(cfg: DictConfig) -> ParameterSetup:
    """What the config trains: the section `adapter`'s adapters, or without one every weight."""
    section = cfg.get("adapter")
    if section is None:
        return FullParameters()
    if not isinstance(section, DictConfig):
        raise UserError(f"adapter={section}: must be a section, for example adapter.kind=lora adapter.rank=16.")
    return AdapterParameters(AdapterSettings.from_config(section))


def add_adapters(model: TransformerDecoder, settings: AdapterSettings, num_shards: int = 1) -> list[str]:
    """Exchange the targeted linears of `model` for adapted ones and freeze all else; returns the linears' names.

    `num_shards` ranks will share each of them, which a quantized one must be able to bear.
    """
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    names = [name for name in linears if is_meant(name, settings.targets)]
    unmatched = [t for t in settings.targets if not any(is_meant(name, [t]) for name in names)]
    if unmatched:
        known = sorted({name.rpartition(".")[2] for name in linears})
        raise UserError(
            f"adapter.targets: {', '.join(unmatched)}: the model has no such linear. Its linears are called "
            f"{', '.join(known)}"
            + ("." if "output" in linears else " (its output is tied to the embedding).")
            + (" Experts and their router are no linears: they stay frozen." if any(idle_weights(model)) else "")
        )
    if settings.quantize_base:
        check_blocks({name: linears[name].weight for name in names}, num_shards)
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, adapted(linears[name], settings))
    set_trainable_params(model, get_adapter_params(model))
    return names


def train_whole(model: TransformerDecoder, patterns: Sequence[str]) -> None:
    """Have the modules that `patterns` mean trained as they are, beside the adapters."""
    adapters = get_adapter_params(model)
    own = {
        name: module
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None and not isinstance(module, ExpertStacks)
    }
    for pattern in patterns:
        names = [name for name in own if is_meant(name, [pattern])]
        if not names:
            raise UserError(
                f"adapter.modules_to_save: {pattern}: the model has no such module with weights."
                + ("" if "output" in own else " Its output is tied to the embedding: name embed_tokens for both.")
                + (" Experts stay frozen: peft has no format for them." if any(idle_weights(model)) else "")
            )
        adapted_one = next((name for name in names if any(each.startswith(f"{name}.") for each in adapters)), None)
        if adapted_one is not None:
            raise UserError(
                f"adapter.modules_to_save: {pattern}: {adapted_one} has an adapter. Take it out of adapter.targets."
            )
        for name in names:
            for parameter in own[name].parameters(recurse=False):
                parameter.requires_grad_(True)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all adapters in `model`, by name; of torchtune's own builders, too."""
    return get_adapter_params(model)


def lora_plus_groups(model: nn.Module, learning_rate: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """LoRA+ (https://arxiv.org/abs/2402.12354): B matrices and DoRA's magnitudes learn `ratio` times faster.

    Weight decay is the optimizer's own for both. `initial_lr` is what a schedule multiplies, also in a resumed run.
    """
    slow: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (fast if name.endswith(PARTS[1:]) else slow).append(parameter)
    rates = (learning_rate, learning_rate * ratio)
    return [{"params": p, "lr": rate, "initial_lr": rate} for p, rate in zip((slow, fast), rates, strict=True)]
