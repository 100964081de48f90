"""`agent_replay_distributed` as users run it: two phases on two ranks, then a run that goes on with the buffer."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from tests import tune
from torchtune_agent.continual import ReplayBuffer

SMALL = (
    "phases.old_tools.dataset.num_tasks=40",
    "phases.new_tools.dataset.num_tasks=24",
    "phases.old_tools.dataset_val.num_tasks=4",
    "phases.new_tools.dataset_val.num_tasks=4",
    "model.num_layers=1",
    "model.embed_dim=32",
    "model.intermediate_dim=64",
    "continual.buffer_size=16",
    "continual.ewc_samples=4",
)


def run(folder: Path, *overrides: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    several = ["--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = ["run", *several, "agent_replay_distributed", "--config", "tiny/agent_replay"]
    return tune.run(*command, f"output_dir={folder}", *SMALL, *overrides, cwd=folder.parent)


@pytest.mark.distributed
@pytest.mark.slow
def test_phases_are_trained_tested_and_carried_on(tmp_path: Path) -> None:
    first = run(tmp_path / "first", "continual.strategy=replay+ewc", ranks=2)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "backward transfer" in first.stderr
    matrix = json.loads((tmp_path / "first/continual/forgetting.json").read_text())
    assert matrix["phases"] == ["old_tools", "new_tools"] and len(matrix["scores"]) == 2
    rows = [json.loads(line) for line in (tmp_path / "first/logs/metrics.jsonl").read_text().splitlines()]
    assert max(row.get("step", 0) for row in rows) == 5 + 4  # 40 rows, then 24 new ones and 7 replayed, 8 a step

    saved = tmp_path / "first/continual/replay_buffer.pt"
    buffer = ReplayBuffer(16, seed=0)
    buffer.load_state_dict(torch.load(saved, weights_only=True))
    assert buffer.num_offered == 64 and all("tokens" in sample for sample in buffer.samples())
    second = run(tmp_path / "second", f"continual.replay_from={saved}", "continual.strategy=replay")
    assert second.returncode == 0, second.stderr[-2000:]


def test_a_mistake_is_named_before_the_first_step(tmp_path: Path) -> None:
    done = run(tmp_path / "out", "continual.replay_ratio=1")
    assert done.returncode != 0
    assert "error: replay_ratio=1.0: must be 0 or more and less than 1" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out/checkpoints").exists()
