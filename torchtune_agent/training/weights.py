"""Weights as users have them: what a run starts from, and what it leaves, through the checkpointer the config names.

They are not what a run is resumed from: that is in the folder of checkpoints (see saving.py).
"""

import inspect
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torchtune import training
from torchtune.modules import TransformerDecoder
from torchtune.training import DistributedCheckpointer

from torchtune_agent.config import component, instantiate
from torchtune_agent.data import ChatTemplateTokenizer
from torchtune_agent.distributed import World, on_main, together
from torchtune_agent.errors import UserError
from torchtune_agent.models.checkpointer import HFCheckpointer
from torchtune_agent.training.card import Trained, adapter_card, model_card
from torchtune_agent.training.parameters import ParameterSetup
from torchtune_agent.training.scratch import ScratchCheckpointer
from torchtune_agent.training.sharded import disk_problem

ADAPTERS = "lora_weights"


class UserWeights:
    """Reads the base model and writes folders of trained weights: at every epoch's end, and every so many steps."""

    def __init__(self, cfg: DictConfig, world: World, parameters: ParameterSetup) -> None:
        self._cfg = cfg
        self._world = world
        self._parameters = parameters
        self._checkpointer: Any = together(self._make)
        self.folder = Path(cfg.checkpointer.get("output_dir", cfg.output_dir))
        self._every: int | None = cfg.get("export_every_n_steps")
        self._exporter = together(self._make_exporter)

    def _make_exporter(self) -> HFCheckpointer | None:
        if isinstance(self._checkpointer, HFCheckpointer):
            return self._checkpointer
        return None if self._every is None else hf_checkpointer(self._cfg, self.folder)

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
        if weights is None:
            assert isinstance(self._checkpointer, ScratchCheckpointer)
            weights = self._checkpointer.initial_weights(model)
        return self._parameters.starting(weights, model)

    def _load(self) -> dict[str, Any]:
        try:
            return self._checkpointer.load_checkpoint()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise _not_found(error) from error

    def export_is_due(self, step: int) -> bool:
        return self._every is not None and step > 0 and step % self._every == 0

    def lack_export(self, step: int) -> bool:
        """Whether an export is due after `step`, and is not there."""
        return self.export_is_due(step) and on_main(lambda: not (self.folder / f"step_{step}").exists())

    def write(self, model: TransformerDecoder, trained: Trained, epoch: int | None) -> None:
        """Write the model as it is after `epoch`, or, where that is None, after the step that `trained` says."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # NF4 shards are gathered by a function of an older name
            weights = training.gather_cpu_state_dict(model, self._world.is_main, device=self._world.device)  # pyright: ignore
        name = f"step_{trained.manifest.step}" if epoch is None else f"epoch_{epoch}"

        def write() -> None:
            try:
                if epoch is None or isinstance(self._checkpointer, HFCheckpointer):
                    assert self._exporter is not None
                    output_dir = Path(self._cfg.output_dir)
                    write_folders(self._cfg, output_dir, name, self._exporter, self._parameters, weights, trained)
                    return
                finished = dict(self._parameters.finished(weights))
                self._checkpointer.save_checkpoint(
                    {training.MODEL_KEY: finished}, epoch=epoch, intermediate_checkpoint=False
                )
            except Exception as error:  # checkpointers write in several ways, and each says in its own that it cannot
                if (reason := disk_problem(error)) is None:
                    raise
                raise UserError(
                    f"checkpointer.output_dir={self.folder}: the weights {name} cannot be written: "
                    f"{reason}. Make room or name another folder, and go on with "
                    "resume_from_checkpoint=auto."
                ) from error

        on_main(write)


def write_folders(
    cfg: DictConfig,
    output_dir: Path,
    name: str,
    exporter: HFCheckpointer,
    parameters: ParameterSetup,
    weights: Mapping[str, torch.Tensor],
    trained: Trained,
) -> list[Path]:
    """Write a model, and its adapters where it has some, each with its card; returns the folders."""
    written = []
    adapters, base = output_dir / ADAPTERS / name, exporter.model_dir
    unfinished = adapters.with_name(f"{name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    if parameters.write_own(weights, unfinished, exporter):
        (unfinished / "README.md").write_text(adapter_card(trained, name, base), encoding="utf-8")
        shutil.rmtree(adapters, ignore_errors=True)
        unfinished.replace(adapters)
        written.append(adapters)
    tokenizer, finished = tokenizer_folder(cfg), parameters.finished(weights)
    card = model_card(trained, name, base)
    return [exporter.save_folder(finished, name, tokenizer_dir=tokenizer, card=card), *written]


def hf_checkpointer(cfg: DictConfig, output_dir: Path) -> HFCheckpointer:
    """One that writes to `output_dir` in the format of the Hugging Face folder that the config's checkpointer reads,
    whichever that is."""
    section = cfg.checkpointer
    options: dict[str, Any] = {"output_dir": str(output_dir)}
    if component(section.get("_component_", ""), "checkpointer") is HFCheckpointer:
        return instantiate({**section, **options}, "checkpointer")
    base = section.get("checkpoint_dir")
    if base is None or not (Path(base) / "config.json").exists():
        raise UserError(
            f"checkpointer: {section.get('_component_')} starts from no folder with a config.json, and what is "
            "exported is written like that folder. Name one: "
            "checkpointer._component_=torchtune_agent.models.HFCheckpointer checkpointer.model_dir=FOLDER"
        )
    return HFCheckpointer(str(base), **options)


def tokenizer_folder(cfg: DictConfig) -> Path | None:
    """The Hugging Face folder of the config's tokenizer; None where it is of another kind."""
    path = cfg.tokenizer.get("path")
    if path is None:
        made = instantiate(cfg.tokenizer, "tokenizer")
        path = made.path if isinstance(made, ChatTemplateTokenizer) else None
    if path is None:
        return None
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    return folder if (folder / "tokenizer_config.json").exists() else None


def _not_found(error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    what = f"no {error} (in the folder's config.json?)" if isinstance(error, KeyError) else error
    return UserError(f"checkpointer: {what}. Check checkpoint_dir and checkpoint_files.")
