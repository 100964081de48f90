"""`tune run agent_export`: a model to load and serve from any checkpoint of a run, or from a base model and an adapter.

One process does it, without a GPU and without the data. Weights are read, merged and written one tensor after another:
the memory it takes is that of the largest file it writes.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from pydantic import BaseModel, ConfigDict
from torch import nn
from torchtune import training

from torchtune_agent import __version__
from torchtune_agent.config import check_components, check_keys, resolved, trust
from torchtune_agent.errors import UserError
from torchtune_agent.models import Conversion, HeldWeights, HFCheckpointer, HFWeights, Weights
from torchtune_agent.models.adapter import PARTS, AdapterSettings
from torchtune_agent.models.adapter_weights import merge_adapters
from torchtune_agent.models.loading import load_like
from torchtune_agent.models.new_tokens import with_new_tokens
from torchtune_agent.models.peft_format import load_peft
from torchtune_agent.screen import shown
from torchtune_agent.training.adapters import parameter_setup
from torchtune_agent.training.card import Trained, merged_card
from torchtune_agent.training.checkpoints import Checkpoint, CheckpointFolder, Damaged
from torchtune_agent.training.resume import changes, kept_config
from torchtune_agent.training.saving import FOLDER
from torchtune_agent.training.settings import Settings, checked
from torchtune_agent.training.sharded import StoredTensors
from torchtune_agent.training.state import RUN, TENSORS, has_frozen, model_tensors, read_plain
from torchtune_agent.training.weights import hf_checkpointer, tokenizer_folder, write_folders

_CPU = torch.device("cpu")
_MODEL = "model."  # how the names of a model's tensors begin in a checkpoint
_STEP = re.compile(r"step_\d+")
# What decides the meaning of trained weights. Where the base model's folder is may have changed.
_DECIDES = re.compile(r"(adapter|model)\b(?!\.model_dir$)|dtype$")


class ExportOptions(BaseModel):
    """The section `export` of the config."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str = "auto"  # the newest good one; step_N; or a path
    output_dir: Path | None = None  # gets model/step_N and lora_weights/step_N; the run's own where it is not given
    adapter: Path | None = None  # a folder in peft's format, to merge into the base model instead


def export(cfg: DictConfig) -> None:
    """Write what `cfg` says, and say where."""
    options = _options(cfg)
    cfg = cfg.copy()
    cfg.pop("export", None)
    settings = Settings.from_config(cfg, for_this_machine=False)
    trust(settings.trusted_components)
    check_components(cfg)
    cfg = with_new_tokens(cfg, settings.tool_call_special_tokens, settings.output_dir)
    print(f"torchtune_agent {__version__}: agent_export", flush=True)
    output_dir = options.output_dir or settings.output_dir
    own = cfg.checkpointer.get("output_dir") if options.output_dir is None else None
    exporter = hf_checkpointer(cfg, Path(own) if own else output_dir / "model")
    try:
        if options.adapter is not None:
            written = [_merge(cfg, options.adapter, exporter)]
        else:
            written = _export_checkpoint(cfg, settings, options.checkpoint, output_dir, exporter)
    except OSError as error:
        raise UserError(
            f"{output_dir}: the weights cannot be written: {error.strerror or error}. Make room, or name another "
            "folder by export.output_dir."
        ) from error
    for title, folder in zip(("model", "adapter"), written, strict=False):
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        print(shown(f"{title:<14}{folder}  ({size / 2**20:,.1f} MiB of weights)"), flush=True)


def _options(cfg: DictConfig) -> ExportOptions:
    section = cfg.get("export") or DictConfig({})
    if not isinstance(section, DictConfig):
        raise UserError(f"export={section}: must be a section, for example export.checkpoint=step_40.")
    check_keys(section, set(ExportOptions.model_fields), "export.")
    options = checked(ExportOptions, resolved(section), "export.")
    if options.adapter is not None and options.checkpoint != "auto":
        raise UserError(
            f"export.checkpoint={options.checkpoint}: cannot be used with export.adapter={options.adapter}, which is "
            "merged into the base model. Use one of the two."
        )
    return options


def _merge(cfg: DictConfig, folder: Path, exporter: HFCheckpointer) -> Path:
    base, architecture = exporter.model_dir, exporter.architecture
    adapter, settings = load_peft(folder, architecture)
    weights = HFWeights(base, Conversion(architecture))
    for module in settings.targets:
        _check_fits(module, adapter, settings, weights, f"export.adapter={folder}")
    for name in (name for name in adapter if not name.endswith(PARTS)):
        if name not in weights or weights.shape(name) != tuple(adapter[name].shape):
            raise UserError(
                f"export.adapter={folder}: its {name!r} is not as large as the base model's. Name its base."
            )
    weights.update(adapter)
    print(shown(f"adapter       {folder}, {len(adapter)} tensors"), flush=True)
    name = f"{folder.resolve().name}_merged"
    card = merged_card(settings, folder.resolve().name, name, base)
    merged = merge_adapters(weights, settings)
    return exporter.save_folder(merged, name, tokenizer_dir=tokenizer_folder(cfg), card=card)


def _check_fits(
    module: str, adapter: Mapping[str, torch.Tensor], settings: AdapterSettings, base: Weights, where: str
) -> None:
    weight = f"{module}.weight"
    if weight not in base:
        raise UserError(f"{where}: it is for {module!r}, which the base model has not. Name the base it belongs to.")
    (num_out, num_in), rank = base.shape(weight), settings.rank
    wanted = [(rank, num_in), (num_out, rank), *([(num_out,)] if settings.kind == "dora" else [])]
    found = [tuple(adapter[module + part].shape) for part in PARTS if module + part in adapter]
    if found != wanted:
        shapes, fitting = (", ".join(map(str, map(list, sizes))) for sizes in (found, wanted))
        raise UserError(
            f"{where}: for {module!r} it has tensors of {shapes}, and {fitting} fit the base model. Name the base it "
            "belongs to."
        )


def _export_checkpoint(
    cfg: DictConfig, settings: Settings, wanted: str, output_dir: Path, exporter: HFCheckpointer
) -> list[Path]:
    checkpoint = _find(wanted, CheckpointFolder(settings.output_dir / FOLDER))
    manifest, path = checkpoint.manifest, checkpoint.path
    print(shown(f"checkpoint    {path}, {len(manifest.files)} files as they were written"), flush=True)
    _check_same(checkpoint, cfg, settings)
    parameters = parameter_setup(cfg)
    model = parameters.build(cfg, settings)
    base = exporter.load_checkpoint()[training.MODEL_KEY] if has_frozen(model) else HeldWeights({})
    try:
        weights = CheckpointWeights(model, StoredTensors(path / TENSORS), base)
        position: Mapping[str, Any] = read_plain(path / RUN)["position"]
        # A checkpoint that was moved aside is of a run whose logs may have been continued by another.
        logs = path.resolve().parent.with_name("logs") if path.resolve().parent.name == FOLDER else None
        trained = Trained(manifest, position["tokens"], position["supervised"], logs)
        return write_folders(cfg, output_dir, f"step_{manifest.step}", exporter, parameters, weights, trained)
    except Damaged as error:
        raise UserError(f"{path}: cannot be exported: {error}. Name another one by export.checkpoint.") from error


def _find(wanted: str, folder: CheckpointFolder) -> Checkpoint:
    """The checkpoint that is `wanted`, every file of it compared with its SHA-256."""
    if wanted != "auto":
        path = folder.path / wanted if _STEP.fullmatch(wanted) else Path(wanted)
        try:
            return Checkpoint.verified(path)
        except Damaged as error:
            there = ", ".join(f"step_{step}" for step in folder.steps()) or "none"
            raise UserError(
                f"export.checkpoint={wanted}: {path} is not a good checkpoint: {error}. In {folder.path}: {there}."
            ) from error
    problems = []
    for step in folder.steps():
        try:
            return Checkpoint.verified(folder.of_step(step))
        except Damaged as error:
            problems.append(f"{folder.of_step(step)}: {error}")
            print(shown(f"warning: {problems[-1]}. It is not used."), flush=True)
    raise UserError(
        f"{folder.path} has no good checkpoint"
        + "".join(f"\n  {line}" for line in problems)
        + "\nCheck output_dir, which must be the run's, or name one by export.checkpoint=PATH."
    )


def _check_same(checkpoint: Checkpoint, cfg: DictConfig, settings: Settings) -> None:
    """Refuse a config whose model is not the run's: adapters with another alpha would be merged by a wrong scale."""
    changed = changes(checkpoint.manifest.config, kept_config(cfg, settings))
    lines = [f"\n  {key}: {change}" for key, change in changed.items() if _DECIDES.match(key)]
    if lines:
        raise UserError(
            f"{checkpoint.path} is of a run with another model"
            + "".join(lines)
            + "\nUse the config of the run: --config OUTPUT_DIR/logs/config.yaml"
        )


class CheckpointWeights(Mapping[str, torch.Tensor]):
    """All weights of a run's model: what was trained from the checkpoint, what was frozen from the base model, each
    read when it is asked for, in the type that training holds it in."""

    def __init__(self, model: nn.Module, stored: StoredTensors, base: Weights) -> None:
        """`model` is on the meta device."""
        self._like = model.state_dict()
        self._trained = model_tensors(model)
        self._stored, self._base = stored, base
        saved = {name.removeprefix(_MODEL) for name in stored if name.startswith(_MODEL)}
        if saved != self._trained.keys():
            names = sorted(saved ^ self._trained.keys())
            raise Damaged(f"its tensors are not this model's: {', '.join(names[:3])}, {len(names)} in all")
        for name, like in self._like.items():
            frozen = name not in self._trained
            if frozen and name not in base:
                raise UserError(f"checkpointer: the base model has no {name!r}. Name the one the run started from.")
            shape = base.shape(name) if frozen else stored.shape(_MODEL + name)
            if shape != tuple(like.shape):
                raise UserError(f"model: {name!r} has shape {list(like.shape)}, and {list(shape)} where it is stored.")

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._trained:
            return self._stored[_MODEL + name]
        return load_like(self._like[name], self._base, name, _CPU)

    def __contains__(self, name: object) -> bool:
        return name in self._like

    def __iter__(self) -> Iterator[str]:
        return iter(self._like)

    def __len__(self) -> int:
        return len(self._like)
