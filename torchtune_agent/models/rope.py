"""Rotary positions with every scaling our models know: none, linear, Llama 3's and YaRN.

torchtune has a class per family; this is one for all, so that a model's scaling is data. Positions are angles that turn
pairs of a head's dimensions: neighbours (`interleaved`, how torchtune lays out Llama and Mistral) or the two halves of
the head (Qwen, and Hugging Face everywhere).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class RotaryEmbedding(nn.Module):
    """Turns `[batch, seq, heads, head_dim]` by each token's position.

    The table of angles is no part of a checkpoint. On the meta device it is empty: `rope_init` makes it anew.
    """

    cache: torch.Tensor  # [max_seq_len, head_dim / 2, 2]: cosine and sine

    def __init__(
        self, head_dim: int, max_seq_len: int, base: float, scaling: Mapping[str, Any], *, interleaved: bool
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.max_seq_len = max_seq_len
        self.base = base
        self.scaling = dict(scaling)
        self.interleaved = interleaved
        self.rope_init()

    def rope_init(self) -> None:
        """Make the table on the current default device; the name is the one torchtune's recipes call."""
        device = torch.get_default_device()
        frequencies, factor = scaled_frequencies(self.head_dim, self.base, self.scaling)
        positions = torch.arange(self.max_seq_len, dtype=torch.float32, device=device)
        angles = torch.outer(positions, frequencies.to(device))
        table = torch.stack([angles.cos(), angles.sin()], dim=-1) * factor
        self.register_buffer("cache", table, persistent=False)

    def forward(self, x: torch.Tensor, *, input_pos: torch.Tensor | None = None) -> torch.Tensor:
        """`input_pos` [batch, seq]: positions where they are not 0, 1, 2, ..., as in packed sequences."""
        table = self.cache[: x.shape[1]] if input_pos is None else self.cache[input_pos]
        cos, sin = table.view(-1, x.shape[1], 1, self.head_dim // 2, 2).to(x.dtype).unbind(-1)
        if self.interleaved:
            first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def scaled_frequencies(head_dim: int, base: float, scaling: Mapping[str, Any]) -> tuple[torch.Tensor, float]:
    """The angle per position of each pair of dimensions, and a factor on cosine and sine (YaRN's; otherwise 1).

    Always computed on the host: on the meta device there would be nothing to scale.
    """
    with torch.device("cpu"):
        frequencies = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        kind = scaling.get("rope_type", "default")
        if kind == "linear":
            return frequencies / scaling["factor"], 1.0
        if kind == "llama3":
            return _llama3(frequencies, scaling), 1.0
        if kind == "yarn":
            return _yarn(frequencies, base, scaling), _yarn_attention(scaling)
        return frequencies, 1.0


def _llama3(frequencies: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Slow frequencies are divided by the factor, fast ones kept, those between blended."""
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the original context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling["factor"] + kept * frequencies


def _yarn(frequencies: torch.Tensor, base: float, scaling: Mapping[str, Any]) -> torch.Tensor:
    """The same idea, blended linearly over dimensions instead of turns (https://arxiv.org/abs/2309.00071)."""
    half = len(frequencies)

    def dimension(num_turns: float) -> float:
        return half * math.log(scaling["original_max_position_embeddings"] / (num_turns * 2 * math.pi)) / math.log(base)

    first, last = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    span = (last - first) or 0.001
    kept = 1 - ((torch.arange(half, dtype=torch.float32) - first) / span).clamp(0, 1)
    return (1 - kept) * frequencies / scaling["factor"] + kept * frequencies


def _yarn_attention(scaling: Mapping[str, Any]) -> float:
    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1.0)
