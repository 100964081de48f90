"""From the fields of an AgentSFTConfig to a recipe and its config: what `tune run RECIPE --config ...` would be given.

The config is hf/agent_sft with the fields put in, and `overrides` put in last, as a command line would put them.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune.config._utils import _merge_yaml_and_cli_args

from torchtune_agent._tune import RECIPES, config_path
from torchtune_agent.api.config import AgentSFTConfig, References
from torchtune_agent.api.references import data_section
from torchtune_agent.errors import UserError

SFT, CORESET, CONTINUAL = "agent_sft_distributed", "agent_coreset_distributed", "agent_replay_distributed"
VALIDATION = "agent_validate_distributed"
_OF_TRAINING = ("adapter", "coreset", "curriculum", "stream", "phases", "continual")  # sections

# Where a field ends up, for error messages that name the config's key.
_FIELDS = {
    "tokenizer.max_seq_len": "max_seq_length",
    "optimizer.lr": "learning_rate",
    "dataset_val": "eval_data",
    "dataset": "train_data",
    "epochs": "num_epochs",
    "continual.epochs_per_phase": "num_epochs",
    "continual.buffer_size": "continual_buffer_size",
    "continual.replay_ratio": "continual_replay_ratio",
    "continual.replay_from": "continual_replay_from",
    "stream": "train_data",
    "coreset.strategy": "coreset_strategy",
    "coreset.target_size": "coreset_target_size",
    "adapter": "use_lora",
    "adapter.targets": "lora_target_modules",
    "adapter.quantize_base": "quantize_base",
    "checkpointer": "base_model",
    "model": "base_model",
    "tokenizer": "base_model",
}


def recipe_of(config: AgentSFTConfig) -> str:
    """The recipe that trains what the config asks for."""
    if config.use_coreset_selection and config.use_online_continual:
        raise UserError("use_coreset_selection, use_online_continual: cannot be combined in one run. Set one to False.")
    needed = {CORESET: config.use_coreset_selection, CONTINUAL: config.use_online_continual}
    name = next((name for name, is_needed in needed.items() if is_needed), SFT)
    if name not in RECIPES:
        field = "use_coreset_selection" if name == CORESET else "use_online_continual"
        raise UserError(f"{field}=True: needs the recipe {name}, which this version does not have. Set it to False.")
    return name


def training_config(config: AgentSFTConfig, model_dir: Path) -> DictConfig:
    """The config of a training run that starts from the model in `model_dir`."""
    values = _common(config, model_dir)
    train = [data_section(reference, "train_data") for reference in _listed(config.train_data)]
    held_out = [data_section(reference, "eval_data") for reference in _listed(config.eval_data)]
    if (adapter := _adapter(config)) is not None:
        values["adapter"] = adapter
    if config.use_online_continual:
        del values["dataset"]
        values |= _stream(config, train, held_out)
    else:
        values["dataset"] = _one_or_all(train)
        if held_out:
            values["dataset_val"] = _one_or_all(held_out)
        values["epochs"] = config.num_epochs
    if config.use_coreset_selection:
        size = {} if config.coreset_target_size is None else {"target_size": config.coreset_target_size}
        values["coreset"] = {"strategy": config.coreset_strategy, **size}
    return _overridden(values, config.overrides)


def validation_config(config: AgentSFTConfig, model_dir: Path, data: References) -> DictConfig:
    """The config of a run that measures the model in `model_dir` on `data`."""
    values = _common(config, model_dir)
    sections = [data_section(reference, "data") for reference in _listed(data)]
    cfg = _overridden(values | {"dataset": sections[0], "dataset_val": _one_or_all(sections)}, config.overrides)
    cfg.enable_detailed_metrics = True
    for key in _OF_TRAINING:
        cfg.pop(key, None)
    return cfg


def in_terms_of_fields(error: UserError) -> UserError:
    """The error, with the field that the config key it begins with comes from."""
    text = str(error)
    key = max((key for key in _FIELDS if text.startswith((f"{key}:", f"{key}=", f"{key}."))), key=len, default=None)
    if key is None or text.startswith(_FIELDS[key]):
        return error
    return UserError(f"{text} (In AgentSFTConfig: {_FIELDS[key]}.)")


def _common(config: AgentSFTConfig, model_dir: Path) -> dict[str, Any]:
    """What training and measuring have in common."""
    values: Any = OmegaConf.to_container(OmegaConf.load(config_path("hf/agent_sft")), resolve=False)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bf16" if device == "cuda" else "fp32"
    values |= {
        "model_dir": str(model_dir),
        "output_dir": str(config.output_dir.expanduser()),
        "seed": config.seed,
        "batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "device": device,
        "dtype": dtype,
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.TensorBoardLogger",
            "log_dir": "${output_dir}/logs",
        },
    }
    values["tokenizer"]["max_seq_len"] = config.max_seq_length
    values["optimizer"] |= {"lr": config.learning_rate, "fused": device == "cuda"}
    return values


def _adapter(config: AgentSFTConfig) -> dict[str, Any] | None:
    if not config.use_lora:
        for field in ("use_dora", "use_lora_plus", "quantize_base"):
            if getattr(config, field):
                raise UserError(f"{field}=True: is a kind of LoRA, and use_lora is False. Set use_lora=True.")
        return None
    section: dict[str, Any] = {
        "kind": "dora" if config.use_dora else "lora",
        "rank": config.lora_r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "quantize_base": config.quantize_base,
        "targets": list(config.lora_target_modules),
    }
    return section | ({"lora_plus_lr_ratio": config.lora_plus_lr_ratio} if config.use_lora_plus else {})


def _stream(config: AgentSFTConfig, train: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> dict[str, Any]:
    """Every entry of `train_data` is a phase, and the same entry of `eval_data` is what it is tested on."""
    least = 2 if config.continual_replay_from is None else 1
    if len(train) < least:
        raise UserError(
            "train_data: use_online_continual=True learns a list of data in its order, so that the earlier is not "
            "forgotten. Give two or more, or name an earlier run's output_dir in continual_replay_from."
        )
    if len(held_out) != len(train):
        raise UserError(
            f"eval_data: names {len(held_out)}, and train_data {len(train)}. use_online_continual=True needs one for "
            "each, to measure what is forgotten of it."
        )
    phases = [f"phase_{number}" for number in range(1, len(train) + 1)]
    section: dict[str, Any] = {
        "strategy": "replay",
        "buffer_size": config.continual_buffer_size,
        "replay_ratio": config.continual_replay_ratio,
        "epochs_per_phase": config.num_epochs,
    }
    if config.continual_replay_from is not None:
        section["replay_from"] = str(config.continual_replay_from)
    pairs = zip(phases, train, held_out, strict=True)
    return {
        "stream": phases,
        "phases": {name: {"dataset": data, "dataset_val": tested} for name, data, tested in pairs},
        "continual": section,
        "epochs": 1,
    }


def _listed(references: References | None) -> list[str | Path]:
    if references is None:
        return []
    return references if isinstance(references, list) else [references]


def _one_or_all(sections: list[dict[str, Any]]) -> Any:
    """A list of one data set is told from the data set by error messages and by what is kept of a run."""
    return sections[0] if len(sections) == 1 else sections


def _overridden(values: dict[str, Any], overrides: list[str]) -> DictConfig:
    try:
        return _merge_yaml_and_cli_args(Namespace(**values), overrides)
    except ValueError as error:
        raise UserError(f"overrides={overrides}: {error}. Write them as on a command line: 'key=value'.") from error
