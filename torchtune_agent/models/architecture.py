"""What a decoder is made of, read from the `config.json` of a Hugging Face checkpoint folder.

One description serves every family: they differ in a handful of choices, not in code. What the description cannot say
(experts that all tokens share, norms in other places, a rope of another kind) is refused by name, never approximated.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtune_agent.errors import UserError
from torchtune_agent.models.experts import Experts


@dataclass(frozen=True)
class Family:
    """How a `model_type` differs from the plainest decoder, beside what its config says."""

    interleaved_rope: bool  # torchtune's models of this family rotate neighbours, Hugging Face's halves of a head
    qk_norm: bool = False
    experts: bool = False
    qkv_bias: bool = False  # always, whatever the config says
    reads_attention_bias: bool = False
    reads_mlp_bias: bool = False
    window_is_optional: bool = True  # a window counts only where `use_sliding_window` is true
    window: int | None = None  # where the config does not say
    rope_theta: float = 10_000.0  # where the config has none
    tied: bool = False  # where the config does not say


FAMILIES: dict[str, Family] = {
    "llama": Family(interleaved_rope=True, reads_attention_bias=True, reads_mlp_bias=True),
    "mistral": Family(interleaved_rope=True, window_is_optional=False, window=4096),
    "qwen2": Family(interleaved_rope=False, qkv_bias=True),
    "qwen3": Family(interleaved_rope=False, qk_norm=True, reads_attention_bias=True),
    "qwen3_moe": Family(interleaved_rope=False, qk_norm=True, experts=True, reads_attention_bias=True),
    "smollm3": Family(
        interleaved_rope=False, reads_attention_bias=True, reads_mlp_bias=True, rope_theta=2_000_000.0, tied=True
    ),
}

ROPE_SCALINGS: dict[str, tuple[str, ...]] = {  # kind: what it cannot do without
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}


@dataclass(frozen=True)
class Architecture:
    """Everything `build_decoder` and the conversion of weights need to know."""

    model_type: str
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    embed_dim: int
    head_dim: int
    intermediate_dim: int
    max_seq_len: int
    norm_eps: float
    rope_base: float
    rope_scaling: Mapping[str, Any]  # {} or {"rope_type": ..., and its numbers}
    rope_layers: tuple[bool, ...]  # False: a layer without positions
    interleaved_rope: bool
    qk_norm: bool
    qkv_bias: bool
    output_bias: bool  # of the attention's output projection
    mlp_bias: bool
    tied: bool
    experts: Experts | None = None

    @classmethod
    def from_folder(cls, model_dir: str | Path) -> "Architecture":
        path = Path(model_dir) / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"model_dir: cannot read {path}: {error.strerror}. Name a folder with a Hugging Face checkpoint "
                "(`tune download REPOSITORY --output-dir FOLDER` makes one)."
            ) from error
        except ValueError as error:
            raise UserError(f"model_dir: {path} is not JSON: {error}") from error
        if not isinstance(config, dict):
            raise UserError(f"model_dir: {path} is not a JSON object.")
        return cls.from_config(config, str(path))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "config.json") -> "Architecture":
        """`where` names the file in errors."""
        family = _family(config, where)
        read = _Reader(config, where)
        num_layers, num_heads = read.count("num_hidden_layers"), read.count("num_attention_heads")
        embed_dim, max_seq_len = read.count("hidden_size"), read.count("max_position_embeddings")
        num_kv_heads = read.count("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise UserError(f"{where}: num_attention_heads={num_heads} is no multiple of {num_kv_heads} key heads.")
        scaling = _rope(config, where, max_seq_len)
        bias = family.reads_attention_bias and bool(config.get("attention_bias", False))
        return cls(
            model_type=config["model_type"],
            vocab_size=read.count("vocab_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            embed_dim=embed_dim,
            head_dim=read.count("head_dim", embed_dim // num_heads),
            intermediate_dim=read.count("intermediate_size"),
            max_seq_len=min(max_seq_len, _window(config, family) or max_seq_len),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_base=float(scaling.pop("rope_theta", None) or config.get("rope_theta") or family.rope_theta),
            rope_scaling={} if scaling["rope_type"] == "default" else scaling,
            rope_layers=_rope_layers(config, num_layers),
            interleaved_rope=family.interleaved_rope,
            qk_norm=family.qk_norm,
            qkv_bias=family.qkv_bias or bias,
            output_bias=bias,
            mlp_bias=family.reads_mlp_bias and bool(config.get("mlp_bias", False)),
            tied=bool(config.get("tie_word_embeddings", family.tied)),
            experts=_experts(config, where, read, num_layers) if family.experts else None,
        )


class _Reader:
    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config = config
        self._where = where

    def count(self, key: str, otherwise: int | None = None) -> int:
        value = self._config.get(key)
        value = otherwise if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{self._where}: {key} is {value!r}, not a positive whole number.")
        return value


def _experts(config: Mapping[str, Any], where: str, read: _Reader, num_layers: int) -> Experts:
    """Every so many layers have experts, but for those that are named."""
    number = read.count("num_experts", config.get("num_local_experts"))  # as `transformers` 4 and 5 call it
    per_token, every = read.count("num_experts_per_tok"), read.count("decoder_sparse_step", 1)
    if per_token > number:
        raise UserError(f"{where}: num_experts_per_tok={per_token}: there are only {number} experts.")
    plain = config.get("mlp_only_layers") or []
    if not isinstance(plain, list) or not all(layer in range(num_layers) for layer in plain):
        raise UserError(f"{where}: mlp_only_layers is {plain!r}, not a list of layers from 0 to {num_layers - 1}.")
    return Experts(
        number=number,
        per_token=per_token,
        intermediate_dim=read.count("moe_intermediate_size"),
        normalized=bool(config.get("norm_topk_prob", False)),
        layers=tuple(layer not in plain and (layer + 1) % every == 0 for layer in range(num_layers)),
    )


def _family(config: Mapping[str, Any], where: str) -> Family:
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"{where}: model_type {kind!r} is not one hf_model can build; it builds {', '.join(sorted(FAMILIES))}. "
            "For a model of torchtune's own, name its builder and torchtune's checkpointer instead."
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(f"{where}: hidden_act {activation!r} is not supported for {kind}; only 'silu' is.")
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method")
        raise UserError(
            f"{where}: the weights are quantized ({method}), which cannot be trained. Use the model's unquantized "
            "checkpoint; adapters can quantize it while it is loaded."
        )
    return FAMILIES[kind]


def _rope(config: Mapping[str, Any], where: str, max_seq_len: int) -> dict[str, Any]:
    """The rope's numbers under one name each; folders of `transformers` 4 and 5 spell them differently."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = dict(given)
    kind = rope.pop("type", None)  # as old folders call it
    kind = rope.setdefault("rope_type", kind or "default")
    if kind not in ROPE_SCALINGS:
        raise UserError(f"{where}: rope_type {kind!r} is not supported. Known: {', '.join(ROPE_SCALINGS)}.")
    missing = [key for key in ROPE_SCALINGS[kind] if rope.get(key) is None]
    if missing:
        raise UserError(f"{where}: rope_type {kind!r} needs {', '.join(missing)}.")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{where}: a rope on a part of each head (partial_rotary_factor) is not supported.")
    if kind == "yarn":
        rope["original_max_position_embeddings"] = rope.get("original_max_position_embeddings") or max_seq_len
    return rope


def _window(config: Mapping[str, Any], family: Family) -> int | None:
    """How many tokens attention sees where that is less than all. Up to that length it makes no difference, so it
    becomes the longest sequence the model takes, and longer ones are refused."""
    if family.window_is_optional and not config.get("use_sliding_window", False):
        return None
    kinds = config.get("layer_types")
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return config.get("sliding_window", family.window)


def _rope_layers(config: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    if config["model_type"] != "smollm3":
        return (True,) * num_layers
    given = config.get("no_rope_layers")  # 1 means: with rope
    if given is not None:
        return tuple(bool(flag) for flag in given[:num_layers])
    every = config.get("no_rope_layer_interval", 4)
    return tuple((layer + 1) % every != 0 for layer in range(num_layers))
