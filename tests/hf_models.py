"""Tiny random models of every family in Hugging Face folders, made by `transformers`, and ours loaded from them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional as F
from torchtune import training
from torchtune.modules import TransformerDecoder

from torchtune_agent.models import HFCheckpointer, hf_model, load_weights

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,  # positions, norms and gates must matter
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,  # the embedding of a padding token would get no gradient
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 500.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}
EXPERTS = {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
Made = tuple[Any, dict[str, Any]]
CASES: dict[str, Made] = {
    "llama": (transformers.LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama tied, linear, biases": (
        transformers.LlamaConfig,
        {"tie_word_embeddings": True, "rope_parameters": LINEAR, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": (transformers.MistralConfig, {"head_dim": 16, "sliding_window": None}),
    "mistral with a window": (transformers.MistralConfig, {"sliding_window": 40}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen2 tied, yarn": (transformers.Qwen2Config, {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "qwen3 tied": (transformers.Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True}),
    "qwen3_moe": (transformers.Qwen3MoeConfig, {**EXPERTS, "norm_topk_prob": True}),
    "qwen3_moe tied, some layers plain": (
        transformers.Qwen3MoeConfig,
        {**EXPERTS, "tie_word_embeddings": True, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
    "smollm3": (transformers.SmolLM3Config, {}),
}
TOLERANCE = 1e-5


def save_random(folder: Path, make: Any, options: dict[str, Any], **saving: Any) -> Any:
    """A model of `transformers` in `folder`, none of its weights at its starting value."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make(**{**SIZES, **options}), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder, **saving)
    return model.eval()


def load_ours(folder: Path, output_dir: Path) -> TransformerDecoder:
    with torch.device("meta"):
        model = hf_model(str(folder))
    return fill(model, HFCheckpointer(str(folder), str(output_dir)).load_checkpoint()[training.MODEL_KEY])


def fill(model: TransformerDecoder, weights: Mapping[str, torch.Tensor]) -> TransformerDecoder:
    """`model`, off the meta device."""
    for module in model.modules():
        if hasattr(module, "rope_init"):
            module.rope_init()  # pyright: ignore
    load_weights(model, weights, torch.device("cpu"))
    return model


def assert_same_logits(ours: TransformerDecoder, theirs: Any) -> None:
    tokens = torch.randint(0, SIZES["vocab_size"], (2, ours.max_seq_len), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 0.5  # or the comparison would say little
        torch.testing.assert_close(ours(tokens), expected, atol=TOLERANCE, rtol=TOLERANCE)


def train(parameters: Any, logits: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A few steps of plain SGD, always on the same tokens."""
    optimizer = torch.optim.SGD(parameters, lr=0.03)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        tokens = torch.randint(0, SIZES["vocab_size"], (2, 24), generator=generator)
        loss = F.cross_entropy(logits(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
