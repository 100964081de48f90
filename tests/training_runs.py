"""Small real runs that can be killed at a chosen moment, and what is left of them, for tests of resuming and of faults.

A rank is the real recipe with additions: it writes down which samples it trains, ends with SHA-256 digests of
everything it has, and sends itself SIGKILL or other signals, or spoils a loss or gradient, where it is told to. Ranks
are started by torchrun or `tune run`, from the folder above this one,

    tune run --nproc_per_node 2 tests/training_runs.py --config configs/tiny/agent_sft.yaml output_dir=OUT ...

or by `launch`, in a second instead of ten: a server imports everything once, and ranks are forked from it.
In the environment, `RECORDS` is the folder for what is written down, `KILL` is PHASE:STEP:RANK or
PHASE:STEP:RANK:SIGNAL+SIGNAL (see PHASES), `SPOIL` is loss|gradient:VALUE:STEP:RANK, and `RECIPE` the name of a recipe.
"""

import hashlib
import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from pyarrow import parquet
from torch.distributed.tensor import DTensor
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune import config

from torchtune_agent.data.collate import Batch
from torchtune_agent.data.loader import num_steps
from torchtune_agent.metrics import read_rows
from torchtune_agent.training import Parts, Run, checkpoints, resume, run_recipe, saving, sharded, trainer, weights
from torchtune_agent.training.settings import RECIPE_SECTIONS
from torchtune_agent.training.state import Stateful

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "tiny" / "agent_sft.yaml"
SMALL_MODEL = ("model.num_layers=1", "model.embed_dim=32", "model.intermediate_dim=64")
# Two epochs of six steps on two ranks; the last of each is short, in rows and in micro-batches.
SMALL = (
    "dataset.num_tasks=45",
    "dataset.num_tools=40",
    "dataset_val.num_tasks=6",
    "dataset_val.num_tools=40",
    "batch_size=2",
    "gradient_accumulation_steps=2",
    "run_val_every_n_steps=4",
    "log_detailed_metrics_every_n_steps=2",
    "log_by=[tool,source]",
    "log_sample_losses=True",
    "metric_logger=torchtune.training.metric_logging.StdoutLogger",
    "~metric_logger.log_dir",
    "epochs=2",
    "save_every_n_steps=2",
)
LAST_STEP = 12

# Where a rank can be killed: beside `step` (as a step begins), before or after a part of saving or of the run.
PHASES: dict[str, tuple[Any, str, str]] = {
    "begun": (checkpoints.CheckpointFolder, "begin", "after"),
    "files": (saving, "_write_files", "after"),
    "tensors": (sharded, "save", "before"),
    "tensors written": (sharded, "save", "after"),
    "hashed": (checkpoints.CheckpointFolder, "publish", "before"),
    "manifest": (checkpoints, "_sync_folder", "before"),
    "renamed": (Path, "rename", "after"),
    "published": (checkpoints.CheckpointFolder, "publish", "after"),
    "pruning": (shutil, "rmtree", "before"),
    "validating": (trainer.Trainer, "_validate", "before"),
    "epoch's end": (trainer.Trainer, "_end_epoch", "before"),
    "weights": (weights.UserWeights, "write", "before"),
    "weights written": (weights.UserWeights, "write", "after"),
    "recovered": (checkpoints.CheckpointFolder, "recover", "after"),
    "rewinding": (resume, "rewind", "before"),
    "rewound": (resume, "rewind", "after"),
    "loading": (weights.UserWeights, "load", "before"),
    "restored": (trainer.Trainer, "_restore", "after"),
}


class Killer:
    """Kills this process at one moment, in `phase` in or after `step`, where this is `rank`; or signals it once."""

    def __init__(self, plan: str | None, rank: int) -> None:
        self.phase, step, of_rank, *names = (plan or "none:0:-1").split(":")
        self.step, self.is_meant = int(step), int(of_rank) == rank
        self.signals = [signal.Signals[name] for name in names[0].split("+")] if names else [signal.SIGKILL]
        self.now = 0
        if self.is_meant and self.phase in PHASES:
            owner, name, when = PHASES[self.phase]
            setattr(owner, name, self._wrapped(getattr(owner, name), when))

    def _wrapped(self, real: Callable[..., Any], when: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if when == "before" and self.now >= self.step:
                self._fire()
            result = real(*args, **kwargs)
            if when == "after" and self.now >= self.step:
                self._fire()
            return result

        return call

    def step_begins(self, step: int) -> None:
        self.now = step
        if self.is_meant and self.phase == "step" and step == self.step:
            self._fire()

    def _fire(self) -> None:
        while self.signals:
            number = self.signals.pop(0)
            os.kill(os.getpid(), number)
            time.sleep(60 if number == signal.SIGKILL else 0.01)


class _Spoiled(torch.autograd.Function):
    """The same number, until the loss or what comes back to it is spoiled."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, what: str, value: float) -> torch.Tensor:  # pyright: ignore
        ctx.factor = value if what == "gradient" else 1.0
        return loss * (value if what == "loss" else 1.0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # pyright: ignore
        return gradient * ctx.factor, None, None


class Spoiler:
    """An objective whose loss or gradient is no number in one step (0: in every one), on one rank."""

    def __init__(self, objective: Any, plan: str, killer: Killer, rank: int) -> None:
        self._objective, self._killer = objective, killer
        self._what, value, step, of_rank = plan.split(":")
        self._value, self._step, self._is_meant = float(value), int(step), int(of_rank) in (-1, rank)

    def num_targets(self, batch: Batch) -> float:
        return self._objective.num_targets(batch)

    def __call__(self, model: Any, batch: Batch, *, with_statistics: bool) -> Any:
        output = self._objective(model, batch, with_statistics=with_statistics)
        if not self._is_meant or not torch.is_grad_enabled() or self._step not in (0, self._killer.now):
            return output
        return replace(output, loss_sum=_Spoiled.apply(output.loss_sum, self._what, self._value))


class Recorded:
    """A BatchSource that writes down what it gives."""

    def __init__(self, source: Any, path: Path, killer: Killer) -> None:
        self._source, self._path, self._killer = source, path, killer
        self.num_rows, self.rows_per_step = source.num_rows, source.rows_per_step

    def __getattr__(self, name: str) -> Any:  # what else it declares: a fingerprint, a state
        return getattr(self._source, name)

    def epoch(self, number: int, first_row: int = 0) -> Iterator[list[Batch]]:
        row = first_row
        for batches in self._source.epoch(number, first_row):
            self._killer.step_begins(number * num_steps(self._source) + row // self.rows_per_step + 1)
            samples = [info.where for batch in batches if batch.info for info in batch.info()]
            with self._path.open("a") as file:
                file.write(json.dumps([number, row, samples]) + "\n")
            yield batches
            row += self.rows_per_step


class RecordedStateful(Recorded):
    """One of a source that changes as the run goes on, and may have numbers to log."""

    def __init__(self, source: Any, path: Path, killer: Killer) -> None:
        super().__init__(source, path, killer)
        if hasattr(source, "facts"):
            self.facts = source.facts

    def state_dict(self) -> dict[str, Any]:
        return self._source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._source.load_state_dict(state)


def digest(values: Any) -> str:
    """SHA-256 over tensors (a rank's part of them) and plain values, in the order they stand."""
    hashed = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                add(key)
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        elif isinstance(value, torch.Tensor):
            local = value.detach()
            local = local.to_local() if isinstance(local, DTensor) else local
            if isinstance(local, NF4Tensor):
                local = local.get_original_weight()
            hashed.update(str((local.dtype, tuple(local.shape))).encode() + local.cpu().contiguous().numpy().tobytes())
        else:
            hashed.update(repr(value).encode())

    add(values)
    return hashed.hexdigest()


def run_rank(cfg: DictConfig) -> int:
    """One rank of a run, from its parsed config to its exit code."""
    rank, records = int(os.environ.get("RANK", 0)), Path(os.environ["RECORDS"])
    records.mkdir(parents=True, exist_ok=True)
    killer = Killer(os.environ.get("KILL"), rank)
    trainers: list[trainer.Trainer] = []
    train = trainer.Trainer.train
    trainer.Trainer.train = lambda self: (trainers.append(self), train(self))[1]
    name = os.environ.get("RECIPE", "agent_sft_distributed")
    spec = importlib.util.spec_from_file_location("recipe", ROOT / "recipes" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)

    def build(run: Run) -> Parts:
        parts = recipe.build(run)
        recorded = RecordedStateful if isinstance(parts.train, Stateful) else Recorded
        parts.train = recorded(parts.train, records / f"samples_{rank}.jsonl", killer)
        if spoil := os.environ.get("SPOIL"):
            parts.objective = Spoiler(parts.objective, spoil, killer, rank)
        return parts

    sections = [section for section, own in RECIPE_SECTIONS.items() if own == name]
    code = run_recipe(name, cfg, build, sections, getattr(recipe, "prepare", None))
    if code == 0 and trainers:
        state: Any = np.random.get_state(legacy=True)
        optimizers = trainers[0].stepper.optimizers
        found = {
            "parameters": digest(trainers[0].model.state_dict()),
            "optimizer": digest([list(o.state.values()) for o in optimizers]),
            "groups": digest(
                [{k: v for k, v in g.items() if k != "params"} for o in optimizers for g in o.param_groups]
            ),
            "random": digest([random.getstate(), state[1].tolist(), state[2:], torch.get_rng_state()]),
        }
        (records / f"digest_{rank}.json").write_text(json.dumps(found))
    return code


@dataclass
class Left:
    """What a run left behind."""

    folder: Path
    codes: list[int]  # exit codes of its ranks; -9 is killed
    output: str

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def digests(self) -> list[dict[str, str]]:
        paths = sorted((self.folder / "records").glob("digest_*.json"))
        return [json.loads(path.read_text()) for path in paths]

    @property
    def samples(self) -> dict[tuple[int, int], list[str]]:
        """What was trained by epoch and first row of a step: what counts is what was trained last."""
        ranks: dict[tuple[int, int], dict[str, list[str]]] = {}
        for path in sorted((self.folder / "records").glob("samples_*.jsonl")):
            for line in path.read_text().splitlines():
                epoch, row, samples = json.loads(line)
                ranks.setdefault((epoch, row), {})[path.name] = samples
        return {place: [one for part in parts.values() for one in part] for place, parts in sorted(ranks.items())}

    @property
    def rows(self) -> list[dict[str, float]]:
        """metrics.jsonl without what tells the time."""
        rows = read_rows(self.out / "logs" / "metrics.jsonl")
        return [{k: v for k, v in row.items() if k != "time" and "second" not in k} for row in rows]

    @property
    def tables(self) -> list[str]:
        return [(self.out / "logs" / f"by_{by}.jsonl").read_text() for by in ("tool", "source")]

    @property
    def ledger(self) -> list[dict[str, Any]]:
        lines = parquet.read_table(self.out / "logs" / "sample_losses").to_pylist()
        return sorted(lines, key=lambda line: (line["step"], line["sample"], line["token_class"]))

    @property
    def saved(self) -> list[int]:
        return checkpoints.CheckpointFolder(self.out / "checkpoints").steps()


_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["tests.training_runs", "matplotlib.pyplot", "torchtune_agent.data.toolworld", "torchtune.models.qwen2"]
)


# Starting a process asks after all others, and what became of one can be asked by only one thread at a time.
_ASKING = threading.RLock()


class Started:
    """Ranks that run, and write to one log."""

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        size: int = 2,
        env: Mapping[str, str] | None = None,
        config: Path | None = None,
        small: Sequence[str] = SMALL,
    ) -> None:
        """`config` has a model of its own; without it the model is a very small one. `small` makes the rest small."""
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        every = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        every |= {"RECORDS": str(folder / "records"), **(env or {})}
        arguments = ["--config", str(config or CONFIG), f"output_dir={folder / 'out'}", *small]
        arguments += [*(() if config else SMALL_MODEL), *overrides]
        self.folder = folder
        self.log = folder / f"log_{len(list(folder.glob('log_*')))}.txt"
        self.ranks = [
            _CONTEXT.Process(
                target=_forked, args=(arguments, {**every, "RANK": str(rank), "LOCAL_RANK": str(rank)}, str(self.log))
            )
            for rank in range(size)
        ]
        with _ASKING:
            for rank in self.ranks:
                rank.start()

    @property
    def codes(self) -> list[int | None]:
        """The exit code of every rank; None while it runs."""
        with _ASKING:
            return [rank.exitcode for rank in self.ranks]

    @property
    def is_running(self) -> bool:
        return None in self.codes

    def kill(self, *ranks: int) -> None:
        with _ASKING:
            for rank in ranks:
                self.ranks[rank].kill()

    def finish(self, limit: float = 600, patience: float = 10) -> Left:
        """Wait for the end; once a rank has failed the others are killed, as torchrun would."""
        deadline = time.monotonic() + limit
        while self.is_running and time.monotonic() < deadline:
            if any(self.codes):
                deadline = min(deadline, time.monotonic() + patience)  # the others may still have something to say
            time.sleep(0.02)
        self.kill(*range(len(self.ranks)))
        while self.is_running:
            time.sleep(0.005)
        output = self.log.read_text(errors="replace") if self.log.exists() else ""
        return Left(self.folder, [code or 0 for code in self.codes], output)


def launch(
    folder: Path,
    *overrides: str,
    size: int = 2,
    kill: str | None = None,
    env: Mapping[str, str] | None = None,
    limit: float = 600,
    config: Path | None = None,
    recipe: str = "agent_sft_distributed",
    small: Sequence[str] = SMALL,
) -> Left:
    """Run `size` ranks that write to `folder`, to their end (see `Started`)."""
    env = {**(env or {}), "RECIPE": recipe, **({"KILL": kill} if kill else {})}
    return Started(folder, *overrides, size=size, env=env, config=config, small=small).finish(limit)


def _forked(arguments: list[str], env: dict[str, str], log: str) -> None:
    for name in ("KILL", "SPOIL"):
        os.environ.pop(name, None)
    os.environ.update(env)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = ["training_runs", *arguments]
    main()


def main() -> None:
    """Ends the process with the run's exit code."""
    config.parse(run_rank)()  # pyright: ignore


if __name__ == "__main__":
    main()
