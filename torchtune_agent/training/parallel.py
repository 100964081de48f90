"""The model, made ready for training: split over ranks, its activations checkpointed, compiled, loaded."""

from functools import partial
from typing import Any

from omegaconf import DictConfig
from torch.distributed.tensor.parallel import parallelize_module
from torchtune import training
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.training.activations import apply_selective_activation_checkpointing

from torchtune_agent.config import instantiate
from torchtune_agent.distributed import World
from torchtune_agent.training.settings import Settings


def prepare(
    model: TransformerDecoder, cfg: DictConfig, settings: Settings, world: World, weights: dict[str, Any]
) -> None:
    """Parallelize `model` (on the meta device) in place and load `weights` into it."""
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
    training.load_from_full_model_state_dict(
        model,
        weights,
        world.device,
        strict=True,
        cpu_offload=settings.fsdp_cpu_offload,  # pyright: ignore
    )
    training.validate_no_params_on_meta_device(model)


def checkpoint_activations(model: TransformerDecoder, settings: Settings) -> None:
    """Have activations made again in the backward pass, as the config says."""
    if settings.enable_activation_checkpointing:
        training.set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    elif settings.ac_mode is not None:
        apply_selective_activation_checkpointing(model, settings.ac_mode, settings.ac_option)
