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
    "log_detailed_metrics_every_n_steps=2",
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

    replayed = [row for row in rows if row.get("phase") == 2.0]
    assert {row["replay_num_samples"] for row in replayed} == {1.0, 2.0}
    assert any({"replay_loss", "replay_loss_old_tools", "new_loss"} <= row.keys() for row in replayed)
    page = (tmp_path / "first/logs/report.html").read_text()
    assert '"title":"Calls written exactly, phase by phase","head":["trained up to","old_tools","new_tools"]' in page
    assert (tmp_path / "first/continual/forgetting.png").stat().st_size > 5000

    saved = tmp_path / "first/continual/replay_buffer.pt"
    buffer = ReplayBuffer(16, seed=0)
    buffer.load_state_dict(torch.load(saved, weights_only=True))
    assert buffer.num_offered == 64 and all("tokens" in sample for sample in buffer.samples())
    # The next month: other tools, adapters only, one rank, and the buffer from the first run's last checkpoint
    later = (
        "stream=[new_tools]",
        "phases.new_tools.dataset.first_tool=100",
        "phases.new_tools.dataset_val.first_tool=100",
    )
    adapter = ("adapter.rank=2", "adapter.alpha=4", "continual.strategy=replay+ewc")
    carried = f"continual.replay_from={tmp_path / 'first/checkpoints/step_9'}"
    second = run(tmp_path / "second", carried, *later, *adapter)
    assert second.returncode == 0, second.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "second/logs/metrics.jsonl").read_text().splitlines()]
    assert any("replay_loss_earlier_runs" in row for row in rows)
    left = torch.load(tmp_path / "second/continual/replay_buffer.pt", weights_only=True)
    assert json.loads(left["facts"])["num_offered"] == 64 + 24


def test_a_mistake_is_named_before_the_first_step(tmp_path: Path) -> None:
    done = run(tmp_path / "out", "continual.buffer_size=3")
    assert done.returncode != 0
    assert "error: buffer_size=3: is smaller than a step's 4 rows" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out/checkpoints").exists()
