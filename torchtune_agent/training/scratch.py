"""A checkpointer for runs from scratch: random weights at the start, safetensors at the end."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torchtune import training

from torchtune_agent.models.adapter import PARTS

_INIT_STD = 0.02


class ScratchCheckpointer:
    """Starts from random weights instead of a checkpoint: for tiny runs, tests and benchmarks.

    Weights depend on the seed and the parameter's name alone, so every world size starts from the same ones.

    Args:
        output_dir: where trained weights go, one folder per epoch.
        seed: of the initial weights.
    """

    def __init__(self, output_dir: str, seed: int = 0) -> None:
        self._output_dir = Path(output_dir)
        self._seed = seed

    def initial_weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Weights for `model` (which may be on the meta device): matrices normal(0, 0.02), scales 1, biases 0.

        Not for adapters, which have a start of their own.
        """
        state = model.state_dict()
        return {name: self._initial(name, tensor) for name, tensor in state.items() if not name.endswith(PARTS)}

    def _initial(self, name: str, like: torch.Tensor) -> torch.Tensor:
        if like.ndim == 1:
            return torch.full(like.shape, 0.0 if name.endswith("bias") else 1.0)
        generator = torch.Generator().manual_seed(self._seed)
        generator.manual_seed(int(torch.randint(2**62, (), generator=generator)) ^ _stable_hash(name))
        return torch.empty(like.shape).normal_(0.0, _INIT_STD, generator=generator)

    def load_checkpoint(self) -> dict[str, Any]:
        """Nothing: the weights depend on the model, see `initial_weights`."""
        return {}

    def save_checkpoint(
        self, state_dict: dict[str, Any], epoch: int, intermediate_checkpoint: bool = False, adapter_only: bool = False
    ) -> None:
        """Write `epoch_N/model.safetensors`."""
        folder = self._output_dir / f"epoch_{epoch}"
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: t.contiguous() for name, t in state_dict[training.MODEL_KEY].items()}, folder / "model.safetensors"
        )


def _stable_hash(text: str) -> int:
    value = 0
    for byte in text.encode():
        value = (value * 1_000_003 + byte) % 2**62
    return value
