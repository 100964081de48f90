"""Which steps may update the model, and what is said of the others."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from torchtune_agent.data.collate import Batch, Collator
from torchtune_agent.data.joined import SampleInfo
from torchtune_agent.distributed import World, make_mesh, process_group
from torchtune_agent.errors import UserError
from torchtune_agent.training.faults import FiniteGuard


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_group("cpu") as (rank, size):
        yield World(rank, size, torch.device("cpu"), make_mesh("cpu", 1, 1))


def batch(name: str) -> Batch:
    made = Collator(pad_id=0)([])
    made.info = lambda: [SampleInfo(where=name, source="", tools=())]
    return made


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_is_everyones_and_a_loss_its_own_micro_batchs(bad: float, world: World, tmp_path: Path) -> None:
    guard = FiniteGuard(world, tmp_path / "nonfinite.jsonl", 3)
    batches, one = [batch("a:1"), batch("b:2")], torch.tensor(1.0)
    assert guard.passes(1, batches, [one, one], one.bfloat16())
    assert not guard.path.exists()
    assert not guard.passes(2, batches, [one, torch.tensor(bad)], torch.tensor(bad))
    assert not guard.passes(3, batches, [one, one], torch.tensor(bad))
    lines = [json.loads(line) for line in guard.path.read_text().splitlines()]
    assert [(line["step"], line["what"], line["samples"]) for line in lines] == [
        (2, "loss", ["b:2"]),
        (3, "gradient", ["a:1", "b:2"]),
    ]
    assert lines[0]["values"] == [1.0, str(bad)]
    assert guard.total == 2


def test_patience_counts_steps_in_a_row_and_goes_on_after_a_restart(world: World, tmp_path: Path) -> None:
    guard = FiniteGuard(world, tmp_path / "nonfinite.jsonl", 2)
    bad, one = torch.tensor(float("nan")), torch.tensor(1.0)
    for step, loss in enumerate([bad, one, bad], start=1):
        guard.passes(step, [batch("a:1")], [loss], one)
        guard.check_patience(step)
    resumed = FiniteGuard(world, guard.path, 2)
    resumed.load_state_dict(guard.state_dict())
    resumed.passes(4, [batch("a:1")], [bad], one)
    with pytest.raises(UserError, match=r"step 4: 2 steps in a row .* \(max_nonfinite_steps=2\)"):
        resumed.check_patience(4)
    assert resumed.total == 3


def test_a_full_disk_does_not_hide_the_step(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    guard = FiniteGuard(world, Path("/dev/full"), 3)
    assert not guard.passes(1, [batch("a:1")], [torch.tensor(float("nan"))], None)
    assert "/dev/full cannot be written: No space left on device" in capsys.readouterr().err
