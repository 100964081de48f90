"""Where a decoder would make its logits: its last hidden states and the weights that would project them.

A loss that never makes all logits must run right there, inside the model's forward pass: before it and after it, FSDP
holds the weights in shards. That place is the decoder's `unembed`, which is replaced for one call.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torchtune.modules import TiedLinear, TransformerDecoder
from torchtune.modules.attention_utils import packed_block_causal_mask
from torchtune.modules.peft import LoRALinear

from torchtune_agent.data.collate import Batch
from torchtune_agent.distributed import VocabularyShare, replicate
from torchtune_agent.errors import UserError
from torchtune_agent.losses.head import Projection

Result = TypeVar("Result", bound=torch.Tensor | tuple[torch.Tensor | None, ...])


def check_output(model: TransformerDecoder) -> None:
    """Refuse a model whose logits are more than a product of hidden states and a weight."""
    output: Any = model.output
    problem = None
    if type(model).unembed is not TransformerDecoder.unembed:
        problem = f"{type(model).__name__} makes its logits in a way of its own (`unembed`)"
    elif not isinstance(output, TiedLinear):
        name = type(output).__name__
        if type(output).forward not in (nn.Linear.forward, LoRALinear.forward):
            problem = f"its output is a {name}, not a plain, a tied or a LoRA projection"
        elif output.bias is not None:
            problem = "its output has a bias"
        elif isinstance(output, LoRALinear) and output._quantize_base:
            problem = f"its output is a quantized {name}"
    if problem is not None:
        raise UserError(
            f"model: {problem}. The loss is computed without ever making all logits, which needs an output that is "
            "one matrix. Use a model with such an output (apply_lora_to_output=False leaves it as it is)."
        )


def at_output(model: nn.Module, batch: Batch, compute: Callable[[Projection], Result]) -> Result:
    """Run `model` on `batch` and `compute` its result from the projection of the supervised positions."""
    assert isinstance(model, TransformerDecoder)

    def unembed(hidden: torch.Tensor) -> Result:
        return _managed(model.output, model.norm(hidden), project)

    def project(hidden: torch.Tensor) -> Result:
        return compute(_projection(model.output, hidden, batch.supervised))

    inputs: dict[str, Any] = {}
    if batch.seq_lens is not None:
        inputs = {"mask": packed_block_causal_mask(batch.seq_lens), "input_pos": batch.input_pos}
        if isinstance(inputs["mask"], torch.Tensor):
            inputs["mask"] = inputs["mask"].to(batch.tokens.device)
    model.unembed = unembed  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return model(tokens=batch.tokens, **inputs)
    finally:
        del model.unembed


def _managed(output: Any, hidden: torch.Tensor, project: Callable[[torch.Tensor], Result]) -> Result:
    """`project(hidden)` as if it were the forward of the module that holds the output's weight: where that is an FSDP
    unit of its own, its weight is gathered before and its gradient reduced after."""
    module: Any = output.tied_module if isinstance(output, TiedLinear) else output
    if not issubclass(type(module), FSDPModule):
        return project(hidden)
    if "_project" not in vars(module):
        module._project = _call
        register_fsdp_forward_method(module, "_project")
    return module._project(hidden, project)


def _call(hidden: torch.Tensor, project: Callable[[torch.Tensor], Result]) -> Result:
    return project(hidden)


def _projection(output: Any, hidden: torch.Tensor, supervised: torch.Tensor) -> Projection:
    weight = output.tied_module.weight if isinstance(output, TiedLinear) else output.weight
    share = None
    if isinstance(weight, DTensor):
        share = VocabularyShare.of(weight)
        hidden = replicate(hidden, weight.device_mesh, partial_gradient=share is not None)
        weight = weight.to_local()
    rows = hidden.flatten(0, 1).index_select(0, supervised)
    terms = [rows, weight]
    if isinstance(output, LoRALinear) and not output.disabled:
        low_rank = output.lora_a(output.dropout(rows)) * (output.alpha / output.rank)
        terms += [low_rank, output.lora_b.weight]
    return Projection(tuple(terms), share)
