"""From a parsed config to a finished run: what every recipe's main function calls.

A mistake a user can mend is found on every rank before anything expensive starts, and said once, by rank 0.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torchtune import training, utils
from tqdm import tqdm

from torchtune_agent import __version__
from torchtune_agent.distributed import World, make_mesh, on_main, process_group, together
from torchtune_agent.errors import UserError
from torchtune_agent.training.progress import Progress
from torchtune_agent.training.resume import find, manifest_of_run, prepare_folders
from torchtune_agent.training.settings import Settings
from torchtune_agent.training.trainer import Parts, Trainer


@dataclass(frozen=True)
class Run:
    """What a recipe builds its parts from."""

    cfg: DictConfig
    settings: Settings
    world: World
    say: Callable[[str], None]  # prints a line, on rank 0 only


def run_recipe(name: str, cfg: DictConfig, build: Callable[[Run], Parts]) -> int:
    """Check the config, build the parts on every rank, train. Returns the process's exit code."""
    with process_group(str(cfg.get("device", "cuda"))) as (rank, size):
        try:
            _run(name, cfg, build, size)
        except UserError as error:
            if rank == 0:
                say_mistake(error)
            torch.distributed.barrier()  # torchrun ends every process once one has failed: let rank 0 speak first
            return 1
    return 0


def say_mistake(error: UserError) -> None:
    """What rank 0 does before the process ends for a mistake of the user's."""
    print(f"\nerror: {error}", file=sys.stderr, flush=True)
    get_error_handler().record_exception(error)  # tells the launcher; see _tune.py


def _run(name: str, cfg: DictConfig, build: Callable[[Run], Parts], size: int) -> None:
    utils.get_logger("WARNING")  # torchtune's loggers share one level; what they say at INFO, Progress says
    settings = together(lambda: _check(cfg, size))
    device = utils.get_device(settings.device)
    tp = settings.tensor_parallel_dim
    world = World(torch.distributed.get_rank(), size, device, make_mesh(device.type, size // tp, tp))
    say = partial(_say, world.is_main)
    checkpoint = find(settings, world, say)
    if settings.seed is None and checkpoint is not None:
        settings = settings.model_copy(update={"seed": checkpoint.manifest.config["seed"]})
    seed = training.set_seed(settings.seed, settings.cudnn_deterministic_mode)
    settings = settings.model_copy(update={"seed": seed})
    cfg.seed = seed
    say(f"torchtune_agent {__version__}: {name} on {size} x {device.type}, {settings.dtype}, seed {seed}")
    parts = together(lambda: build(Run(cfg, settings, world, say)))
    say(f"model         {sum(parameter.numel() for parameter in parts.model.parameters()):,} parameters")
    manifest = on_main(lambda: manifest_of_run(cfg, settings, parts, size))
    on_main(lambda: prepare_folders(checkpoint, cfg, settings, manifest, say))
    progress = together(lambda: Progress(cfg, settings, world, say, continues=checkpoint is not None))
    trainer = Trainer(cfg, settings, world, parts, progress, manifest, checkpoint)
    trainer.train()


def _say(is_main: bool, text: str) -> None:
    if is_main:
        tqdm.write(text, file=sys.stderr)


def _check(cfg: DictConfig, size: int) -> Settings:
    settings = Settings.from_config(cfg)
    settings.check_world_size(size)
    make_output_dir(settings.output_dir)
    return settings


def make_output_dir(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output_dir={path}: cannot be made: {error.strerror}. Name a folder you can write to."
        ) from error
    if not os.access(path, os.W_OK):
        raise UserError(f"output_dir={path}: cannot be written to. Name another folder, or change its permissions.")
