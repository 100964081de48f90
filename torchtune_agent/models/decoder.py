"""A decoder made of torchtune's modules, from one description for every family.

Its state dict has the names and the layout of torchtune's own builders, where torchtune has the family.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)

from torchtune_agent.errors import UserError
from torchtune_agent.models.architecture import Architecture
from torchtune_agent.models.experts import RoutedFeedForward
from torchtune_agent.models.rope import RotaryEmbedding


def hf_model(model_dir: str, max_seq_len: int | None = None) -> TransformerDecoder:
    """The model that `config.json` in the folder `model_dir` describes, without its weights.

    `max_seq_len` takes less than the model can: its table of positions becomes smaller.
    """
    architecture = Architecture.from_folder(model_dir)
    if max_seq_len is not None and max_seq_len > architecture.max_seq_len:
        raise UserError(
            f"model.max_seq_len={max_seq_len}: {Path(model_dir) / 'config.json'} allows {architecture.max_seq_len} "
            "(max_position_embeddings, or sliding_window where attention sees no further). Set that or less."
        )
    return build_decoder(architecture, max_seq_len)


def build_decoder(architecture: Architecture, max_seq_len: int | None = None) -> TransformerDecoder:
    a = architecture
    length = max_seq_len or a.max_seq_len
    rope = RotaryEmbedding(a.head_dim, length, a.rope_base, a.rope_scaling, interleaved=a.interleaved_rope)
    layers = nn.ModuleList(
        TransformerSelfAttentionLayer(
            attn=_attention(a, rope if has_rope else None, length),
            mlp=_mlp(a, layer),
            sa_norm=RMSNorm(a.embed_dim, eps=a.norm_eps),
            mlp_norm=RMSNorm(a.embed_dim, eps=a.norm_eps),
        )
        for layer, has_rope in enumerate(a.rope_layers)
    )
    embeddings = nn.Embedding(a.vocab_size, a.embed_dim)
    return TransformerDecoder(
        tok_embeddings=embeddings,
        layers=layers,
        max_seq_len=length,
        num_heads=a.num_heads,
        head_dim=a.head_dim,
        norm=RMSNorm(a.embed_dim, eps=a.norm_eps),
        output=TiedLinear(embeddings) if a.tied else nn.Linear(a.embed_dim, a.vocab_size, bias=False),
    )


def _attention(a: Architecture, rope: RotaryEmbedding | None, max_seq_len: int) -> MultiHeadAttention:
    kind = NormedAttention if a.qk_norm else MultiHeadAttention
    queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    return kind(
        embed_dim=a.embed_dim,
        num_heads=a.num_heads,
        num_kv_heads=a.num_kv_heads,
        head_dim=a.head_dim,
        q_proj=nn.Linear(a.embed_dim, queries, bias=a.qkv_bias),
        k_proj=nn.Linear(a.embed_dim, keys, bias=a.qkv_bias),
        v_proj=nn.Linear(a.embed_dim, keys, bias=a.qkv_bias),
        output_proj=nn.Linear(queries, a.embed_dim, bias=a.output_bias),
        q_norm=RMSNorm(a.head_dim, eps=a.norm_eps) if a.qk_norm else None,
        k_norm=RMSNorm(a.head_dim, eps=a.norm_eps) if a.qk_norm else None,
        pos_embeddings=rope,
        max_seq_len=max_seq_len,
    )


def _mlp(a: Architecture, layer: int) -> nn.Module:
    if a.experts is not None and a.experts.layers[layer]:
        return RoutedFeedForward(a.embed_dim, a.experts)
    return FeedForward(
        gate_proj=nn.Linear(a.embed_dim, a.intermediate_dim, bias=a.mlp_bias),
        down_proj=nn.Linear(a.intermediate_dim, a.embed_dim, bias=a.mlp_bias),
        up_proj=nn.Linear(a.embed_dim, a.intermediate_dim, bias=a.mlp_bias),
    )


class NormedAttention(MultiHeadAttention):
    """Attention that normalizes queries and keys *before* it turns them by position, as Qwen3 does.

    torchtune's own turns first, which is another function: the norm has a scale for each dimension.
    """

    def forward(
        self,
        x: torch.Tensor,
        y: torch.Tensor | None = None,
        *,
        mask: Any = None,  # a tensor, or a BlockMask of flex attention
        input_pos: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert y is not None and self.q_norm is not None and self.k_norm is not None
        # [batch, seq, heads, head_dim]
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))
        k = self.k_norm(self.k_proj(y).unflatten(-1, (-1, self.head_dim)))
        v = self.v_proj(y).unflatten(-1, (-1, self.head_dim))
        if self.pos_embeddings is not None:
            q = self.pos_embeddings(q, input_pos=input_pos)
            k = self.pos_embeddings(k, input_pos=input_pos)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.kv_cache is not None and self.cache_enabled:
            k, v = self.kv_cache.update(k, v)
        if self.num_heads != self.num_kv_heads:
            k = k.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
            v = v.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        output = self._attention_call(
            q,
            k,
            v,
            mask=mask,
            dropout_p=self.attn_dropout if self.training else 0.0,
            is_causal=self.kv_cache is None and mask is None and self.is_causal,
        )
        return self.output_proj(output.transpose(1, 2).flatten(2))
