"""Steps of records that arrive: how many rows they have, and which of them are replayed."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from torchtune_agent.continual import ReplayBuffer
from torchtune_agent.continual.arrivals import FromIterable, Reader
from torchtune_agent.continual.live import LiveSource
from torchtune_agent.continual.mixing import Pick
from torchtune_agent.data import AgentSFTTransform, Collator, StepPlan
from torchtune_agent.data.toolworld import toolworld_tokenizer
from torchtune_agent.distributed import process_group

RECORD = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]}


class Steps:
    """Remembers of every step which of its rows were replayed."""

    def __init__(self) -> None:
        self.replayed: list[list[bool]] = []

    def step_begins(self, picks: Sequence[Pick]) -> None:
        self.replayed.append([pick.age is not None for pick in picks])

    def step_ended(self) -> None:
        pass

    def facts(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


@pytest.mark.parametrize("rows_per_step", [1, 2, 16])
@pytest.mark.parametrize("ratio", ["0", "1/4", "1/2", "5/6", "9/10"])
def test_steps_are_full_and_the_ratio_is_exact(ratio: str, rows_per_step: int, tmp_path: Path) -> None:
    number, steps, share = 60, Steps(), Fraction(ratio)
    source = LiveSource(
        Reader(FromIterable(lambda: [RECORD] * number, "records"), ahead=8, poll_seconds=0.01),
        AgentSFTTransform(toolworld_tokenizer(64)),
        Collator(0),
        StepPlan(rows_per_step, 1, 0, 1),
        ReplayBuffer(20),
        replay_ratio=lambda: share,
        max_steps=10_000,
        patience_seconds=5.0,
        idle_seconds=5.0,
        seed=0,
        work=steps,
        is_asked_to_stop=lambda: False,
        quarantine=tmp_path / "quarantine.jsonl",
    )
    with process_group("cpu"):
        assert all(len(batches) == 1 for batches in source.epoch(0))
    rows = [replayed for step in steps.replayed for replayed in step]
    assert rows.count(False) == number
    assert all(len(step) == rows_per_step for step in steps.replayed[:-1])
    for length in range(1, len(rows) + 1):  # of any beginning
        assert abs(sum(rows[:length]) - length * share) <= 1
