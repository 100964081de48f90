"""Old tools, then new ones: what is left of the old, by strategy, and what training on everything at once would reach.

python tests/experiments/continual.py [--seeds 3] [--work DIR] [--json FILE] [--report FILE]

Two streams of ToolWorld tools, which share no tool: 1,000 old ones and then 200 new ones, and five phases of 200. A
record is a request and the one call that answers it; the prompt lists no tools, so the model has to know them. A call
counts as exact when every token of it would be written, given all before; held-out requests are of the same tools with
other arguments. Every run is one of the recipes, as a user starts it. Runs that are done in DIR are not made again.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import runpy
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tokenizers import Tokenizer  # noqa: E402

from tests.experiments.continual_report import write_report  # noqa: E402
from torchtune_agent.toolworld import TOKENIZER_DIR, ToolWorld  # noqa: E402

# What is made first, with every seed, is what the others are compared with.
STAGES = (("finetune", "replay", "replay_half", "joint"), ("ewc", "replay+ewc"), ("ssis",))
# Replay that is as long as the new phase: twice its steps. Elsewhere the ratio is the stream's.
REPLAY_HALF = {"replay_half": ("replay", 0.5)}
ROWS, EPOCHS = 16, 6
_LONGEST = 3  # tokens of a call's values: copying longer ones is what a tiny model learns last, and no tool's affair
_MODEL = ("model.num_layers=2", "model.embed_dim=128", "model.intermediate_dim=256", "tokenizer.max_seq_len=256")
_COMMON = (
    *_MODEL,
    f"batch_size={ROWS}",
    "batch_size_val=64",
    "optimizer.lr=3e-3",
    "optimizer.weight_decay=0.0",
    "lr_scheduler.num_warmup_steps=30",
    "lr_scheduler.num_cycles=0.0",  # constant after the warm-up: nobody knows when the next tools come
    "log_every_n_steps=20",
    "log_detailed_metrics_every_n_steps=20",
    "log_by=[source]",
    "metric_logger=torchtune.training.metric_logging.StdoutLogger",
    "~metric_logger.log_dir",
)


@dataclass(frozen=True)
class Phase:
    name: str
    num_tools: int
    first_tool: int
    num_train: int
    num_test: int


@dataclass(frozen=True)
class Stream:
    name: str
    phases: tuple[Phase, ...]
    buffer_size: int
    replay_ratio: float
    ewc_strength: float


TWO = Stream(
    "two phases",
    (Phase("old", 1000, 0, 3000, 300), Phase("new", 200, 1000, 600, 200)),
    buffer_size=2048,
    replay_ratio=0.23,  # with r of the rows replayed, a phase has 1 / (1 - r) times its steps: 30 % more
    ewc_strength=100_000.0,
)
FIVE = Stream(
    "five phases",
    tuple(Phase(f"tools_{i + 1}", 200, 200 * i, 400, 100) for i in range(5)),
    buffer_size=800,
    replay_ratio=0.23,
    ewc_strength=100.0,
)


def records(phase: Phase, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Different requests for one call each, in a fixed order."""
    world, index, seen, found = ToolWorld(phase.num_tools, first_tool=phase.first_tool), 0, set(), []
    while len(found) < phase.num_train + phase.num_test:
        task, index = world.task("train", index), index + 1
        if task.kind != "single" or len(task.calls) != 1 or task.instruction in seen:
            continue
        if sum(len(tokenizer.encode(str(value)).ids) for value in task.calls[0].arguments.values()) > _LONGEST:
            continue
        seen.add(task.instruction)
        request, answer = task.conversation()["messages"][1:3]
        call = answer["content"][answer["content"].index("<function=") :]
        messages = [request, {"role": "assistant", "content": call}]
        found.append({"messages": messages, "source": phase.name, "tool": task.calls[0].name})
    return found


def write_data(stream: Stream, folder: Path) -> dict[str, int]:
    """A file to train on and one to test on of every phase; how many tools each phase's records have."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(TOKENIZER_DIR / "tokenizer.json"))
    num_tools = {}
    for phase in stream.phases:
        found = records(phase, tokenizer)
        num_tools[phase.name] = len(Counter(record["tool"] for record in found))
        for kind, part in (("train", found[: phase.num_train]), ("test", found[phase.num_train :])):
            lines = [json.dumps({"messages": record["messages"], "source": record["source"]}) for record in part]
            (folder / f"{phase.name}_{kind}.jsonl").write_text("\n".join(lines) + "\n")
    return num_tools


def dataset_at(key: str, *files: Path) -> list[str]:
    """Overrides that put files in the place of the config's data set under `key`."""
    names = ",".join(map(str, files))
    gone = [f"~{key}.{name}" for name in ("split", "num_tasks", "num_tools")]
    return [f"{key}._component_=torchtune_agent.data.AgentSFTDataset", f"{key}.data_files=[{names}]", *gone]


def train(recipe: str, config: str, out: Path, overrides: Sequence[str], seed: int) -> float:
    """Run a recipe in a process of its own; returns the processor seconds it took."""
    arguments = ["--config", str(ROOT / "configs" / f"{config}.yaml"), f"output_dir={out}", f"seed={seed}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    scratch = [f"checkpointer.seed={seed}"]
    process = multiprocessing.get_context("fork").Process(
        target=_run, args=(recipe, [*arguments, *scratch, *_COMMON, *overrides], out.with_suffix(".log"))
    )
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"{recipe} failed: see {out.with_suffix('.log')}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _run(recipe: str, arguments: list[str], log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    path = ROOT / "recipes" / f"{recipe}.py"
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


def measured(out: Path) -> dict[str, Any]:
    """Of a finished run: accuracy on every phase's held-out requests, and its steps."""
    rows = [json.loads(line) for line in (out / "logs" / "by_source.jsonl").read_text().splitlines()]
    of_tests = [row for row in rows if row["split"] == "val"]
    last = max(row["step"] for row in of_tests)
    final = [row for row in of_tests if row["step"] == last]
    found: dict[str, Any] = {
        "steps": last,
        "exact": {row["source"]: row["exact"] for row in final},
        "name_exact": {row["source"]: row["name_exact"] for row in final},
    }
    matrix = out / "continual" / "forgetting.json"
    if matrix.exists():
        found["matrix"] = json.loads(matrix.read_text())
    return found


class Experiment:
    """One stream with one seed. Every result is kept in `folder`, and read from there when it is asked for again."""

    def __init__(self, stream: Stream, seed: int, folder: Path, data: Path) -> None:
        self._stream, self._seed, self._folder, self._data = stream, seed, folder, data
        folder.mkdir(parents=True, exist_ok=True)

    def _once(self, name: str, recipe: str, config: str, overrides: Sequence[str]) -> dict[str, Any]:
        kept = self._folder / f"{name}.json"
        if not kept.exists():
            out = self._folder / name
            started = time.time()
            seconds = train(recipe, config, out, overrides, self._seed)
            found = measured(out) | {"cpu_seconds": round(seconds, 1), "seconds": round(time.time() - started, 1)}
            kept.write_text(json.dumps(found))
            print(
                f"{self._stream.name}, seed {self._seed}, {name}: {found['exact']}, {found['steps']} steps", flush=True
            )
        return json.loads(kept.read_text())

    def has(self, name: str) -> bool:
        return (self._folder / f"{name}.json").exists()

    def result(self, name: str) -> dict[str, Any]:
        return self.joint() if name == "joint" else self.strategy(name)

    def joint(self) -> dict[str, Any]:
        """Everything at once, every record as often as in the stream."""
        train, test = self._files("train"), self._files("test")
        overrides = [*dataset_at("dataset", *train), *dataset_at("dataset_val", *test), f"epochs={EPOCHS}"]
        return self._once(
            "joint", "agent_sft_distributed", "tiny/agent_sft", [*overrides, "run_val_every_n_steps=null"]
        )

    def _files(self, kind: str) -> list[Path]:
        return [self._data / f"{phase.name}_{kind}.jsonl" for phase in self._stream.phases]

    def strategy(self, name: str) -> dict[str, Any]:
        """Phase after phase. What strategies have in common is trained once: the first phase of all but `ssis`, which
        looks at every sample that arrives, goes on from the checkpoint that `finetune` left of it."""
        stream = self._stream
        strategy, ratio = REPLAY_HALF.get(name, (name, stream.replay_ratio))
        first_steps = EPOCHS * math.ceil(stream.phases[0].num_train / ROWS)
        overrides = [
            f"continual.strategy={strategy}",
            f"continual.epochs_per_phase={EPOCHS}",
            f"continual.buffer_size={stream.buffer_size}",
            f"continual.replay_ratio={ratio}",
            f"continual.ewc_strength={stream.ewc_strength}",
            f"stream=[{','.join(phase.name for phase in stream.phases)}]",
            "~phases.old_tools",
            "~phases.new_tools",
        ]
        for phase in stream.phases:
            for key, kind in (("dataset", "train"), ("dataset_val", "test")):
                at = f"phases.{phase.name}.{key}"
                file = self._data / f"{phase.name}_{kind}.jsonl"
                overrides += [f"{at}._component_=torchtune_agent.data.AgentSFTDataset", f"{at}.data_files={file}"]
        if name == "finetune":
            # The others go on from this one, and later phases must not push it out
            overrides += [f"save_every_n_steps={first_steps}", "keep_last_n_checkpoints=100"]
        elif name != "ssis":
            self.strategy("finetune")
            kept = self._folder / "finetune" / "checkpoints" / f"step_{first_steps}"
            overrides += [f"resume_from_checkpoint={kept}", "resume_override=[continual]"]
        return self._once(name, "agent_replay_distributed", "tiny/agent_replay", overrides)


def versions() -> dict[str, str]:
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {"commit": commit.stdout.strip(), "torch": torch.__version__, "machine": platform.machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "experiment_continual")
    parser.add_argument("--json", type=Path, default=ROOT / "tests/benchmarks/results/continual.json")
    parser.add_argument("--report", type=Path, default=ROOT / "docs/experiments/continual.md")
    parser.add_argument("--made", action="store_true", help="train nothing: write what DIR has")
    parser.add_argument("--streams", nargs="+", default=[TWO.name, FIVE.name])
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found: dict[str, Any] = {"versions": versions(), "streams": {}}
    for stream in (TWO, FIVE):
        if stream.name not in options.streams:
            continue
        folder = options.work / stream.name.replace(" ", "_")
        num_tools = write_data(stream, folder / "data")
        phases = [{**vars(phase), "tools_in_records": num_tools[phase.name]} for phase in stream.phases]
        runs: list[dict[str, Any]] = []
        kept = {**vars(stream), "phases": phases, "epochs": EPOCHS, "rows_per_step": ROWS, "runs": runs}
        found["streams"][stream.name] = kept
        seeds = [Experiment(stream, seed, folder / f"seed_{seed}", folder / "data") for seed in range(options.seeds)]
        for names in STAGES:
            for seed, experiment in enumerate(seeds):
                wanted = [name for name in names if experiment.has(name) or not options.made]
                runs += [{"seed": seed, "strategy": name, **experiment.result(name)} for name in wanted]
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(found, indent=1))
                write_report(found, options.report)


if __name__ == "__main__":
    main()
