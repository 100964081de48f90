"""Steps with a loss or gradient that is no finite number, or with nothing to train, leave the model as it was."""

import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tune
from torchtune_agent._tune import config_path, recipe_path
from torchtune_agent.metrics import read_rows

EVERY = ("dataset.at=1", "dataset.times=1000000", "dataset.rank=-1")
IN_BACKWARD = ("optimizer_in_bwd=True", "clip_grad_norm=null")


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the recipe in this process; returns its exit code, what it printed, and where it wrote."""

    def run(*overrides: str, name: str = "out") -> tuple[int, str, Path]:
        out = tmp_path / name
        arguments = ["--config", str(config_path("tiny/agent_sft")), f"output_dir={out}", *tune.SMALL, *tune.FAULTY]
        monkeypatch.setattr(sys, "argv", [str(recipe_path("agent_sft_distributed")), *arguments, *overrides])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(sys.argv[0], run_name="__main__")
        return int(ended.value.code or 0), capsys.readouterr().err, out

    return run


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(out / "logs" / "metrics.jsonl") if "loss" in row]


def weights(out: Path, epoch: int) -> dict[str, torch.Tensor]:
    (path,) = (out / "model").glob(f"epoch_{epoch}/model.safetensors")
    return load_file(path)


def initial_weights(train: Any) -> dict[str, torch.Tensor]:
    """Those of a run that cannot move them: its learning rate is 0."""
    code, _, out = train("optimizer.lr=0", "max_steps_per_epoch=1", "run_val_every_n_steps=null", name="initial")
    assert code == 0
    return weights(out, 0)


@pytest.mark.parametrize("in_backward", [(), IN_BACKWARD], ids=["after backward", "in backward"])
def test_an_infinite_loss_changes_nothing_and_its_samples_are_listed(train, in_backward: tuple[str, ...]) -> None:
    overrides = ("dataset.fault=infinite", "dataset.num_tasks=8", "max_nonfinite_steps=5", *EVERY, *in_backward)
    code, printed, out = train(*overrides, "optimizer.weight_decay=0.1")
    assert code == 0
    assert [row["nonfinite_steps"] for row in rows(out)] == [1, 2, 3, 4]
    assert not any(math.isfinite(row["loss"]) for row in rows(out))
    listed = [json.loads(line) for line in (out / "logs" / "nonfinite.jsonl").read_text().splitlines()]
    assert [(line["step"], line["rank"], line["what"]) for line in listed] == [(n, 0, "loss") for n in range(1, 5)]
    assert sorted(sample for line in listed for sample in line["samples"]) == [f"record[{i}]" for i in range(8)]
    assert printed.count("the loss is not finite; the model was not updated") == 4
    before, after = initial_weights(train), weights(out, 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_one_bad_step_is_counted_and_the_next_ones_train(train) -> None:
    code, _, out = train("dataset.fault=infinite", "dataset.rank=0", "dataset.at=9", "clip_grad_norm=null")
    assert code == 0
    logged = rows(out)
    bad = [row["step"] for row in logged if not math.isfinite(row["loss"])]
    assert len(bad) == 1
    assert [row["nonfinite_steps"] for row in logged] == [int(row["step"] >= bad[0]) for row in logged]
    assert all(math.isfinite(row["grad_norm"]) for row in logged if row["step"] not in bad)


def test_too_many_bad_steps_in_a_row_end_the_run(train) -> None:
    code, printed, out = train("dataset.fault=infinite", *EVERY)
    assert code == 1
    assert "error: step 3: 3 steps in a row had a loss or gradient that is not finite" in printed
    assert "nonfinite.jsonl" in printed and "Traceback" not in printed
    assert rows(out)[-1]["step"] == 3  # the bad steps are in the log


@pytest.mark.parametrize("in_backward", [(), IN_BACKWARD], ids=["after backward", "in backward"])
def test_steps_with_nothing_to_train_change_nothing(train, in_backward: tuple[str, ...]) -> None:
    overrides = ("dataset.fault=untrained", "dataset.num_tasks=8", *EVERY, *in_backward)
    code, printed, out = train(*overrides, "optimizer.weight_decay=0.1")
    assert code == 0, printed
    assert all(math.isnan(row["loss"]) and row["nonfinite_steps"] == 0 for row in rows(out))
    before, after = initial_weights(train), weights(out, 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
