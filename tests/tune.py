"""Runs the real `tune` in a subprocess, on a run small enough for a test."""

import os
import subprocess
import sys
from pathlib import Path

TUNE = Path(sys.executable).with_name("tune")

# tiny/agent_sft made smaller still: a few steps of a one-layer model
SMALL = (
    "model.num_layers=1",
    "model.embed_dim=32",
    "model.intermediate_dim=64",
    "dataset.num_tasks=24",
    "dataset.num_tools=40",
    "dataset_val.num_tasks=8",
    "dataset_val.num_tools=40",
    "batch_size=2",
    "log_detailed_metrics_every_n_steps=2",
    "run_val_every_n_steps=4",
)

# The training data of tests.faulty, and what they need to be found
FAULTY = ("dataset=tests.faulty.dataset", "trusted_components=[tests]")
FAULTY_ENV = {"PYTHONPATH": str(Path(__file__).parent.parent)}

FROM_FILE = (
    "dataset=torchtune_agent.data.AgentSFTDataset",
    "~dataset.split",
    "~dataset.num_tasks",
    "~dataset.num_tools",
)


def run(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`tune ARGUMENTS` in folder `cwd`."""
    full_env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(
        [str(TUNE), *arguments], cwd=cwd, env=full_env, capture_output=True, text=True, timeout=240, check=False
    )


def train(
    *overrides: str, cwd: Path, processes: int = 2, config: str = "tiny/agent_sft", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`tune run agent_sft_distributed` with `overrides`; writes to `cwd`/out."""
    launch = ["--nproc_per_node", str(processes)] if processes > 1 else []
    command = ["run", *launch, "agent_sft_distributed", "--config", config, f"output_dir={cwd / 'out'}", *overrides]
    return run(*command, cwd=cwd, env=env)
