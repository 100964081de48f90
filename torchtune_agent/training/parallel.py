"""The model, made ready for training: split over ranks, its activations checkpointed, compiled, loaded."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torchtune import training
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.training.activations import apply_selective_activation_checkpointing

from torchtune_agent.config import instantiate
from torchtune_agent.distributed import World
from torchtune_agent.models.loading import load_weights
from torchtune_agent.training.settings import Settings


def prepare(
    model: TransformerDecoder, cfg: DictConfig, settings: Settings, world: World, weights: Mapping[str, Any] | None
) -> None:
    """Parallelize `model` (on the meta device) in place and load `weights` into it; None: leave them to be filled."""
    if settings.fsdp_cpu_offload:
        training.set_torch_num_threads()  # the optimizer then runs on the CPU
    if settings.compile:
        training.compile_model(model, verbose=world.is_main)  # pyright: ignore
    if settings.tensor_parallel_dim > 1:
        plan = instantiate(cfg.tensor_parallel_plan, "tensor_parallel_plan")
        parallelize_module(
            training.prepare_mha_for_tp(model, world.mesh["tp"]), world.mesh["tp"], parallelize_plan=plan
        )
    checkpoint_activations(model, settings)
    if world.size > 1 or settings.fsdp_cpu_offload:  # alone there is nothing to share, and FSDP would keep copies
        training.shard_model(
            model,  # pyright: ignore
            [partial(training.get_shard_conditions, names_to_match=settings.custom_sharded_layers)],
            cpu_offload=settings.fsdp_cpu_offload,
            reshard_after_forward=settings.fsdp_reshard_after_forward,
            dp_mesh=world.mesh["dp"],
        )
    with training.set_default_dtype(settings.torch_dtype), world.device:
        for module in model.modules():
            if hasattr(module, "rope_init"):  # position tables are not part of a checkpoint
                module.rope_init()  # pyright: ignore
    if weights is None:
        _make_room(model, torch.device("cpu") if settings.fsdp_cpu_offload else world.device)
    else:
        load_weights(model, weights, world.device, cpu_offload=settings.fsdp_cpu_offload)
    training.validate_no_params_on_meta_device(model)


def _make_room(model: TransformerDecoder, device: torch.device) -> None:
    """Give every weight memory with nothing in it yet."""
    empty = {}
    for name, weight in model.state_dict().items():
        if isinstance(weight, DTensor):
            local = torch.empty_like(weight.to_local(), device=device)
            made = DTensor.from_local(
                local,
                weight.device_mesh,
                weight.placements,
                run_check=False,
                shape=weight.shape,
                stride=weight.stride(),
            )
        else:
            made = torch.empty_like(weight, device=device)
        empty[name] = nn.Parameter(made, requires_grad=weight.requires_grad)
    model.load_state_dict(empty, strict=True, assign=True)


def checkpoint_activations(model: TransformerDecoder, settings: Settings) -> None:
    """Have activations made again in the backward pass, as the config says."""
    if settings.enable_activation_checkpointing:
        training.set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    elif settings.ac_mode is not None:
        apply_selective_activation_checkpointing(model, settings.ac_mode, settings.ac_option)
