"""Weights of models with adapters: what training starts from, and what is left when the adapters are merged.

Both are mappings that make one tensor at a time, as the files they come from and go to are read and written.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4

from torchtune_agent.models.adapter import PARTS, AdapterSettings
from torchtune_agent.models.weights import HeldWeights, Weights


class AdaptedWeights(Weights):
    """The base model's weights, together with what new adapters on `model` start from.

    A: as torch initializes a linear, by seed and name, so that every world size starts alike. B: zero. DoRA's
    magnitude: the norms of the base weight's rows, as it is once it is quantized.
    """

    def __init__(self, base: Mapping[str, torch.Tensor], model: nn.Module, seed: int = 0) -> None:
        self._base = base if isinstance(base, Weights) else HeldWeights(base)
        self._model: dict[str, Any] = model.state_dict()
        self._like = {name: like for name, like in self._model.items() if name.endswith(PARTS) and name not in base}
        self._seed = seed

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._like:
            return self._base[name]
        like = self._like[name]
        if name.endswith(".lora_b.weight"):
            return torch.zeros(like.shape)
        if name.endswith(".magnitude"):
            return self._magnitude(name.replace(".magnitude", ".weight"))
        generator = torch.Generator().manual_seed(_number(self._seed, name))
        bound = 1 / math.sqrt(like.shape[1])  # kaiming_uniform_ with a = sqrt(5)
        return torch.empty(like.shape).uniform_(-bound, bound, generator=generator)

    def _magnitude(self, name: str) -> torch.Tensor:
        like = self._model[name]
        local = like._local_tensor if isinstance(like, DTensor) else like
        weight = self._base[name].to(like.dtype)
        if isinstance(local, NF4Tensor):
            sizes = {"block_size": local.block_size, "scaler_block_size": local.scaler_block_size}
            weight = to_nf4(weight, **sizes).to(like.dtype)
        return torch.linalg.norm(weight, dim=1)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._like[name].shape) if name in self._like else self._base.shape(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self[name][start:stop] if name in self._like else self._base.rows(name, start, stop)

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self._like.pop(name, None)
        self._base[name] = tensor

    def __delitem__(self, name: str) -> None:
        if self._like.pop(name, None) is None:
            del self._base[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._base
        yield from self._like

    def __len__(self) -> int:
        return len(self._base) + len(self._like)

    def __contains__(self, name: object) -> bool:
        return name in self._like or name in self._base


def _number(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")


def merge_adapters(state_dict: Mapping[str, torch.Tensor], settings: AdapterSettings) -> "MergedWeights":
    """The full weights of the model that `state_dict` and its adapters are together, each computed when asked for."""
    return MergedWeights(state_dict, settings)


class MergedWeights(Mapping[str, torch.Tensor]):
    """A model's weights without its adapters, which are added to them."""

    def __init__(self, state_dict: Mapping[str, torch.Tensor], settings: AdapterSettings) -> None:
        self._state = state_dict
        self._scaling = settings.scaling

    @torch.no_grad()
    def __getitem__(self, name: str) -> torch.Tensor:
        if name.endswith(PARTS):
            raise KeyError(name)
        base = self._state[name]
        if isinstance(base, NF4Tensor):
            base = base.to(base.dtype)
        module = name.removesuffix(".weight")
        if f"{module}.lora_a.weight" not in self._state:
            return base
        a, b = (self._state[f"{module}.{part}.weight"].float() for part in ("lora_a", "lora_b"))
        merged = base.float() + self._scaling * (b @ a)
        if f"{module}.magnitude" in self._state:
            merged *= (self._state[f"{module}.magnitude"].float() / torch.linalg.norm(merged, dim=1)).unsqueeze(1)
        return merged.to(base.dtype)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._state if not name.endswith(PARTS))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and not name.endswith(PARTS) and name in self._state
