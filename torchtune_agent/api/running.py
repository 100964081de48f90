"""Running a recipe for a program: in its own process, or on several with torchrun.

Either way the program goes on afterwards as if nothing had been: what ended the run is raised.
"""

import codecs
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from signal import SIGINT, SIGTERM
from threading import Thread
from typing import IO

import torch
from omegaconf import DictConfig, OmegaConf

from torchtune_agent.errors import UserError
from torchtune_agent.training.run import called_by_program
from torchtune_agent.training.signals import EXIT_STOPPED, Stopped, StopRequest, listening

_INTERRUPTED = 130
_TAIL = 1 << 16  # characters: more than any message of ours


class TrainingStopped(RuntimeError):
    """The process was asked to stop (SIGTERM, SIGUSR1) while a run was under way. What it had done is saved."""

    def __init__(self) -> None:
        super().__init__(
            "the run was asked to stop, and did, with a checkpoint saved if it had begun to train. "
            "overrides=['resume_from_checkpoint=auto'] goes on from there."
        )


def run(recipe: str, cfg: DictConfig, num_devices: int) -> None:
    """Run a recipe to its end."""
    if "RANK" in os.environ or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise UserError(
            "num_devices: this program is itself one of several processes (torchrun, or a process group of its own). "
            "Start it as one, with python, and set num_devices; or use `tune run`."
        )
    if num_devices == 1:
        _run_here(recipe, cfg)
    else:
        _launch(recipe, cfg, num_devices)


def _run_here(recipe: str, cfg: DictConfig) -> None:
    main = import_module(f"torchtune_agent.recipes.{recipe}").recipe_main.__wrapped__  # without the command line
    try:
        with called_by_program():
            main(cfg)
    except Stopped as stopped:
        raise TrainingStopped from stopped
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # for whatever the program does next, perhaps in another process


def _launch(recipe: str, cfg: DictConfig, num_devices: int) -> None:
    """`tune run` in a process of its own, which starts the others. What it says is said here."""
    with tempfile.TemporaryDirectory(prefix="torchtune_agent_") as folder:
        path = Path(folder) / "config.yaml"
        OmegaConf.save(cfg, path)
        # By module, so that neither PATH nor torch's autoload decide what is run
        command = [sys.executable, "-m", "torchtune_agent", "run", "--nproc_per_node", str(num_devices)]
        command += [recipe, "--config", str(path)]
        with listening(goes_on=True) as request:
            request.start()  # a signal is for the run, which saves
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
                code, said = _wait(child, request)
    if code == EXIT_STOPPED or (request.by is not None and code):
        raise TrainingStopped
    if code == _INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        _raise(code, said)


def _wait(child: "subprocess.Popen[bytes]", request: StopRequest) -> tuple[int, str]:
    """The exit code of `child`, and the end of what it said on stderr."""
    assert child.stdout is not None and child.stderr is not None
    tail: list[str] = []
    pumps = [
        Thread(target=_pump, args=(child.stdout, sys.stdout, []), daemon=True),
        Thread(target=_pump, args=(child.stderr, sys.stderr, tail), daemon=True),
    ]
    for pump in pumps:
        pump.start()
    was_told = False
    while True:
        try:
            code = child.wait(timeout=0.2)
            break
        except subprocess.TimeoutExpired:
            if request.by is not None and not was_told:
                child.send_signal(SIGTERM)
                was_told = True
        except KeyboardInterrupt:
            child.send_signal(SIGINT)
    for pump in pumps:
        pump.join()
    return code, "".join(tail)


def _pump(source: IO[bytes], to: IO[str], tail: list[str]) -> None:
    """Hand on what is said as it comes, progress bars and all; `tail` keeps the end of it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while content := os.read(source.fileno(), 1 << 16):
        text = decoder.decode(content)
        to.write(text)
        to.flush()
        tail[:] = ["".join((*tail, text))[-_TAIL:]]


def _raise(code: int, said: str) -> None:
    """What a run of several processes has said of why it failed, as an exception."""
    _, found, cause = said.rpartition("\nerror: ")
    if not found:
        raise RuntimeError(f"the run failed with exit code {code}; what it said is above")
    if cause.startswith("rank "):  # ours say which rank it was where it is nothing that a user can mend
        raise RuntimeError(cause.strip())
    raise UserError(cause.strip())
