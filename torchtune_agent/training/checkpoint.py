"""Loading and saving weights through torchtune's checkpointers, and a checkpointer for runs from scratch."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchtune import training

from torchtune_agent.errors import UserError

_INIT_STD = 0.02


class ScratchCheckpointer:
    """Starts from random weights instead of a checkpoint: for tiny runs, tests and benchmarks.

    Weights depend on the seed and the parameter's name alone, so every world size starts from the same ones.
    Checkpoints are written in torchtune's own format, one folder per epoch.

    Args:
        output_dir: where checkpoints go.
        seed: of the initial weights.
    """

    def __init__(self, output_dir: str, seed: int = 0, should_load_recipe_state: bool = False) -> None:
        self._output_dir = Path(output_dir)
        self._seed = seed
        self._resume = should_load_recipe_state

    def initial_weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Weights for `model` (which may be on the meta device): matrices normal(0, 0.02), scales 1, biases 0."""
        return {name: self._initial(name, tensor) for name, tensor in model.state_dict().items()}

    def _initial(self, name: str, like: torch.Tensor) -> torch.Tensor:
        if like.ndim == 1:
            return torch.full(like.shape, 0.0 if name.endswith("bias") else 1.0)
        generator = torch.Generator().manual_seed(self._seed)
        generator.manual_seed(int(torch.randint(2**62, (), generator=generator)) ^ _stable_hash(name))
        return torch.empty(like.shape).normal_(0.0, _INIT_STD, generator=generator)

    def load_checkpoint(self) -> dict[str, Any]:
        """Nothing for a new run; the newest epoch's weights and the recipe state where a run is resumed."""
        if not self._resume:
            return {}
        state_file = self._output_dir / "recipe_state" / "recipe_state.pt"
        epochs = sorted(self._output_dir.glob("epoch_*"), key=lambda p: int(re.sub(r"\D", "", p.name) or -1))
        if not state_file.exists() or not epochs:
            raise UserError(
                f"resume_from_checkpoint=True: {self._output_dir} holds no checkpoint of an unfinished run. "
                "Set resume_from_checkpoint=False to start anew."
            )
        return {
            training.MODEL_KEY: load_file(epochs[-1] / "model.safetensors"),
            **torch.load(state_file, weights_only=True),
        }

    def save_checkpoint(
        self, state_dict: dict[str, Any], epoch: int, intermediate_checkpoint: bool = False, adapter_only: bool = False
    ) -> None:
        """Write `epoch_N/model.safetensors` and, where the run goes on, what it needs to be resumed."""
        folder = self._output_dir / f"epoch_{epoch}"
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: t.contiguous() for name, t in state_dict[training.MODEL_KEY].items()}, folder / "model.safetensors"
        )
        if intermediate_checkpoint:
            rest = {key: value for key, value in state_dict.items() if key != training.MODEL_KEY}
            state_file = self._output_dir / "recipe_state" / "recipe_state.pt"
            state_file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(rest, state_file)


def _stable_hash(text: str) -> int:
    value = 0
    for byte in text.encode():
        value = (value * 1_000_003 + byte) % 2**62
    return value
