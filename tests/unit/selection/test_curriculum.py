"""Orders of samples: easy to hard, in parts that grow, the same for every rank."""

from typing import Any

import numpy as np
import pytest

from tests import selection_reference as naive
from tests.selection_pools import NUM, pool
from torchtune_agent.errors import UserError
from torchtune_agent.selection.curriculum import Curriculum


def test_orders_are_by_loss_length_or_a_class() -> None:
    own = pool()
    cases: list[tuple[dict[str, Any], np.ndarray]] = [
        ({}, own.losses["overall"]),
        ({"by": "length"}, own.num_tokens.astype(float)),
        ({"score_on": "tool_call"}, np.nan_to_num(own.losses["tool_call"], nan=-1.0)),
    ]
    for options, values in cases:
        assert Curriculum(**options).order(own, 0).tolist() == naive.top(-values, NUM)
        assert Curriculum(**options, hard_first=True).order(own, 0).tolist() == naive.top(values, NUM)


def test_the_part_grows_until_it_is_all() -> None:
    own = pool()
    easiest = naive.top(-own.losses["overall"], NUM)
    paced = Curriculum(start_share=0.25, full_at_epoch=3)
    for epoch, size in enumerate([21, 42, 62, 83, 83]):  # 25, 50, 75 and 100 % of 83
        assert paced.order(own, epoch).tolist() == easiest[:size]


def test_mixing_moves_samples_as_far_as_it_says_and_anew_in_every_epoch() -> None:
    own = pool()
    easiest = naive.top(-own.losses["overall"], NUM)
    mixed = Curriculum(mixing=0.2, seed=1)
    orders = [mixed.order(own, epoch).tolist() for epoch in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == list(range(NUM))
    assert orders[0] != Curriculum(mixing=0.2, seed=2).order(own, 0).tolist()
    moved = [abs(orders[0].index(row) - place) for place, row in enumerate(easiest)]
    assert 2 < max(moved) <= 0.2 * NUM


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "lenght"}, "Did you mean 'length'"),
        ({"score_on": "thinks"}, "Did you mean 'think'"),
        ({"start_share": 0.0}, "above 0"),
        ({"start_share": 0.5}, "full_at_epoch"),
        ({"mixing": 2.0}, "between 0 and 1"),
        ({"full_at_epoch": -1}, "0 or more"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Curriculum(**options)
