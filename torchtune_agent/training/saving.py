"""Checkpoints at epoch ends, through torchtune's checkpoint client and whichever checkpointer the config names."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torchtune import training
from torchtune.modules import TransformerDecoder
from torchtune.training import DistributedCheckpointer
from torchtune.training.checkpointing._checkpoint_client import CheckpointClient, TrainingProgress

from torchtune_agent.distributed import World, own_group, together
from torchtune_agent.errors import UserError
from torchtune_agent.training.checkpoint import ScratchCheckpointer
from torchtune_agent.training.optimizer import Stepper
from torchtune_agent.training.settings import Settings


class Saver:
    """Loads the weights a run starts from, restores an interrupted run, and saves at every epoch's end."""

    def __init__(self, cfg: DictConfig, settings: Settings, world: World) -> None:
        self._settings = settings
        self._world = world
        self._client = CheckpointClient(cfg)
        self._loaded: dict[str, Any] = {}
        self.folder = Path(cfg.checkpointer.get("output_dir", settings.output_dir))
        self._background: DistributedCheckpointer | None = None
        if settings.enable_async_checkpointing:
            # A group of its own: on the default one, saving in the background collides with training.
            self._background = DistributedCheckpointer(str(self.folder), str(self.folder), process_group=own_group())
            self._client._dcp_checkpointer = self._background

    def load_weights(self, model: TransformerDecoder) -> dict[str, Any]:
        """The full state dict of the base model, or of the last epoch where a run is resumed."""
        self._loaded = together(self._load)
        weights = self._loaded.pop(training.MODEL_KEY, None)
        if weights is not None:
            return weights
        checkpointer = self._client._get_checkpointer()
        assert isinstance(checkpointer, ScratchCheckpointer)
        return checkpointer.initial_weights(model)

    def _load(self) -> dict[str, Any]:
        try:
            return self._client.load_base_checkpoint()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            what = f"no {error} (in the folder's config.json?)" if isinstance(error, KeyError) else error
            raise UserError(f"checkpointer: {what}. Check checkpoint_dir and checkpoint_files.") from error

    def restore(self, model: TransformerDecoder, stepper: Stepper) -> int:
        """Bring optimizer and progress back where a run is resumed; returns the epochs that are done."""
        settings = self._settings
        if not settings.resume_from_checkpoint:
            return 0
        if settings.enable_async_checkpointing:
            self._loaded = self._client.load_distributed_checkpoint(model, stepper.for_checkpoint)
        else:
            stepper.load(self._loaded[training.OPT_KEY], self._world.device)
        for key, name in ((training.SEED_KEY, "seed"), (training.MAX_STEPS_KEY, "max_steps_per_epoch")):
            saved, given = self._loaded[key], getattr(settings, name)
            if saved != given:
                raise UserError(
                    f"{name}={given}: the checkpoint was made with {name}={saved}. Set {name}={saved} to resume it."
                )
        return int(self._loaded[training.EPOCHS_KEY])

    def save(self, model: TransformerDecoder, stepper: Stepper, epoch: int) -> None:
        """Write the model, and what it takes to go on where more epochs follow."""
        settings = self._settings
        progress = TrainingProgress(
            seed=settings.seed,  # pyright: ignore
            epochs_run=epoch + 1,
            total_epochs=settings.epochs,
            max_steps_per_epoch=settings.max_steps_per_epoch,  # pyright: ignore
        )
        self._client.save_checkpoint(model, stepper.for_checkpoint, progress, epoch)

    def close(self) -> None:
        """Wait for what is still being written."""
        future: Any = None if self._background is None else self._background._checkpoint_future
        if future is not None:
            future.result()
