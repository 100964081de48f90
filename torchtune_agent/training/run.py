"""From a parsed config to a finished run: what every recipe's main function calls.

A mistake a user can mend is found on every rank before anything expensive starts. Why a run ends is said once, by the
rank that knows.
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

from torchtune_agent import __version__, redaction
from torchtune_agent.config import check_components, trust
from torchtune_agent.distributed import World, make_mesh, on_main, process_group, together
from torchtune_agent.errors import UserError
from torchtune_agent.screen import shown
from torchtune_agent.training.progress import Progress
from torchtune_agent.training.resume import find, manifest_of_run, prepare_folders
from torchtune_agent.training.settings import Settings
from torchtune_agent.training.signals import EXIT_STOPPED, Stopped, StopRequest, listening
from torchtune_agent.training.trainer import Parts, Trainer
from torchtune_agent.training.watch import Watch


@dataclass(frozen=True)
class Run:
    """What a recipe builds its parts from."""

    cfg: DictConfig
    settings: Settings
    world: World
    say: Callable[[str], None]  # prints a line, on rank 0 only


def run_recipe(name: str, cfg: DictConfig, build: Callable[[Run], Parts]) -> int:
    """Check the config, build the parts on every rank, train. Returns the process's exit code: 0, EXIT_STOPPED where
    the run was asked to stop, 1 where it failed."""
    redaction.remember(cfg)
    sys.argv[1:] = redaction.redacted_arguments(sys.argv[1:])  # services that watch a run keep its command line
    timeout = cfg.get("process_group_timeout_seconds") or 600
    with listening() as request, process_group(str(cfg.get("device", "cuda")), float(timeout)) as (rank, size):
        with Watch(rank, size, request, float(timeout)) as watch:
            ended: BaseException | None = None
            try:
                _run(name, cfg, build, size, request, watch)
            except BaseException as error:  # torchtune raises such, too
                ended = error
            if isinstance(ended, Stopped) and ended.together or ended is None:
                watch.end("stopped" if ended else "ended")
                code = EXIT_STOPPED if ended else 0
            else:
                code = _say_why(ended, request, watch)
                if size > 1:
                    # The others may wait in any collective: none can be called, nor a group be taken down in order.
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
    return code


def _say_why(error: BaseException, request: StopRequest, watch: Watch) -> int:
    """What a process does before it ends alone. Returns its exit code."""
    if isinstance(error, Stopped) or request.ends_start or watch.others_stop:
        watch.stop_alone()
        if watch.claims_saying():
            by = request.by or "another rank"
            _print(f"\nstopped by {by} before the first step; nothing was lost (exit code {EXIT_STOPPED})")
        return EXIT_STOPPED
    if isinstance(error, KeyboardInterrupt):
        watch.end("failed")
        if watch.claims_saying():
            _print("\nstopped by Ctrl-C; nothing since the last checkpoint is saved")
        return 130
    if isinstance(error, UserError):
        watch.end("failed")
        if watch.claims_saying():
            say_mistake(error)
        return 1
    cause = watch.cause(error)
    if cause is not None:
        _print(f"\nerror: {cause}")
        _tell_launcher(cause)
    return 1


def say_mistake(error: UserError) -> None:
    """Say what the user can mend, before the process ends."""
    _print(f"\nerror: {error}")
    _tell_launcher(str(error))


def _print(text: str) -> None:
    print(shown(text), file=sys.stderr, flush=True)


def _tell_launcher(text: str) -> None:
    """Leave the cause where torchrun looks for one, without the secrets that the exception itself may hold."""
    get_error_handler().record_exception(UserError(redaction.redacted_text(text)))


def _run(
    name: str, cfg: DictConfig, build: Callable[[Run], Parts], size: int, request: StopRequest, watch: Watch
) -> None:
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
    try:
        Trainer(cfg, settings, world, parts, progress, request, watch, manifest, checkpoint).train()
    except BaseException:
        progress.abandon()
        raise


def _say(is_main: bool, text: str) -> None:
    if is_main:
        tqdm.write(shown(text), file=sys.stderr)


def _check(cfg: DictConfig, size: int) -> Settings:
    settings = Settings.from_config(cfg)
    trust(settings.trusted_components)
    check_components(cfg)
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
