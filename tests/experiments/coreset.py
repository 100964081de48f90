"""Which selection is worth what: every strategy at several sizes, in clean, repetitive and spoiled pools, in ToolWorld.

    make experiment-coreset        # a quarter of an hour of one CPU core; writes docs/experiments/coreset.md
    python tests/experiments/coreset.py [--quick] [--json PATH] [--report FOLDER]

Every number is of the real recipe, in this process. A small model is first trained on other conversations, so that its
losses mean something; all runs of a seed start from it. They train one epoch each, so a part of the pool costs its part
of the time: that is what it is for. Runs on equally many samples take equally many steps.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks import turns  # noqa: E402
from tests.experiments.coreset_report import write_report  # noqa: E402
from torchtune_agent.metrics import read_rows  # noqa: E402
from torchtune_agent.toolworld import ToolWorld  # noqa: E402
from torchtune_agent.training import progress, run_recipe  # noqa: E402

NAME = "agent_coreset_distributed"
STRATEGIES = ("random", "loss_topk", "diversity", "hybrid", "uncertainty", "ssis", "facility_location")
SHARES = (10, 30, 50)
POOLS = ("clean", "duplicated", "corrupted")
GUARDS = {"duplicated": {"dedup_similarity": 0.9}, "corrupted": {"loss_cap_quantile": 0.8}}
GUARDED_SHARE = 30
SIZES = {"pool": 240, "warm": 300, "validation": 48, "tools": 60, "warm_epochs": 3, "seeds": 3}
QUICK = {"pool": 60, "warm": 20, "validation": 12, "tools": 30, "warm_epochs": 1, "seeds": 1}
MEASURES = ("val_loss", "val_tool_call_nll", "val_arg_value_accuracy", "val_tool_name_exact", "val_tool_call_exact")


def config(out: Path, data: Path, validation: Path, weights: Path | None, seed: int, sizes: dict[str, int]) -> Any:
    """tiny/agent_coreset with a smaller model, on files."""
    cfg: Any = OmegaConf.load(ROOT / "configs" / "tiny" / "agent_coreset.yaml")
    cfg.output_dir, cfg.seed = str(out), seed
    cfg.model |= {"num_layers": 2, "embed_dim": 96, "intermediate_dim": 256}
    cache = str(data.parent / "tokens")
    component = "torchtune_agent.data.AgentSFTDataset"
    cfg.dataset = {"_component_": component, "data_files": str(data), "cache_dir": cache}
    cfg.dataset_val = {"_component_": component, "data_files": str(validation), "cache_dir": cache}
    cfg.batch_size, cfg.batch_size_val = 4, 16
    cfg.run_val_every_n_steps, cfg.metric_logger = None, None
    cfg.log_every_n_steps = cfg.log_detailed_metrics_every_n_steps = 1000
    cfg.checkpointer.seed = seed
    cfg.lr_scheduler.num_warmup_steps = 5
    if weights is not None:
        cfg.checkpointer = {
            "_component_": "torchtune.training.FullModelTorchTuneCheckpointer",
            "checkpoint_dir": str(weights),
            "checkpoint_files": ["model.safetensors"],
            "model_type": "QWEN2",
            "output_dir": str(out / "weights"),
        }
        cfg.optimizer.lr = 1e-3
    return cfg


def train(cfg: Any, coreset: dict[str, Any]) -> float:
    """One run of the recipe; the seconds of this process's CPU time that it took."""
    cfg.coreset = coreset
    out = Path(cfg.output_dir)
    out.mkdir(parents=True)
    spec = importlib.util.spec_from_file_location(NAME, ROOT / "recipes" / f"{NAME}.py")
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    began = time.process_time()
    with (out / "log.txt").open("w") as log, contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
        code = run_recipe(NAME, cfg, recipe.build, sections=("coreset", "curriculum"))
    if code:
        raise SystemExit((out / "log.txt").read_text()[-3000:])
    return time.process_time() - began


def measured(out: Path) -> dict[str, float]:
    """What the run came to on the validation data."""
    rows = [row for row in read_rows(out / "logs" / "metrics.jsonl") if "val_loss" in row]
    return {name: rows[-1][name] for name in MEASURES}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def duplicated(records: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """Six tenths of the pool are copies of a tenth of it."""
    unique = records[: len(records) * 4 // 10]
    popular = unique[: len(records) // 10]
    made = unique + [popular[i % len(popular)] for i in range(len(records) - len(unique))]
    rng.shuffle(made)
    return made


def corrupted(records: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """In a fifth of the pool the agent answers somebody else's request, or in garbled words."""
    bad = rng.sample(range(len(records)), len(records) // 5)
    made: list[dict[str, Any]] = json.loads(json.dumps(records))
    for place, row in enumerate(bad):
        made[row]["spoiled"] = True
        if place % 2:
            made[row]["messages"][2:] = records[bad[(place + 2) % len(bad)]]["messages"][2:]
            continue
        for message in made[row]["messages"]:
            if message["role"] == "assistant":
                message["content"] = " ".join(map(lambda word: _garbled(word, rng), message["content"].split(" ")))
    return made


def _garbled(word: str, rng: random.Random) -> str:
    if any(mark in word for mark in "<>=/\n") or rng.random() < 0.5:
        return word
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in word)


def make_data(folder: Path, seed: int, sizes: dict[str, int]) -> dict[str, Path]:
    """The files of a seed: what the model is warmed up on, the three pools, and what it is validated on."""
    world = ToolWorld(num_tools=sizes["tools"], seed=0)

    def tasks(split: str, first: int, number: int) -> list[dict[str, Any]]:
        return [world.task(split, first + i).conversation() for i in range(number)]

    rng = random.Random(seed)
    clean = tasks("train", 10_000 * seed, sizes["pool"])
    folder.mkdir(parents=True)
    pools = {"clean": clean, "duplicated": duplicated(clean, rng), "corrupted": corrupted(clean, rng)}
    found = {name: write(folder / f"{name}.jsonl", records) for name, records in pools.items()}
    found["warm"] = write(folder / "warm.jsonl", tasks("train", 10_000 * seed + 5_000, sizes["warm"]))
    found["validation"] = write(folder / "validation.jsonl", tasks("validation", 0, sizes["validation"]))
    return found


def runs_of(pool: str) -> Iterator[tuple[str, int, bool]]:
    """Strategy, share and whether the pool's guard rail is up."""
    yield "full", 100, False
    for strategy in STRATEGIES:
        for share in SHARES:
            yield strategy, share, False
        if pool in GUARDS:
            yield strategy, GUARDED_SHARE, True


def experiment(folder: Path, sizes: dict[str, int]) -> list[dict[str, Any]]:
    rows = []
    for seed in range(sizes["seeds"]):
        data = make_data(folder / f"data_{seed}", seed, sizes)
        warm = folder / f"warm_{seed}"
        cfg = config(warm, data["warm"], data["validation"], None, seed, sizes)
        cfg.epochs, cfg.batch_size = sizes["warm_epochs"], 8
        train(cfg, {"strategy": "random", "target_size": "100%"})
        before = measured(warm)
        weights = warm / "weights" / f"epoch_{cfg.epochs - 1}"
        for pool in POOLS:
            scored = folder / f"scored_{pool}_{seed}"
            cfg = config(scored, data[pool], data["validation"], weights, seed, sizes)
            scoring = train(cfg, {"strategy": "hybrid", "target_size": "30%", "only_select": True})
            spoiled = {
                f"{data[pool]}:{number}"
                for number, line in enumerate(data[pool].read_text(encoding="utf-8").splitlines(), start=1)
                if "spoiled" in json.loads(line)
            }
            for strategy, share, guarded in runs_of(pool):
                out = folder / f"{pool}_{strategy}_{share}_{guarded}_{seed}"
                cfg = config(out, data[pool], data["validation"], weights, seed, sizes)
                coreset = {"strategy": "random" if strategy == "full" else strategy, "target_size": f"{share}%"}
                coreset |= {"scores_from": str(scored / "coreset" / "scores.parquet")}
                seconds = train(cfg, coreset | (GUARDS[pool] if guarded else {}))
                chosen = json.loads((out / "coreset" / "selection.json").read_text())
                row = {"seed": seed, "pool": pool, "strategy": strategy, "share": share, "guarded": guarded}
                row |= {"seconds": seconds, "scoring_seconds": scoring, "before": before["val_loss"]}
                row |= {"mean_tokens": chosen["length"]["mean_of_selected"], "samples": len(chosen["selected"])}
                row |= {"spoiled": sum(one["id"] in spoiled for one in chosen["selected"]), **measured(out)}
                rows.append(row)
                with (folder / "runs.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(
                    f"seed {seed} {pool:10} {strategy:11} {share:3}% {'guarded' if guarded else '':7} "
                    f"loss {row['val_loss']:.4f} from {before['val_loss']:.4f}, {seconds:5.1f} s",
                    flush=True,
                )
                shutil.rmtree(out)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="one seed of little data: shows that it runs, not who wins"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--report", type=Path, help="a folder for coreset.md and coreset.png")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    progress.plot_classes = progress.write_report = lambda *_, **__: False  # nobody looks at those of 200 runs
    sizes = QUICK if options.quick else SIZES
    print(turns.hardware(), flush=True)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        rows = experiment(Path(folder), sizes)
    found = {"hardware": turns.hardware(), "cpu_seconds": time.process_time() - began, "sizes": sizes, "runs": rows}
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))
    return write_report(found, options.report)


if __name__ == "__main__":
    sys.exit(main())
