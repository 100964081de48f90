"""A run over a stream that is killed and resumed, against the same run without a break: buffer, elastic weights, scores
and forgetting included."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.training_runs import ROOT, Left, Started, digest, launch
from torchtune_agent.metrics import read_rows
from torchtune_agent.toolworld import ToolWorld

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# Phases of 3 steps (the last one short) twice, and of 2 or 3 twice, eight rows each
SMALL = (
    "phases.old_tools.dataset.num_tasks=22",
    "phases.new_tools.dataset.num_tasks=14",
    "phases.old_tools.dataset_val.num_tasks=4",
    "phases.new_tools.dataset_val.num_tasks=4",
    "model.num_layers=1",
    "model.embed_dim=32",
    "model.intermediate_dim=64",
    "continual.buffer_size=12",
    "continual.ewc_samples=4",
    "continual.epochs_per_phase=2",
    "log_detailed_metrics_every_n_steps=2",
    "metric_logger=torchtune.training.metric_logging.StdoutLogger",
    "~metric_logger.log_dir",
    "save_every_n_steps=1",
    "resume_from_checkpoint=auto",
)


def run(folder: Path, *overrides: str, size: int = 2, kill: str | None = None) -> Left:
    config = ROOT / "configs/tiny/agent_replay.yaml"
    return launch(
        folder, *overrides, size=size, kill=kill, recipe="agent_replay_distributed", config=config, small=SMALL
    )


def left_behind(run: Left) -> tuple[dict, str, str]:
    """The forgetting matrix, the buffer for the next run, and what the last checkpoint says of data and objective."""
    matrix = json.loads((run.out / "continual/forgetting.json").read_text())
    buffer = torch.load(run.out / "continual/replay_buffer.pt", weights_only=True)
    last = torch.load(run.out / f"checkpoints/step_{run.saved[0]}/run.pt", weights_only=True)
    return matrix, digest(buffer), digest(last["parts"])


@pytest.mark.parametrize(
    ("options", "size", "kills"),
    [
        # Where the first phase has just ended: the elastic weights are made of it after the checkpoint
        (["continual.strategy=replay+ewc", "continual.selection_strategy=class_loss"], 2, ["step:7:1"]),
        (["continual.strategy=ssis"], 1, ["step:9:0"]),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    tmp_path: Path, options: list[str], size: int, kills: list[str]
) -> None:
    whole = run(tmp_path / "whole", *options, size=size)
    assert whole.codes == [0] * size, whole.output
    for kill in kills:
        killed = run(tmp_path / "killed", *options, size=size, kill=kill)
        assert killed.codes[int(kill[-1])] == -9, killed.output
    resumed = run(tmp_path / "killed", *options, size=size)
    assert resumed.codes == [0] * size, resumed.output
    assert resumed.digests == whole.digests
    assert resumed.samples == whole.samples
    assert resumed.rows == whole.rows
    assert left_behind(resumed) == left_behind(whole)
    replayed = [row for row in whole.rows if row.get("replay_num_samples")]
    assert replayed and all(row["phase"] == 2 for row in replayed)
    assert any("replay_loss_old_tools" in row for row in replayed)


STREAM = ROOT / "configs/tiny/agent_stream.yaml"
LIVE = (
    "model.num_layers=1",
    "model.embed_dim=32",
    "model.intermediate_dim=64",
    "dataset_val.num_tasks=4",
    "continual.buffer_size=12",
    "continual.selection_strategy=prioritized",
    "continual.highest_replay_ratio=0.5",
    "arrivals.max_steps=12",
    "arrivals.patience_seconds=0.5",
    "arrivals.idle_seconds=0.5",
    "metric_logger=torchtune.training.metric_logging.StdoutLogger",
    "~metric_logger.log_dir",
    "save_every_n_steps=1",
    "resume_from_checkpoint=auto",
)


def test_arrivals_are_trained_once_however_the_run_is_broken_off_and_shared_out(tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    records = [json.dumps(record) for record in ToolWorld(20).conversations("train", 26)]
    (inbox / "a.jsonl").write_text("\n".join([*records[:12], "not json", *records[12:]]) + "\n")

    def live(name: str, *overrides: str, size: int = 1, kill: str | None = None) -> Left:
        options = (f"arrivals.path={inbox}", *overrides)
        recipe = "agent_replay_distributed"
        return launch(tmp_path / name, *options, size=size, kill=kill, recipe=recipe, config=STREAM, small=LIVE)

    whole = live("whole")
    assert whole.codes == [0], whole.output
    trained = [sample for samples in whole.samples.values() for sample in samples]
    assert (
        len(set(trained)) == 26 and len(trained) >= 26 + 8
    )  # every fourth row is replayed, and more where losses rise
    assert all(0.25 <= row["replay_ratio"] <= 0.5 for row in whole.rows if "replay_ratio" in row)
    assert whole.rows[-2]["stream_bad_records"] == 1
    assert "byte" in (whole.out / "logs/quarantine_arrivals.jsonl").read_text()
    killed = live("killed", kill="step:5:0")
    assert killed.codes == [-9], killed.output
    resumed = live("killed")
    assert resumed.codes == [0], resumed.output
    shared = live("shared", "batch_size=2", size=2)
    assert shared.codes == [0, 0], shared.output
    assert resumed.samples == shared.samples == whole.samples
    assert resumed.digests == whole.digests
    kept = [
        torch.load(run.out / f"checkpoints/step_{run.saved[0]}/run.pt")["parts"]["data"] for run in (whole, resumed)
    ]
    assert digest(kept[0]) == digest(kept[1])


def test_a_run_that_waits_for_records_saves_and_ends_when_it_is_asked_to(tmp_path: Path) -> None:
    inbox, folder = tmp_path / "inbox.jsonl", tmp_path / "run"
    records = [json.dumps(record) + "\n" for record in ToolWorld(20).conversations("train", 12)]
    inbox.write_text("".join(records[:8]))
    options = (f"arrivals.path={inbox}", "batch_size=2", "run_val_every_n_steps=null")
    recipe = {"RECIPE": "agent_replay_distributed"}
    waiting = Started(folder, *options, "arrivals.idle_seconds=600", env=recipe, config=STREAM, small=LIVE)
    metrics, deadline = folder / "out/logs/metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and any(row.get("stream_samples") == 8 for row in read_rows(metrics))):
        assert waiting.is_running and time.monotonic() < deadline, waiting.finish(0).output
        time.sleep(0.1)
    time.sleep(1)  # the step that has logged is over, and no other begins
    pid = waiting.ranks[1].pid
    assert pid is not None and waiting.is_running
    os.kill(pid, signal.SIGTERM)
    asked = waiting.finish(60)
    assert asked.codes == [75, 75], asked.output
    with inbox.open("a") as file:
        file.writelines(records[8:])
    resumed = launch(folder, *options, recipe=recipe["RECIPE"], config=STREAM, small=LIVE)
    assert resumed.codes == [0, 0], resumed.output
    trained = {sample for samples in resumed.samples.values() for sample in samples}
    assert len(trained) == 12
