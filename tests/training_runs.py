"""Small real runs that can be killed at a chosen moment, and what is left of them, for tests of resuming and of faults.

A rank is the real recipe with three additions: it writes down which samples it trains, ends with SHA-256 digests of
everything it has, and kills itself (SIGKILL) where it is told to. Ranks are started by torchrun,

    torchrun --nproc_per_node 2 tests/training_runs.py --config configs/tiny/agent_sft.yaml output_dir=OUT ...

or by `launch`, in a second instead of ten: a server imports everything once, and ranks are forked from it.
`RECORDS` in the environment is the folder for what is written down, `KILL` is PHASE:STEP:RANK (see PHASES), `RECIPE`
the name of a recipe.
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
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from pyarrow import parquet
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune import config

from torchtune_agent.data.collate import Batch
from torchtune_agent.data.loader import num_steps
from torchtune_agent.metrics import read_rows
from torchtune_agent.training import Parts, Run, checkpoints, run_recipe, saving, sharded
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

# Where a rank can be killed: beside `step` (as a step begins), before or after a part of saving.
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
}


class Killer:
    """Kills this process at one moment: in `phase`, in or after `step`, where this is `rank`."""

    def __init__(self, plan: str | None, rank: int) -> None:
        self.phase, step, of_rank = (plan or "none:0:-1").split(":")
        self.step, self.is_meant = int(step), int(of_rank) == rank
        self.now = 0
        if self.is_meant and self.phase in PHASES:
            owner, name, when = PHASES[self.phase]
            setattr(owner, name, self._wrapped(getattr(owner, name), when))

    def _wrapped(self, real: Callable[..., Any], when: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if when == "before" and self.now >= self.step:
                die()
            result = real(*args, **kwargs)
            if when == "after" and self.now >= self.step:
                die()
            return result

        return call

    def step_begins(self, step: int) -> None:
        self.now = step
        if self.is_meant and self.phase == "step" and step == self.step:
            die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


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
    """One of a source that changes as the run goes on, and has numbers to log."""

    def state_dict(self) -> dict[str, Any]:
        return self._source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._source.load_state_dict(state)

    def facts(self) -> dict[str, float]:
        return self._source.facts()


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
    optimizers: dict[int, Optimizer] = {}
    register_optimizer_step_post_hook(lambda optimizer, *_: optimizers.setdefault(id(optimizer), optimizer) and None)
    built: list[Parts] = []
    name = os.environ.get("RECIPE", "agent_sft_distributed")
    spec = importlib.util.spec_from_file_location("recipe", ROOT / "recipes" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)

    def build(run: Run) -> Parts:
        parts = recipe.build(run)
        recorded = RecordedStateful if isinstance(parts.train, Stateful) else Recorded
        parts.train = recorded(parts.train, records / f"samples_{rank}.jsonl", killer)
        built.append(parts)
        return parts

    sections = [section for section, own in RECIPE_SECTIONS.items() if own == name]
    code = run_recipe(name, cfg, build, sections, getattr(recipe, "prepare", None))
    if code == 0 and built:
        state: Any = np.random.get_state(legacy=True)
        found = {
            "parameters": digest(built[0].model.state_dict()),
            "optimizer": digest([list(o.state.values()) for o in optimizers.values()]),
            "groups": digest(
                [{k: v for k, v in g.items() if k != "params"} for o in optimizers.values() for g in o.param_groups]
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


def launch(
    folder: Path,
    *overrides: str,
    size: int = 2,
    kill: str | None = None,
    limit: float = 120,
    config: Path | None = None,
    recipe: str = "agent_sft_distributed",
    small: Sequence[str] = SMALL,
) -> Left:
    """Run `size` ranks that write to `folder`; once one has failed the others are killed, as torchrun would.

    `config` has a model of its own; without it the model is a very small one. `small` makes the rest small.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    env |= {"RECORDS": str(folder / "records"), "RECIPE": recipe, **({"KILL": kill} if kill else {})}
    arguments = ["--config", str(config or CONFIG), f"output_dir={folder / 'out'}", *small]
    arguments += [*(() if config else SMALL_MODEL), *overrides]
    log = folder / f"log_{len(list(folder.glob('log_*')))}.txt"
    ranks = [
        _CONTEXT.Process(
            target=_forked, args=(arguments, {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, str(log))
        )
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + limit
    while any(rank.is_alive() for rank in ranks) and time.monotonic() < deadline:
        if any(rank.exitcode for rank in ranks):
            deadline = min(deadline, time.monotonic() + 3)  # the others may still have something to say
        ranks[0].join(0.02)
    for rank in ranks:
        rank.kill()
        rank.join()
    return Left(folder, [rank.exitcode or 0 for rank in ranks], log.read_text(errors="replace"))


def _forked(arguments: list[str], env: dict[str, str], log: str) -> None:
    os.environ.pop("KILL", None)
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
