"""Weights as users have them: what a run starts from, and what it leaves, through the checkpointer the config names.

They are not what a run is resumed from: that is in the folder of checkpoints (see saving.py).
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torchtune import training
from torchtune.modules import TransformerDecoder
from torchtune.training import DistributedCheckpointer

from torchtune_agent.config import component, instantiate
from torchtune_agent.distributed import World, on_main, together
from torchtune_agent.errors import UserError
from torchtune_agent.training.scratch import ScratchCheckpointer
from torchtune_agent.training.sharded import disk_problem


class UserWeights:
    """Reads the base model and writes a folder of trained weights at every epoch's end."""

    def __init__(self, cfg: DictConfig, world: World) -> None:
        self._cfg = cfg
        self._world = world
        self._checkpointer: Any = together(self._make)
        self.folder = Path(cfg.checkpointer.get("output_dir", cfg.output_dir))

    def _make(self) -> Any:
        section = self._cfg.checkpointer
        made = component(section.get("_component_", ""), "checkpointer")
        if made is DistributedCheckpointer:
            raise UserError(
                "checkpointer: DistributedCheckpointer writes shards, not weights to use. Name one that writes whole "
                "weights; shards to resume from are in output_dir/checkpoints anyway (see save_every_n_steps)."
            )
        options: dict[str, Any] = {}
        if "should_load_recipe_state" in inspect.signature(made).parameters:
            options["should_load_recipe_state"] = False
        try:
            return instantiate(section, "checkpointer", **options)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise _not_found(error) from error

    def load(self, model: TransformerDecoder) -> Mapping[str, Any]:
        """The full state dict that a run starts from."""
        weights = together(self._load).get(training.MODEL_KEY)
        if weights is not None:
            return weights
        assert isinstance(self._checkpointer, ScratchCheckpointer)
        return self._checkpointer.initial_weights(model)

    def _load(self) -> dict[str, Any]:
        try:
            return self._checkpointer.load_checkpoint()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise _not_found(error) from error

    def write(self, model: TransformerDecoder, epoch: int) -> None:
        """Write the model as it is after `epoch`."""
        weights = training.gather_cpu_state_dict(model, self._world.is_main, device=self._world.device)  # pyright: ignore

        def write() -> None:
            try:
                self._checkpointer.save_checkpoint(
                    {training.MODEL_KEY: weights}, epoch=epoch, intermediate_checkpoint=False
                )
            except Exception as error:  # checkpointers write in several ways, and each says in its own that it cannot
                if (reason := disk_problem(error)) is None:
                    raise
                raise UserError(
                    f"checkpointer.output_dir={self.folder}: the weights of epoch {epoch} cannot be written: "
                    f"{reason}. Make room or name another folder, and go on with "
                    "resume_from_checkpoint=auto."
                ) from error

        on_main(write)


def _not_found(error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    what = f"no {error} (in the folder's config.json?)" if isinstance(error, KeyError) else error
    return UserError(f"checkpointer: {what}. Check checkpoint_dir and checkpoint_files.")
