"""Adapters in peft's format, which servers read: `adapter_config.json` and `adapter_model.safetensors`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from torchtune_agent.errors import UserError
from torchtune_agent.models.adapter import PARTS, AdapterSettings, is_meant
from torchtune_agent.models.architecture import Architecture
from torchtune_agent.models.conversion import Conversion, module_from_hf, module_to_hf
from torchtune_agent.models.weights import open_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SHORT = {"model.embed_tokens": "embed_tokens"}  # peft knows what is tied to it by this name only
_TIED = (f"{_PREFIX}model.embed_tokens.weight", f"{_PREFIX}lm_head.weight")
_PARTS: dict[str, str] = dict(zip(PARTS, (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"), strict=True))
# What peft can do and we cannot, and the value with which it does nothing
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "lora_bias": (False, None),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}


def save_peft(
    state_dict: Mapping[str, torch.Tensor],
    folder: Path,
    settings: AdapterSettings,
    architecture: Architecture,
    base_model: str | None = None,
) -> None:
    """Write the adapters in `state_dict` and what is trained beside them; `base_model` is the folder or name that peft
    loads first."""
    conversion = Conversion(architecture)
    adapters = {name: part for name in state_dict for part in PARTS if name.endswith(part)}
    if not adapters:
        raise UserError("adapter: the weights hold no adapter to save.")
    tensors: dict[str, torch.Tensor] = {}
    modules: dict[str, None] = {}
    for name, part in adapters.items():
        module = module_to_hf(name.removesuffix(part))
        if module is None:
            raise UserError(f"adapter: {name!r} is on no module of a {architecture.model_type} model.")
        modules[module] = None
        tensor = conversion.rows_to_hf(name, state_dict[name].detach().cpu())
        tensors[_PREFIX + module + _PARTS[part]] = tensor.contiguous()
    config = _config(settings, _targets(list(modules), architecture), base_model)
    whole = _whole(state_dict, settings, conversion)
    if whole:
        tensors |= {_PREFIX + name: tensor for name, tensor in whole.items()}
        modules_to_save = {name.rpartition(".")[0] for name in whole}
        config["modules_to_save"] = sorted(_SHORT.get(module, module) for module in modules_to_save)
    if architecture.tied and _TIED[0] in tensors:  # peft reads both then
        config["ensure_weight_tying"] = True
        tensors[_TIED[1]] = tensors[_TIED[0]].clone()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _whole(
    state_dict: Mapping[str, torch.Tensor], settings: AdapterSettings, conversion: Conversion
) -> dict[str, torch.Tensor]:
    """The weights of modules that are trained whole, by Hugging Face's names."""
    names = [name for name in state_dict if is_meant(name.rpartition(".")[0], settings.modules_to_save)]
    found = (weight for name in names for weight in conversion.to_hf(name, state_dict[name].detach().cpu()))
    return {name: tensor.contiguous() for name, tensor in found}


def _config(settings: AdapterSettings, targets: list[str], base_model: str | None) -> dict[str, Any]:
    whole = float(settings.alpha).is_integer()
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": int(settings.alpha) if whole else settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "use_dora": settings.kind == "dora",
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }


def _targets(modules: list[str], architecture: Architecture) -> list[str]:
    """Last names where they mean just these modules, as servers like them; full names otherwise."""
    last = sorted({module.rpartition(".")[2] for module in modules})
    meant = sum(1 if name == "lm_head" else architecture.num_layers for name in last)
    return last if meant == len(modules) else sorted(modules)


def load_peft(folder: str | Path, architecture: Architecture) -> tuple[dict[str, torch.Tensor], AdapterSettings]:
    """The adapter in `folder`: its weights in our names and layout, those of modules trained beside it among them, and
    the settings that make room for them."""
    path = Path(folder) / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"adapter: cannot read {path}: {error.strerror}. Name a folder written by peft.") from error
    except ValueError as error:
        raise UserError(f"adapter: {path} is not JSON: {error}") from error
    for key, allowed in _MUST_BE.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(f"adapter: {path}: {key}={config[key]!r} is not supported, only {allowed[0]!r}.")
    weights = _weights(Path(folder) / WEIGHTS, Conversion(architecture))
    modules = dict.fromkeys(name.removesuffix(part) for name in weights for part in PARTS if name.endswith(part))
    settings = AdapterSettings(
        kind="dora" if config.get("use_dora") else "lora",
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        dropout=float(config.get("lora_dropout") or 0.0),
        rslora=bool(config.get("use_rslora", False)),
        targets=tuple(modules),
        modules_to_save=tuple(name.rpartition(".")[0] for name in weights if not name.endswith(PARTS)),
    )
    return weights, settings


def _weights(path: Path, conversion: Conversion) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    file = open_safetensors(path)
    names = set(file.keys())
    if conversion.ties_output and names >= set(_TIED) and torch.equal(*map(file.get_tensor, _TIED)):
        names.remove(_TIED[1])  # the same weight again
    for name in sorted(names):
        ours = _ours(name.removeprefix(_PREFIX), conversion) if name.startswith(_PREFIX) else None
        if ours is None:
            raise UserError(f"adapter: {path} holds {name!r}, which is no part of an adapter on one of our models.")
        weights[ours] = conversion.rows_from_hf(ours, file.get_tensor(name))
    return weights


def _ours(name: str, conversion: Conversion) -> str | None:
    """Our name of a part of an adapter, or of a weight that was trained whole."""
    part = next((ours for ours, theirs in _PARTS.items() if name.endswith(theirs)), None)
    if part is not None:
        module = module_from_hf(name.removesuffix(_PARTS[part]))
        return None if module is None else module + part
    return None if module_from_hf(name.rpartition(".")[0]) is None else conversion.from_hf(name)
