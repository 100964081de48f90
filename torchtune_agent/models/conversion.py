"""Hugging Face's names and layout of weights, and torchtune's: one table, both ways.

Where torchtune's rope turns neighbouring dimensions, the rows of the query and key projections are in another order
than Hugging Face's, whose rope turns the two halves of a head: weights, biases, and what adapters put in their place.
Each expert's weights are on their own in Hugging Face's files; ours are one stack each for gate, down and up.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch

from torchtune_agent.errors import UserError
from torchtune_agent.models.architecture import Architecture

_LAYER = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "self_attn.q_norm": "attn.q_norm",
    "self_attn.k_norm": "attn.k_norm",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
    "mlp.gate": "mlp.router",
    "input_layernorm": "sa_norm",
    "post_attention_layernorm": "mlp_norm",
}
_TOP = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.((?:gate|down|up)_proj)\.weight")
_STACK = re.compile(r"layers\.(\d+)\.mlp\.experts\.(w[123])")
_LAYER_BACK = {ours: theirs for theirs, ours in _LAYER.items()}
_TOP_BACK = {ours: theirs for theirs, ours in _TOP.items()}


def module_from_hf(name: str) -> str | None:
    """Our name of a module; None for one no decoder of ours has."""
    if name in _TOP:
        return _TOP[name]
    parts = name.split(".", 3)
    if len(parts) < 4 or parts[:2] != ["model", "layers"] or not parts[2].isdigit() or parts[3] not in _LAYER:
        return None
    return f"layers.{parts[2]}.{_LAYER[parts[3]]}"


def module_to_hf(name: str) -> str | None:
    if name in _TOP_BACK:
        return _TOP_BACK[name]
    parts = name.split(".", 2)
    if len(parts) < 3 or parts[0] != "layers" or not parts[1].isdigit() or parts[2] not in _LAYER_BACK:
        return None
    return f"model.layers.{parts[1]}.{_LAYER_BACK[parts[2]]}"


def last_name_from_hf(name: str) -> str:
    """`gate_proj` -> `w1`: our last name of a module, for people who know Hugging Face's; any other stays."""
    for theirs, ours in {**_LAYER, **_TOP}.items():
        if theirs.rpartition(".")[2] == name:
            return ours.rpartition(".")[2]
    return name


class Conversion:
    """Names and tensors of one architecture."""

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture

    @property
    def ties_output(self) -> bool:
        """Whether the output is the embedding, which then stands for both."""
        return self._architecture.tied

    def from_hf(self, name: str) -> str | None:
        """Our name of a weight, or of the stack that it is in; None for what a model does not need."""
        expert, experts = _EXPERT.fullmatch(name), self._architecture.experts
        if expert is not None and experts is not None and int(expert[2]) < experts.number:
            return f"layers.{expert[1]}.mlp.experts.{last_name_from_hf(expert[3])}"
        module, _, kind = name.rpartition(".")
        if kind == "inv_freq" or (self._architecture.tied and name == "lm_head.weight"):
            return None
        ours = module_from_hf(module)
        if ours is None or kind not in ("weight", "bias"):
            raise UserError(
                f"model_dir: the checkpoint holds {name!r}, which a {self._architecture.model_type} decoder has not. "
                "Use a checkpoint of a plain language model."
            )
        return f"{ours}.{'scale' if ours.endswith('norm') else kind}"

    def experts_of(self, name: str) -> list[str] | None:
        """Hugging Face's names of the weights in our stack `name`, in its order; None for what is no stack."""
        stack = _STACK.fullmatch(name)
        if stack is None or self._architecture.experts is None:
            return None
        before, last = f"model.layers.{stack[1]}.mlp", _LAYER_BACK[f"mlp.{stack[2]}"].removeprefix("mlp.")
        return [f"{before}.experts.{n}.{last}.weight" for n in range(self._architecture.experts.number)]

    def to_hf(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face's weights in our `name`; those of a stack share its memory."""
        experts = self.experts_of(name)
        if experts is None:
            yield self.name_to_hf(name), self.rows_to_hf(name, tensor)
        else:
            yield from zip(experts, tensor.unbind(), strict=True)

    def name_to_hf(self, name: str) -> str:
        module, _, kind = name.rpartition(".")
        theirs = module_to_hf(module)
        if theirs is None:
            raise UserError(
                f"checkpointer: {name!r} is no weight of a {self._architecture.model_type} model. "
                "Merge adapters before a model is saved in Hugging Face's format."
            )
        return f"{theirs}.{'weight' if kind == 'scale' else kind}"

    def reorders(self, name: str) -> bool:
        """Whether the rows of our weight, bias or adapter part `name` stand in another order than Hugging Face's."""
        return self._heads(name) is not None

    def rows_from_hf(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` with its rows in the order of our `name`."""
        return self._reorder(name, tensor, (2, self._architecture.head_dim // 2))

    def rows_to_hf(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return self._reorder(name, tensor, (self._architecture.head_dim // 2, 2))

    def _heads(self, name: str) -> int | None:
        parts = name.split(".")
        if not self._architecture.interleaved_rope or "lora_a" in parts:  # what goes in, not what comes out
            return None
        heads: dict[str, Any] = {"q_proj": self._architecture.num_heads, "k_proj": self._architecture.num_kv_heads}
        return next((heads[part] for part in parts if part in heads), None)

    def _reorder(self, name: str, tensor: torch.Tensor, pairs: tuple[int, int]) -> torch.Tensor:
        heads = self._heads(name)
        if heads is None:
            return tensor
        if len(tensor) != heads * pairs[0] * pairs[1]:
            raise UserError(
                f"model_dir: {name!r} has {len(tensor)} rows, and the model's config.json says "
                f"{heads * pairs[0] * pairs[1]}. Use weights, or an adapter, that belong to the model."
            )
        return tensor.unflatten(0, (heads, *pairs)).transpose(1, 2).flatten(0, 2)
