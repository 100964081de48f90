"""How far agent_plan's memory is from what a step really takes, on a CPU.

    python tests/benchmarks/bench_plan.py [--quick] [--json PATH]

Each case is planned for one device, and then trained for two steps in a process of its own: the real recipe, with
weights from nowhere. Measured is the most memory the process held during the second step (VmHWM, set back as the step
begins), less what it held before there was a model. What a plan adds for CUDA is left out on both sides. Ends with a
non-zero status when the target is missed.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from torchtune_agent._tune import config_path, recipe_path  # noqa: E402
from torchtune_agent.planning.memory import Sizes  # noqa: E402
from torchtune_agent.planning.plan import Case, PlanOptions, read_data  # noqa: E402
from torchtune_agent.training import Settings, Trainer, parameter_setup, run_recipe  # noqa: E402
from torchtune_agent.training.gpus import GPUS  # noqa: E402

TOLERANCE = 0.15
SIZES = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "intermediate_dim", "vocab_size")
SMALLEST, SMALL, LARGE = (1, 64, 2, 2, 128, 2048), (4, 384, 6, 2, 1024, 16384), (8, 768, 12, 4, 2048, 32768)
CASES: dict[str, list[str]] = {
    "full": [],
    "full, activation checkpointing": ["enable_activation_checkpointing=True"],
    "full, optimizer in backward": ["optimizer_in_bwd=True", "clip_grad_norm=null"],
    "full, two micro-batches": ["gradient_accumulation_steps=2"],
    "LoRA": ["adapter.rank=16"],
    "LoRA, activation checkpointing": ["adapter.rank=16", "enable_activation_checkpointing=True"],
    "QLoRA": ["adapter.rank=16", "adapter.quantize_base=True"],
    "DoRA": ["adapter.rank=16", "adapter.kind=dora"],
}


def config_of(folder: Path, overrides: list[str], *, quick: bool) -> DictConfig:
    """Two steps of a decoder whose output is large for its size, as those of real models are; all samples are alike."""
    sample = {"messages": [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "yes " * 300}]}
    (folder / "data.jsonl").write_text("\n".join([json.dumps(sample)] * 16))
    base: Any = OmegaConf.load(config_path("tiny/agent_sft"))
    for key in ("dataset_val", "run_val_every_n_steps", "batch_size_val"):
        del base[key]
    base.dataset = {
        "_component_": "torchtune_agent.data.AgentSFTDataset",
        "source": "json",
        "data_files": str(folder / "data.jsonl"),
    }
    base.model.update(dict(zip(SIZES, SMALL if quick else LARGE, strict=True)))
    base.metric_logger = {"_component_": "torchtune.training.metric_logging.StdoutLogger"}
    base.output_dir = str(folder / "out")
    base.max_steps_per_epoch = 2
    cfg = OmegaConf.merge(base, OmegaConf.from_dotlist(overrides))
    assert isinstance(cfg, DictConfig)
    return cfg


def planned(cfg: DictConfig) -> float:
    """The bytes that agent_plan reckons one device's step takes."""
    settings = Settings.from_config(cfg)
    data, reason = read_data(cfg, settings)
    assert data is not None, reason
    sizes = Sizes.of(parameter_setup(cfg).build(cfg, settings))
    options = PlanOptions(num_gpus=1)
    return Case(cfg, settings, options, GPUS["H100"], data.longest, data.share_trained, sizes).memory().total


def measured(config: Path) -> int:
    """The bytes that the second step of a run really took."""
    command = [sys.executable, __file__, "--child", str(config)]
    # What is freed is given back, and does not count again: the C library else keeps up to 900 MiB of it for later.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "100000"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-3000:])
    return int(done.stdout.splitlines()[-1])


def run_child(config: Path) -> int:
    """Trains twice in this process: next to nothing, so that everything a run loads is there, and what is measured."""
    cfg: Any = OmegaConf.load(config)
    seen: dict[str, int] = {}
    recipe = runpy.run_path(str(recipe_path("agent_sft_distributed")))
    make, step = Trainer.__init__, Trainer._train_step

    def made(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        seen["before"] = _memory("VmRSS")
        make(trainer, *args, **kwargs)

    def stepped(trainer: Trainer, micro_batches: Any) -> None:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        step(trainer, micro_batches)
        seen["at most"] = _memory("VmHWM")

    Trainer.__init__, Trainer._train_step = made, stepped  # pyright: ignore
    warm = cfg.copy()
    warm.model.update(dict(zip(SIZES, SMALLEST, strict=True)))
    warm.output_dir = f"{cfg.output_dir}_warm"
    code = run_recipe("agent_sft_distributed", warm, recipe["build"])
    code = code or run_recipe("agent_sft_distributed", cfg, recipe["build"])
    print(seen["at most"] - seen["before"])
    return code


def _memory(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return run_child(options.child)
    found = {}
    for name, overrides in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            cfg = config_of(Path(folder), overrides, quick=options.quick)
            OmegaConf.save(cfg, Path(folder) / "config.yaml")
            plan, real = planned(cfg), measured(Path(folder) / "config.yaml")
        found[name] = {"planned": plan, "measured": real, "ratio": plan / real}
        print(
            f"{name:<32} planned {plan / 2**20:>7,.0f} MiB, measured {real / 2**20:>7,.0f} MiB: {plan / real - 1:+.1%}"
        )
    worst = max(abs(case["ratio"] - 1) for case in found.values())
    print(f"\nlargest error {worst:.1%}   target <= {TOLERANCE:.0%}   {'ok' if worst <= TOLERANCE else 'MISSED'}")
    if options.json:
        versions = {"torch": torch.__version__, "machine": platform.machine()}
        options.json.write_text(json.dumps({**versions, "quick": options.quick, "cases": found}, indent=2) + "\n")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
