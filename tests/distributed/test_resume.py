"""Runs that are killed and resumed, against the same run without a break: not one byte may tell."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.training_runs import LAST_STEP, Left, launch

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

DROPOUT = "model.attn_dropout=0.1"  # so that a lost random state shows
AUTO = "resume_from_checkpoint=auto"


def assert_equal(run: Left, whole: Left) -> None:
    assert run.digests == whole.digests and len(run.digests) == 2
    assert run.samples == whole.samples
    assert run.rows == whole.rows
    assert run.tables == whole.tables
    assert run.ledger == whole.ledger


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Left:
    run = launch(tmp_path_factory.mktemp("whole"), DROPOUT)
    assert run.codes == [0, 0], run.output
    return run


def test_every_sample_is_trained_once_an_epoch(whole: Left) -> None:
    for epoch in (0, 1):
        trained = [one for (of, _), samples in whole.samples.items() if of == epoch for one in samples]
        assert sorted(trained) == sorted({f"record[{i}]" for i in range(45)})
    assert whole.rows[-1]["step"] == LAST_STEP


def test_a_run_killed_again_and_again_equals_one_that_was_not(whole: Left, tmp_path: Path) -> None:
    kills = [
        "tensors:2:1",  # before there is any
        "manifest:4:0",
        "renamed:4:0",  # it has its name, but `latest` has not moved
        "step:7:1",  # after the short step at the epoch's end
        "pruning:8:0",
        "step:12:0",
    ]
    for number, kill in enumerate(kills):
        run = launch(tmp_path, DROPOUT, AUTO, kill=kill)
        rank = int(kill[-1])
        assert run.codes[rank] == -9, (kill, run.output)
        if number > 1:
            assert "resuming" in run.output
    run = launch(tmp_path, DROPOUT, AUTO)
    assert run.codes == [0, 0], run.output
    assert_equal(run, whole)
    assert run.saved == [12, 10]


def test_another_number_of_ranks_trains_the_same_samples_with_the_same_losses(tmp_path: Path) -> None:
    whole = launch(tmp_path / "whole")
    for size, kill in ((2, "step:4:0"), (1, "step:10:0"), (2, None)):
        rows = "gradient_accumulation_steps=4" if size == 1 else "gradient_accumulation_steps=2"
        run = launch(tmp_path / "changing", AUTO, rows, size=size, kill=kill)
        assert run.codes == ([0, 0] if kill is None else run.codes), run.output
    trained = [(line["step"], line["sample"]) for line in run.ledger]
    assert trained == [(line["step"], line["sample"]) for line in whole.ledger]
    losses = [[row["loss"] for row in one.rows if "loss" in row] for one in (run, whole)]
    assert len(losses[0]) == LAST_STEP and losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_optimizers_in_the_backward_pass_saved_in_the_background(tmp_path: Path) -> None:
    options = (
        "optimizer_in_bwd=True",
        "gradient_accumulation_steps=1",
        "clip_grad_norm=null",
        "batch_size=4",
        "enable_async_checkpointing=True",
    )
    whole = launch(tmp_path / "whole", *options)
    assert whole.codes == [0, 0], whole.output
    killed = launch(tmp_path / "killed", *options, AUTO, kill="tensors:8:1")
    assert -9 in killed.codes, killed.output
    run = launch(tmp_path / "killed", *options, AUTO)
    assert run.codes == [0, 0], run.output
    assert "resuming" in run.output
    assert_equal(run, whole)


@pytest.fixture
def finished(whole: Left, tmp_path: Path) -> Left:
    """A copy of the whole run."""
    shutil.copytree(whole.folder, tmp_path / "run")
    return Left(tmp_path / "run", [], "")


def test_a_finished_run_says_so_and_ends_well(finished: Left, whole: Left) -> None:
    run = launch(finished.folder, DROPOUT, "resume_from_checkpoint=True")
    assert run.codes == [0, 0], run.output
    assert "this run is finished" in run.output
    assert run.rows == whole.rows


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(finished: Left, whole: Left) -> None:
    file = next((finished.out / "checkpoints" / "step_12" / "tensors").glob("__1*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    run = launch(finished.folder, DROPOUT, AUTO)
    assert run.codes == [0, 0], run.output
    assert f"step_12: tensors/{file.name} has changed" in run.output and "step_10, after" in run.output
    assert_equal(run, whole)
    assert run.saved == [12, 10]


def test_a_run_without_a_good_checkpoint_stops(finished: Left) -> None:
    for step in (10, 12):
        (finished.out / "checkpoints" / f"step_{step}" / "manifest.json").unlink()
    before = (finished.out / "logs" / "metrics.jsonl").read_bytes()
    run = launch(finished.folder, DROPOUT, AUTO)
    assert run.codes == [1, 1]
    assert "has no good checkpoint" in run.output and "step_10: it has no manifest.json" in run.output
    assert (finished.out / "logs" / "metrics.jsonl").read_bytes() == before


def test_changed_settings_and_data_are_refused_unless_they_are_named(finished: Left) -> None:
    shutil.rmtree(finished.out / "checkpoints" / "step_12")
    changes = (DROPOUT, AUTO, "optimizer.lr=1e-3", "dataset.num_tasks=44", "log_every_n_steps=2")
    before = (finished.out / "logs" / "metrics.jsonl").read_bytes()
    refused = launch(finished.folder, *changes)
    assert refused.codes == [1, 1]
    assert "optimizer.lr: 0.004 → 0.001" in refused.output and "dataset: 45 samples" in refused.output
    assert "log_every" not in refused.output and "resume_override=[optimizer.lr,dataset]" in refused.output
    assert (finished.out / "logs" / "metrics.jsonl").read_bytes() == before
    taken = launch(finished.folder, *changes, "resume_override=[optimizer.lr,dataset]")
    assert taken.codes == [0, 0], taken.output
    rates = {row["step"]: row["lr"] for row in taken.rows if "lr" in row}
    assert rates[12] < rates[10] / 3  # the schedule goes on from the new rate


def test_a_path_and_a_new_run_leave_what_there_was_under_another_name(finished: Left, whole: Left) -> None:
    chosen = finished.out / "checkpoints" / "step_10"
    run = launch(finished.folder, DROPOUT, f"resume_from_checkpoint={chosen}")
    assert run.codes == [0, 0], run.output
    assert (finished.out / "checkpoints.earlier-1" / "step_12" / "manifest.json").exists()
    assert_equal(run, whole)
    anew = launch(finished.folder, DROPOUT)
    assert anew.codes == [0, 0], anew.output
    assert (finished.out / "checkpoints.earlier-2" / "step_10" / "manifest.json").exists()
    assert anew.rows == whole.rows


def test_the_best_checkpoint_stays(tmp_path: Path) -> None:
    best = ("keep_best=val_loss", "keep_last_n_checkpoints=1", "optimizer.lr=0.0", "gradient_accumulation_steps=4")
    run = launch(tmp_path, *best, "save_every_n_steps=null", size=1)
    assert run.codes == [0], run.output
    assert run.saved == [12, 4]  # the first of equal ones


def test_weights_for_users_are_not_among_the_checkpoints(whole: Left) -> None:
    assert {path.name for path in whole.out.iterdir()} >= {"model", "checkpoints", "logs", "README.txt"}
    assert len(load_file(whole.out / "model" / "epoch_1" / "model.safetensors")) > 5
    assert not list((whole.out / "checkpoints").rglob("*.safetensors"))
    assert (whole.out / "checkpoints" / "latest").read_text() == "step_12\n"


def test_one_rank_that_is_told_to_stop_before_its_first_step_stops_all(tmp_path: Path) -> None:
    for rank in (0, 1):  # the first keeps the store through which the others learn of it
        run = launch(tmp_path / str(rank), kill=f"loading:0:{rank}:SIGUSR1")
        assert run.codes == [75, 75], run.output
        assert "before the first step; nothing was lost (exit code 75)" in run.output
        assert "Traceback" not in run.output and "error: " not in run.output
