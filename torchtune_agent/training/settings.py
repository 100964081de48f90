"""Every plain key of a training config, its type, its default, and what does not go together.

The keys are torchtune's. Components (model, dataset, ...) are named in COMPONENT_KEYS and check their own
options when they are made.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from omegaconf import DictConfig
from pydantic import BaseModel, ConfigDict, StrictBool, ValidationError

from torchtune_agent.config import check_keys, resolved
from torchtune_agent.errors import UserError, did_you_mean
from torchtune_agent.metrics.table import TOP_K

T = TypeVar("T", bound=BaseModel)

COMPONENT_KEYS = {
    "model",
    "tokenizer",
    "checkpointer",
    "dataset",
    "dataset_val",
    "optimizer",
    "lr_scheduler",
    "loss",
    "metric_logger",
    "profiler",
    "tensor_parallel_plan",
    "adapter",
}
# What only some recipes read, and which: training recipes that do not are not to train as if it were not there.
RECIPE_SECTIONS = {
    "active": "agent_active_distributed",
    "coreset": "agent_coreset_distributed",
    "curriculum": "agent_coreset_distributed",
    "stream": "agent_replay_distributed",
    "phases": "agent_replay_distributed",
    "arrivals": "agent_replay_distributed",
    "continual": "agent_replay_distributed",
}
# Read by agent_data_check, agent_plan and agent_export, which pass over the sections of recipes: one file serves all
OTHER_SECTIONS = {"check", "plan", "export", *RECIPE_SECTIONS}
_REQUIRED_COMPONENTS = ("model", "tokenizer", "checkpointer", "dataset", "optimizer")


def checked(model: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """The plain keys `values` as a `model`; a value of the wrong type is refused. `prefix` names their section."""
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{prefix}{first['loc'][0]}={first['input']!r}: {first['msg'].lower()}.") from error


class Settings(BaseModel):
    """The plain keys of a training config."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    output_dir: Path
    model_dir: str | None = None  # read by nobody but `${model_dir}` in other keys
    seed: int | None = None
    shuffle: bool = True
    # True: there must be a checkpoint; "auto": where there never was one, start anew; a path: that one
    resume_from_checkpoint: StrictBool | Literal["auto"] | Path = False
    resume_override: list[str] = []  # keys whose new values a resumed run is to go on with
    freeze: list[str] = []  # patterns of names of weights that stay as they are
    # New tokens for the model in model_dir, each with a description whose tokens tell what it starts from, or without
    tool_call_special_tokens: list[str] | dict[str, str | None] = []
    # Steps
    epochs: int = 1
    max_steps_per_epoch: int | None = None
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    clip_grad_norm: float | Literal["inf"] | None = None
    optimizer_in_bwd: bool = False
    max_nonfinite_steps: int = 3
    # Validation: every so many steps, and at each epoch's end
    run_val_every_n_steps: int | None = None
    batch_size_val: int | None = None
    # Device and parallelism
    device: str = "cuda"
    dtype: str = "bf16"
    compile: bool = False
    fsdp_cpu_offload: bool = False
    fsdp_reshard_after_forward: bool = True
    custom_sharded_layers: list[str] | None = None
    process_group_timeout_seconds: int = 600
    tensor_parallel_dim: int = 1
    # Activations
    enable_activation_checkpointing: bool = False
    enable_activation_offloading: bool = False
    ac_mode: Literal["full", "selective"] | None = None
    ac_option: int | None = None
    # Logs
    log_every_n_steps: int = 1
    log_peak_memory_stats: bool = False
    enable_detailed_metrics: bool = True
    enable_token_classification: bool = True
    entropy_k: int = 10
    log_detailed_metrics_every_n_steps: int = 10
    metric_names: Literal["flat", "slash"] = "flat"
    log_by: list[Literal["tool", "source"]] = []
    log_by_top_n: int = 20
    log_sample_losses: bool = False
    # Checkpoints: at each epoch's end, and every so many steps
    save_every_n_steps: int | None = None
    keep_last_n_checkpoints: int = 2
    keep_best: str | None = None  # a metric of validation; its best checkpoint is saved, and never removed
    enable_async_checkpointing: bool = False
    export_every_n_steps: int | None = None  # write a folder to load and serve every so many steps, too
    # Packages and dotted paths that components may come from, beside torch, torchtune, torchao and torchtune_agent
    trusted_components: list[str] = []
    cudnn_deterministic_mode: int | str | None = None

    @classmethod
    def from_config(cls, cfg: DictConfig, *, for_this_machine: bool = True) -> "Settings":
        """Read the plain keys of `cfg`; unknown keys, wrong types and values that cannot be are refused.

        A config for another machine may name a device that is not here."""
        elsewhere = COMPONENT_KEYS | OTHER_SECTIONS
        check_keys(cfg, set(cls.model_fields) | elsewhere)
        values = resolved(cfg)
        for key in ("output_dir", *_REQUIRED_COMPONENTS):
            if values.get(key) is None:
                raise UserError(
                    f"{key}: not given. Every training config needs it; `tune cat tiny/agent_sft` shows one."
                )
        settings = checked(cls, {key: value for key, value in values.items() if key not in elsewhere})
        settings._check_ranges()
        if for_this_machine:
            settings._check_device()
        settings._check_together(cfg)
        return settings

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]

    def _check_ranges(self) -> None:
        at_least_one = (
            "epochs",
            "max_steps_per_epoch",
            "batch_size",
            "batch_size_val",
            "gradient_accumulation_steps",
            "run_val_every_n_steps",
            "save_every_n_steps",
            "keep_last_n_checkpoints",
            "export_every_n_steps",
            "tensor_parallel_dim",
            "log_every_n_steps",
            "log_detailed_metrics_every_n_steps",
            "log_by_top_n",
            "ac_option",
            "max_nonfinite_steps",
            "process_group_timeout_seconds",
        )
        for key in at_least_one:
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{key}={value}: must be at least 1.")
        if not 1 <= self.entropy_k <= max(TOP_K):
            raise UserError(f"entropy_k={self.entropy_k}: must be between 1 and {max(TOP_K)}.")
        if self.clip_grad_norm is not None and not float(self.clip_grad_norm) > 0:
            raise UserError(f"clip_grad_norm={self.clip_grad_norm}: must be above 0 ('inf' only measures the norm).")

    def _check_device(self) -> None:
        kind = self.device.split(":")[0]
        if kind not in ("cuda", "cpu"):
            raise UserError(f"device={self.device}: must be 'cuda' or 'cpu'.")
        if kind == "cuda" and not torch.cuda.is_available():
            raise UserError("device=cuda: this machine has no usable CUDA device. Set device=cpu, or check nvidia-smi.")
        if self.dtype == "fp16":
            raise UserError("dtype=fp16: full fp16 training is not supported. Set dtype=bf16 or dtype=fp32.")
        if self.dtype not in ("fp32", "bf16"):
            raise UserError(f"dtype={self.dtype}: must be 'bf16' or 'fp32'.")
        if kind == "cpu":
            for key, on in (
                ("fsdp_cpu_offload", self.fsdp_cpu_offload),
                ("enable_activation_offloading", self.enable_activation_offloading),
            ):
                if on:
                    raise UserError(
                        f"{key}=True: needs device=cuda; on a CPU there is nowhere to offload to. Set {key}=False."
                    )
        elif self.dtype == "bf16" and not torch.cuda.is_bf16_supported():
            raise UserError("dtype=bf16: this GPU does not support it. Set dtype=fp32.")

    def _check_together(self, cfg: DictConfig) -> None:
        if self.optimizer_in_bwd and self.clip_grad_norm is not None:
            raise UserError("clip_grad_norm: cannot be used with optimizer_in_bwd=True. Set clip_grad_norm=null.")
        if self.optimizer_in_bwd and self.gradient_accumulation_steps > 1:
            raise UserError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}: cannot be used with "
                "optimizer_in_bwd=True. Set gradient_accumulation_steps=1."
            )
        if self.enable_activation_offloading and not self.enable_activation_checkpointing:
            raise UserError("enable_activation_offloading=True: needs enable_activation_checkpointing=True.")
        if self.enable_activation_checkpointing and self.ac_mode is not None:
            raise UserError(f"ac_mode={self.ac_mode}: replaces enable_activation_checkpointing. Use one of the two.")
        if self.ac_mode == "selective" and self.ac_option is None:
            raise UserError("ac_option: not given. ac_mode=selective checkpoints every ac_option-th layer.")
        if self.tensor_parallel_dim > 1 and cfg.get("tensor_parallel_plan") is None:
            raise UserError(
                "tensor_parallel_plan: not given. tensor_parallel_dim above 1 needs one, for example "
                "tensor_parallel_plan._component_=torchtune.models.llama3.base_llama_tp_plan for Llama models."
            )
        if self.tensor_parallel_dim > 1 and cfg.optimizer.get("fused", False):
            raise UserError(
                "optimizer.fused=True: cannot be used with tensor_parallel_dim above 1. Set optimizer.fused=False."
            )
        weights = cfg.checkpointer.get("output_dir")
        if weights is not None and Path(weights).resolve() == (self.output_dir / "checkpoints").resolve():
            raise UserError(
                f"checkpointer.output_dir={weights}: that folder is for checkpoints to resume from. Name another one "
                "for the trained weights, for example ${output_dir}/model."
            )
        if self.keep_best is not None and cfg.get("dataset_val") is None:
            raise UserError(f"keep_best={self.keep_best}: needs dataset_val, whose metrics it names.")
        known = set(type(self).model_fields) | COMPONENT_KEYS | set(RECIPE_SECTIONS)
        for key in self.resume_override:
            if re.split(r"[.\[]", key)[0] not in known:
                raise UserError(f"resume_override: '{key}' is no config key. {did_you_mean(key, known)}")
        if cfg.get("dataset_val") is None and (self.run_val_every_n_steps or self.batch_size_val):
            raise UserError("dataset_val: not given, but run_val_every_n_steps or batch_size_val is. Name one.")

    def check_world_size(self, world_size: int) -> None:
        if world_size % self.tensor_parallel_dim != 0:
            raise UserError(
                f"tensor_parallel_dim={self.tensor_parallel_dim}: does not divide the {world_size} processes. "
                "Change it, or --nproc_per_node and --nnodes."
            )
