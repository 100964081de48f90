"""What an adapter is: the settings that decide its modules, its scale, its learning rates."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from omegaconf import DictConfig, OmegaConf

from torchtune_agent.errors import UserError, did_you_mean
from torchtune_agent.models.conversion import last_name_from_hf

Kind = Literal["lora", "dora"]
ALL_LINEAR = "all-linear"
PARTS = (".lora_a.weight", ".lora_b.weight", ".magnitude")  # how the names of an adapter's parameters end


@dataclass(frozen=True)
class AdapterSettings:
    """One adapter: what it is, how large, and where it is put."""

    kind: Kind = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank
    quantize_base: bool = False  # keep the adapted linears' own weights in NF4
    # Last names (`q_proj`, or Hugging Face's `o_proj`), patterns of full names (`layers.1?.attn.*`), or all linears of
    # all layers, which experts and their routers are not
    targets: tuple[str, ...] = (ALL_LINEAR,)
    modules_to_save: tuple[str, ...] = ()  # trained whole beside the adapters, named likewise: embed_tokens, lm_head
    lora_plus_lr_ratio: float | None = None  # LoRA+: learning rate of the B matrices over that of the A matrices
    seed: int = 0  # of the A matrices' first values

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"adapter.kind={self.kind!r}: {did_you_mean(str(self.kind), get_args(Kind))}")
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"adapter: rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}: rank must be 1 or more, "
                "alpha above 0, dropout from 0 to below 1."
            )
        if self.lora_plus_lr_ratio is not None and self.lora_plus_lr_ratio <= 0:
            raise UserError(f"adapter.lora_plus_lr_ratio={self.lora_plus_lr_ratio}: must be above 0 (16 is usual).")
        if not self.targets:
            raise UserError("adapter.targets: names no module. Use [all-linear], or names such as [q_proj, v_proj].")

    @classmethod
    def from_config(cls, section: DictConfig | Mapping[str, Any]) -> "AdapterSettings":
        values: Any = OmegaConf.to_container(section, resolve=True) if isinstance(section, DictConfig) else section
        known = {field.name for field in fields(cls)}
        for key in values:
            if key not in known:
                raise UserError(f"adapter.{key}: unknown key. {did_you_mean(str(key), known)}")
        values = dict(values)
        for key in {"targets", "modules_to_save"} & values.keys():
            names = values[key] or ()
            values[key] = (names,) if isinstance(names, str) else tuple(names)
        return cls(**values)

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def is_meant(module: str, patterns: Iterable[str]) -> bool:
    """Whether one of `patterns`, as users write them, means the module of that name."""
    return any(_matches(module, pattern) for pattern in patterns)


def _matches(module: str, pattern: str) -> bool:
    if pattern == ALL_LINEAR:
        return module.startswith("layers.")
    if "." in pattern:
        return fnmatchcase(module, pattern)
    return fnmatchcase(module.rpartition(".")[2], last_name_from_hf(pattern))
