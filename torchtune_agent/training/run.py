"""From a parsed config to a finished run: what every recipe's main function calls.

A mistake a user can mend is found on every rank before anything expensive starts. Why a run ends is said once, by the
rank that knows. A program that runs a recipe in its own process (`called_by_program`) gets it as an exception instead.
"""

import os
import random
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torchtune import training, utils
from tqdm import tqdm

from torchtune_agent import __version__, redaction
from torchtune_agent.config import check_components, trust, trusted_packages
from torchtune_agent.distributed import World, make_mesh, on_main, process_group, rank_from_environment, together
from torchtune_agent.errors import UserError
from torchtune_agent.models.experts import idle_weights
from torchtune_agent.models.new_tokens import with_new_tokens
from torchtune_agent.screen import shown
from torchtune_agent.training.notes import Note
from torchtune_agent.training.parameters import FullParameters
from torchtune_agent.training.progress import Progress
from torchtune_agent.training.resume import find, manifest_of_run, prepare_folders
from torchtune_agent.training.settings import RECIPE_SECTIONS, Settings
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
    is_asked_to_stop: Callable[[], bool]  # this rank, so far


class NothingToTrain(Exception):
    """Raised by a recipe's `build`, on every rank, where all that was asked for is done."""


_has_caller: ContextVar[bool] = ContextVar("has_caller", default=False)


@contextmanager
def called_by_program() -> Iterator[None]:
    """Meanwhile recipes in this process raise what ended them, after their process group is taken down, and say nothing
    of it. The program's arguments, random states and trust in packages are afterwards what they were."""
    arguments, python, numpy = sys.argv[:], random.getstate(), np.random.get_state()
    trusted = trusted_packages()
    token = _has_caller.set(True)
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            torch.seed()  # so that runs whose seed is drawn do not draw the same
            yield
    finally:
        _has_caller.reset(token)
        sys.argv[:] = arguments
        random.setstate(python)
        np.random.set_state(numpy)
        trust(trusted)


def run_recipe(
    name: str,
    cfg: DictConfig,
    build: Callable[[Run], Parts],
    sections: Collection[str] = (),
    prepare: Callable[[DictConfig], object] | None = None,
) -> int:
    """Check the config, build the parts on every rank, train. Returns the process's exit code: 0, EXIT_STOPPED where
    the run was asked to stop, 1 where it failed.

    `sections` are those of RECIPE_SECTIONS that the recipe reads; `prepare` checks them, and completes the config by
    them. `build` may call collectives where what fails before them fails on every rank.
    """
    redaction.remember(cfg)
    sys.argv[1:] = redaction.redacted_arguments(sys.argv[1:])  # services that watch a run keep its command line
    timeout = cfg.get("process_group_timeout_seconds") or 600
    has_caller = _has_caller.get()
    ended: BaseException | None = None
    group = process_group(str(cfg.get("device", "cuda")), float(timeout))
    with listening(goes_on=has_caller) as request, group as (rank, size):
        with Watch(rank, size, request, float(timeout)) as watch:
            try:
                _run(name, cfg, build, size, request, watch, sections, prepare)
            except NothingToTrain:
                pass
            except BaseException as error:  # torchtune raises such, too
                ended = error
            if isinstance(ended, Stopped) and ended.together or ended is None:
                watch.end("stopped" if ended else "ended")
                code = EXIT_STOPPED if ended else 0
            elif has_caller:  # the only rank
                watch.end("failed")
                code = 1
            else:
                code = _say_why(ended, request, watch)
                if size > 1:
                    # The others may wait in any collective: none can be called, nor a group be taken down in order.
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
    if has_caller and ended is not None:
        raise ended
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


def run_alone(cfg: DictConfig, work: Callable[[DictConfig], None]) -> int:
    """A recipe that does its `work` in one process, however many were started. Returns the process's exit code."""
    if rank_from_environment() != 0:
        return 0
    redaction.remember(cfg)
    utils.get_logger("WARNING")
    note = Note(0)
    try:
        work(cfg)
    except UserError as error:
        note.write(said=True, state="failed")
        say_mistake(error)
        return 1
    return 0


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
    name: str,
    cfg: DictConfig,
    build: Callable[[Run], Parts],
    size: int,
    request: StopRequest,
    watch: Watch,
    sections: Collection[str],
    prepare: Callable[[DictConfig], object] | None,
) -> None:
    utils.get_logger("WARNING")  # torchtune's loggers share one level; what they say at INFO, Progress says
    settings = together(lambda: _check(cfg, size, name, sections, prepare))
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
    # What is logged, and compared when the run is resumed, stays as the user gave it.
    built = on_main(lambda: with_new_tokens(cfg, settings.tool_call_special_tokens, settings.output_dir))
    parts = together(lambda: build(Run(built, settings, world, say, lambda: request.by is not None)))
    if cfg.get("adapter") is not None and isinstance(parts.parameters, FullParameters):
        raise UserError(f"adapter: {name} trains all weights, and no adapter. Take the section out: ~adapter")
    say(f"model         {_size_of(parts.model)}")
    manifest = on_main(lambda: manifest_of_run(name, cfg, settings, parts, size))
    if not parts.only_validates:
        on_main(lambda: prepare_folders(checkpoint, cfg, settings, manifest, say))
    progress = together(lambda: Progress(cfg, settings, world, say, continues=checkpoint is not None))
    try:
        Trainer(built, settings, world, parts, progress, request, watch, manifest, checkpoint).run()
    except BaseException:
        progress.abandon()
        raise


def _size_of(model: nn.Module) -> str:
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    idle = sum(number for _, number in idle_weights(model))
    return (
        f"{total:,} parameters"
        + (f", {total - idle:,} of them active for a token" if idle else "")
        + (f", {trained:,} of them trained ({trained / total:.1%})" if trained < total else "")
    )


def _say(is_main: bool, text: str) -> None:
    if is_main:
        tqdm.write(shown(text), file=sys.stderr)


def _check(
    cfg: DictConfig,
    size: int,
    name: str,
    sections: Collection[str],
    prepare: Callable[[DictConfig], object] | None,
) -> Settings:
    for section, recipe in RECIPE_SECTIONS.items():
        if section in cfg and section not in sections:
            raise UserError(
                f"{section}: {name} does not read this section; {recipe} does. Run that, or add ~{section}."
            )
    if prepare is not None:
        prepare(cfg)
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
