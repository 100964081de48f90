"""Orders of rows: easy to hard, in parts that grow, the same wherever a run begins or goes on."""

from itertools import islice
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from tests import selection_reference as naive
from tests.selection_pools import NUM, pool
from torchtune_agent.data import Collator, SampleLoader, StepPlan
from torchtune_agent.data.joined import JoinedDataset
from torchtune_agent.errors import UserError
from torchtune_agent.selection.curriculum import Curriculum
from torchtune_agent.selection.paced import PacedLoader

LOSS = pool().losses["overall"]


def order(number: int, total: int, *, seed: int = 0, values: np.ndarray = LOSS, **options: Any) -> list[int]:
    times = np.zeros(NUM, np.int64)
    return list(islice(Curriculum(**options).rows(values, times, 0, total, seed), number))


def test_with_all_open_every_epoch_is_from_easy_to_hard() -> None:
    calls = pool().losses["tool_call"]
    for values in (LOSS, calls):
        easiest = naive.top(-np.nan_to_num(values, nan=-1.0), NUM)
        hardest = naive.top(np.nan_to_num(values, nan=-1.0), NUM)
        assert order(2 * NUM, 2 * NUM, values=values, start_share=1.0) == 2 * easiest
        assert order(NUM, NUM, values=values, start_share=1.0, hard_first=True) == hardest


def test_the_open_part_grows_with_the_steps() -> None:
    """Against a loop that looks at every row before each pick."""
    total = 3 * NUM
    easiest = naive.top(-LOSS, NUM)
    times, expected = dict.fromkeys(easiest, 0), []
    for place in range(total):
        share = 0.25 + 0.75 * min(1.0, place / (0.6 * total))
        is_open = easiest[: round(share * NUM)]
        row = min(is_open, key=lambda row: (times[row], easiest.index(row)))
        times[row] += 1
        expected.append(row)
    found = order(total, total, start_share=0.25, full_at=0.6)
    assert found == expected
    assert set(times.values()) == {3}  # in the end none was left out
    assert set(found[:60]) < set(easiest[:60])  # and in the beginning easy ones were repeated


def test_mixing_moves_rows_as_far_as_it_says_and_anew_every_time() -> None:
    easiest = naive.top(-LOSS, NUM)
    mixed = order(2 * NUM, 2 * NUM, start_share=1.0, mixing=0.2, seed=1)
    first, second = mixed[:NUM], mixed[NUM:]
    assert first != second and sorted(first) == sorted(second) == list(range(NUM))
    assert mixed != order(2 * NUM, 2 * NUM, start_share=1.0, mixing=0.2, seed=2)
    moved = [abs(first.index(row) - place) for place, row in enumerate(easiest)]
    assert 2 < max(moved) <= 0.2 * NUM


class Data(list):
    lengths = np.full(21, 3)


def paced(measured: list[int], **options: Any) -> PacedLoader:
    """A source of 21 samples, two to a step, that are harder to the left after the first time they are measured."""
    samples = [{"tokens": np.full(3, i), "labels": np.full(3, i)} for i in range(21)]

    def measure(step: int) -> np.ndarray:
        measured.append(step)
        return np.arange(21.0) if step == 0 else -np.arange(21.0)

    loader = SampleLoader(JoinedDataset({"data": Data(samples)}), Collator(0), StepPlan(2), shuffle=True, seed=0)
    return PacedLoader(loader, Curriculum(**options), measure, epochs=2, max_steps=None)


def rows(source: PacedLoader, epoch: int, first: int = 0) -> list[list[int]]:
    return [step[0].tokens[:, 0].tolist() for step in source.epoch(epoch, first)]


def test_what_is_measured_anew_changes_the_order_of_what_is_left() -> None:
    measured: list[int] = []
    source = paced(measured, start_share=1.0, rescore_every_n_steps=4)
    trained = [row for step in rows(source, 0) for row in step]
    assert trained == [*range(8), *range(20, 7, -1)] and measured == [0, 4, 8]
    assert [row for step in rows(source, 1) for row in step] == list(range(20, -1, -1))


@pytest.mark.parametrize("options", [{}, {"rescore_every_n_steps": 4}, {"mixing": 0.3, "rescore_every_n_steps": 3}])
def test_a_run_that_goes_on_from_its_state_trains_the_same_rows(options: dict[str, Any]) -> None:
    whole = paced([], start_share=0.4, full_at=0.7, **options)
    expected, states = [], []
    for epoch in range(2):
        states.append((epoch, 0, whole.state_dict()))
        for number, step in enumerate(whole.epoch(epoch), start=1):
            expected.append(step[0].tokens[:, 0].tolist())
            if number < 11:
                states.append((epoch, 2 * number, whole.state_dict()))
    for epoch, first, state in states[1:]:
        again = paced([], start_share=0.4, full_at=0.7, **options)
        again.load_state_dict(state)
        found = rows(again, epoch, first) + (rows(again, 1) if epoch == 0 else [])
        assert found == expected[epoch * 11 + first // 2 :], (epoch, first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "lenght"}, "curriculum.by='lenght'"),
        ({"bye": "length"}, "curriculum.bye: unknown config key. Did you mean 'by'"),
        ({"score_on": "thinks"}, "Did you mean 'think'"),
        ({"start_share": 0.0}, "above 0"),
        ({"full_at": 1.5}, "at most 1"),
        ({"mixing": 2.0}, "between 0 and 1"),
        ({"rescore_every_n_steps": 0}, "at least 1"),
        ({"by": "length", "rescore_every_n_steps": 5}, "needs no scores"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Curriculum.from_config(OmegaConf.create(options))
