"""The replay ratio rises with forgetting and with drift, falls back, and stays within its bounds."""

import pytest

from torchtune_agent.continual.adaptive import AdaptiveRatio
from torchtune_agent.errors import UserError


def after(ratio: AdaptiveRatio, steps: int, new_loss: float, replay_loss: float) -> float:
    for _ in range(steps):
        ratio.measured(new_loss=new_loss, replay_loss=replay_loss)
    return float(ratio.ratio)


def test_the_ratio_follows_forgetting_and_drift() -> None:
    ratio = AdaptiveRatio(0.1, 0.5)
    assert float(ratio.ratio) == 0.1 and after(ratio, 300, 2.0, 1.0) == 0.1
    # Replayed samples now lose 1.3: F goes to 0.3, and the ratio to 0.1 + 0.4 * 0.3
    assert after(ratio, 60, 2.0, 1.3) == pytest.approx(0.22, abs=2e-3)
    assert after(ratio, 60, 2.0, 1.0) == pytest.approx(0.1, abs=2e-3)
    # New samples change: at first most, until what is new is what there is
    at_once = after(ratio, 30, 3.0, 1.0)
    fast = 2 + (1 - 0.9**30)
    slow = 2 + (1 - 0.99**30)
    assert at_once == pytest.approx(0.1 + 0.4 * (fast / slow - 1), abs=2e-3) and at_once > 0.17
    assert after(ratio, 900, 3.0, 1.0) == pytest.approx(0.1, abs=2e-3)
    assert after(ratio, 100, 3.0, 50.0) == 0.5


def test_state_comes_back_and_what_is_not_finite_is_left_out() -> None:
    ratio, other = AdaptiveRatio(0.2, 0.4), AdaptiveRatio(0.2, 0.4)
    after(ratio, 20, 2.0, 1.0)
    before = after(ratio, 5, 2.5, 1.2)
    ratio.measured(new_loss=float("nan"), replay_loss=float("inf"))
    ratio.measured(new_loss=None, replay_loss=None)
    assert float(ratio.ratio) == before > 0.2
    other.load_state_dict(ratio.state_dict())
    assert after(other, 3, 2.1, 1.1) == after(ratio, 3, 2.1, 1.1)


def test_bounds_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="highest_replay_ratio=0.1: is below replay_ratio=0.2"):
        AdaptiveRatio(0.2, 0.1)
    with pytest.raises(UserError, match="replay_ratio=1.0: must be 0 or more and less than 1"):
        AdaptiveRatio(0.2, 1.0)
