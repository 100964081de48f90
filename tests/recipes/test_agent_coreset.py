"""agent_coreset_distributed, as users run it: score, select, train; select only, from scores that exist; mistakes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.training_runs import launch
from torchtune_agent.errors import UserError
from torchtune_agent.metrics import read_rows
from torchtune_agent.selection.coreset import CoresetSettings

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "agent_coreset_distributed.py"
SMALL = (
    "dataset.num_tasks=60",
    "dataset.num_tools=30",
    "dataset_val.num_tasks=8",
    "dataset_val.num_tools=30",
    "model.num_layers=1",
    "model.embed_dim=32",
    "model.intermediate_dim=32",
    "coreset.min_per_tool=0",
    "coreset.batches_per_part=2",
)


def run(output_dir: Path, *overrides: str, ranks: int) -> subprocess.CompletedProcess[str]:
    config = ROOT / "configs" / "tiny" / "agent_coreset.yaml"
    ranks_of = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable, *ranks_of, RECIPE, "--config", config, f"output_dir={output_dir}", *SMALL, *overrides]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("coreset") / "run"
    done = run(path, "log_sample_losses=True", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "18 of 60 samples by facility_location" in done.stderr
    return path


def selected(path: Path) -> list[str]:
    return [one["id"] for one in json.loads((path / "coreset" / "selection.json").read_text())["selected"]]


def test_what_was_selected_is_trained_and_nothing_else(trained: Path) -> None:
    from pyarrow import parquet

    ledger = parquet.read_table(trained / "logs" / "sample_losses")
    assert set(ledger["sample"].to_pylist()) == set(selected(trained)) and len(selected(trained)) == 18
    assert len([row for row in read_rows(trained / "logs" / "metrics.jsonl") if "loss" in row]) == 3  # steps of 8
    assert "<function=" in (trained / "coreset" / "selection.html").read_text().replace("\\u003c", "<")


def test_scores_that_exist_select_the_same_without_training(trained: Path, tmp_path: Path) -> None:
    scores = f"coreset.scores_from={trained / 'coreset' / 'scores.parquet'}"
    own = (*SMALL[:2], scores, "coreset.dedup_similarity=0.95", "coreset.only_select=True")
    left = launch(tmp_path, *own, size=1, recipe="agent_coreset_distributed")
    assert left.codes == [0], left.output
    assert selected(left.out) == selected(trained)
    assert not (left.out / "checkpoints").exists() and not (left.out / "coreset" / "scores").exists()


def test_mistakes_are_said_once_and_early(tmp_path: Path) -> None:
    options = ("coreset.strategy=random", "coreset.target_size=3")
    left = launch(tmp_path, *options, size=1, recipe="agent_coreset_distributed")
    assert left.codes == [1] and "fewer than a step needs" in left.output and "Traceback" not in left.output
    for overrides, message in (
        ({"stratgy": "random"}, "coreset.stratgy: unknown config key. Did you mean 'strategy'?"),
        ({"strategy": "rondom"}, "coreset.strategy=rondom: no such strategy. Did you mean 'random'?"),
        ({"loss_ratio": "most"}, "coreset.loss_ratio='most'"),
        ({"target_size": "0%"}, "coreset.target_size=0%: must be above 0%"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            CoresetSettings.from_config(OmegaConf.create(overrides)).options(0)
