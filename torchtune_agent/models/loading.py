"""Weights into a sharded model, every rank reading its own rows: no full copy, no broadcast.

torchtune's `load_from_full_model_state_dict` wants all weights at once on every rank and sends them from the first.
Files that are mapped need neither: each rank takes its slice of one tensor after another.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from torchtune.modules.low_precision import _register_nf4_dispatch_ops  # noqa: F401

from torchtune_agent.errors import UserError
from torchtune_agent.models.weights import HeldWeights, Weights


def load_weights(
    model: nn.Module, weights: Mapping[str, torch.Tensor], device: torch.device, *, cpu_offload: bool = False
) -> None:
    """Fill `model`, sharded or not, on the meta device or not, in its own types. Calls no collectives.

    A weight that is quantized in the model is quantized here, tensor by tensor.
    """
    source = weights if isinstance(weights, Weights) else HeldWeights(weights)
    wanted: dict[str, Any] = model.state_dict()
    _check(wanted, source)
    place = torch.device("cpu") if cpu_offload else device
    model.load_state_dict(
        {name: _load_like(like, source, name, place) for name, like in wanted.items()}, strict=True, assign=True
    )


def _check(wanted: Mapping[str, Any], source: Weights) -> None:
    missing, surplus = wanted.keys() - source.keys(), source.keys() - wanted.keys()
    if missing or surplus:
        raise UserError(
            f"checkpointer: the weights are not those of the model (missing: {_some(missing)}; not in the model: "
            f"{_some(surplus)}). Use the checkpoint that belongs to the model."
        )
    for name, like in wanted.items():
        if source.shape(name) != tuple(like.shape):
            raise UserError(
                f"checkpointer: '{name}' has shape {list(source.shape(name))}, and {list(like.shape)} in the model. "
                "Use the checkpoint that belongs to the model."
            )


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"


def _load_like(like: torch.Tensor, source: Weights, name: str, place: torch.device) -> torch.Tensor:
    if not isinstance(like, DTensor):
        tensor = source[name].to(place, like.dtype, copy=True)
        return _quantized(tensor, like) if isinstance(like, NF4Tensor) else tensor
    mesh, placements = like.device_mesh, like.placements
    shape, offset = compute_local_shape_and_global_offset(like.shape, mesh, placements)
    if isinstance(like._local_tensor, NF4Tensor):
        # Quantized whole: its blocks share a mean, so that shards alone would come out different.
        whole = _quantized(source[name].to(place, like.dtype), like._local_tensor)
        return _sharded_nf4(whole, like, offset[0], shape[0])
    local = source.rows(name, offset[0], offset[0] + shape[0]) if shape else source[name]
    for dim in range(1, len(shape)):
        local = local.narrow(dim, offset[dim], shape[dim])
    local = local.to(place, like.dtype, copy=True).contiguous()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def _quantized(tensor: torch.Tensor, like: NF4Tensor) -> torch.Tensor:
    return to_nf4(tensor, block_size=like.block_size, scaler_block_size=like.scaler_block_size)


def _sharded_nf4(whole: torch.Tensor, like: DTensor, first: int, num_rows: int) -> torch.Tensor:
    """This rank's rows of a quantized matrix, held as FSDP holds them; `DTensor.from_local` cannot view NF4."""
    rows = list(torch.split(whole, num_rows))[first // num_rows]
    local = whole.new_zeros(rows.size())
    local.copy_(rows)
    meta = TensorMeta(like.shape, like.stride(), like.dtype)
    return DTensor(local, DTensorSpec(like.device_mesh, like.placements, meta), requires_grad=False)
