"""The modules of an adapter: torchtune's, which its checkpointers and the loss know, mended where they differ from the
paper; and NF4 blocks that fit a matrix and its shards."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchao.dtypes.nf4tensor import linear_nf4, to_nf4
from torchtune import training
from torchtune.modules.peft import DoRALinear, LoRALinear

from torchtune_agent.errors import UserError
from torchtune_agent.models.adapter import AdapterSettings

_NF4_BLOCK = 64


def adapted(linear: nn.Linear, settings: AdapterSettings) -> LoRALinear | DoRALinear:
    """The same linear, its own weight and bias in it, with an adapter that changes nothing yet."""
    weight: Any = linear.weight
    options: dict[str, Any] = {"use_bias": linear.bias is not None, "dropout": settings.dropout}
    # torchtune's modules scale by alpha / rank
    options |= {"rank": settings.rank, "alpha": settings.scaling * settings.rank}
    kind = AdaptedDoRA if settings.kind == "dora" else LoRALinear
    with training.set_default_dtype(weight.dtype), torch.device("meta"):
        made = kind(linear.in_features, linear.out_features, **options)
    made.bias = linear.bias
    if settings.quantize_base:
        made._quantize_base = True
        quantized = to_nf4(weight.detach(), block_size=_NF4_BLOCK, scaler_block_size=_scaler_block(weight))
        made.weight = nn.Parameter(quantized, requires_grad=False)
    else:
        made.weight = weight
    if not weight.is_meta:
        made.to_empty(device=weight.device)
        made.initialize_parameters()
        if isinstance(made, DoRALinear):
            made.initialize_dora_magnitude()
    return made


class AdaptedDoRA(DoRALinear):
    """torchtune's, whose magnitude also scales the bias; the paper's and peft's scales the weight alone."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base = self._base(x)
        if self.disabled:
            return base if self.bias is None else base + self.bias
        if isinstance(self.dropout, nn.Dropout) and self.training:
            # The part of the output that the magnitude changes sees the same input as the adapter, as in peft.
            x = self.dropout(x)
            changed = self._base(x)
        else:
            changed = base
        with torch.no_grad():
            delta = self.lora_b.weight @ self.lora_a.weight
            norm = self._get_weight_norm(self.weight.to(x.dtype), delta)
        scale = self.magnitude / norm
        out = base + (scale - 1) * changed + scale * self.scaling * self.lora_b(self.lora_a(x))
        return out if self.bias is None else out + self.bias

    def _base(self, x: torch.Tensor) -> torch.Tensor:
        if not self._quantize_base:
            return F.linear(x, self.weight)
        quantized: Any = self.weight
        return linear_nf4(input=x, weight=quantized)


def _scaler_block(weight: torch.Tensor) -> int:
    """How many blocks share a scale of their scales: torchao's 256, or fewer where a small matrix could not be split
    over 64 ranks otherwise. It depends on the matrix alone, so that any number of ranks computes the same."""
    blocks = weight.numel() // _NF4_BLOCK
    for shards in (64, 8, 1):
        for size in (256, 128, 64, 32, 16, 8, 4, 2, 1):
            if blocks % (size * shards) == 0:
                return size
    return 1


def check_blocks(weights: Mapping[str, torch.Tensor], num_shards: int) -> None:
    """Refuse matrices that NF4's blocks do not fit into, or that cannot be divided over `num_shards` ranks then."""

    def fits(weight: torch.Tensor) -> bool:
        whole = weight.numel() % _NF4_BLOCK == 0 and len(weight) % num_shards == 0
        return whole and (weight.numel() // _NF4_BLOCK // _scaler_block(weight)) % num_shards == 0

    bad = [f"{name} {list(weight.shape)}" for name, weight in weights.items() if not fits(weight)]
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        ranks = f" divided over {num_shards} ranks" if num_shards > 1 else ""
        raise UserError(
            f"adapter.quantize_base: NF4 works on blocks of {_NF4_BLOCK} numbers, which do not fit into {shown}{ranks}."
            " Take them out of adapter.targets, or set quantize_base=False."
        )
