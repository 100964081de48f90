"""A replay ratio that follows what is measured: more replay while old samples are being forgotten, or new ones change.

ratio = lowest + (highest - lowest) * min(1, F + D), where
  F  forgetting: how far the loss of replayed samples is above the lowest it has been, as a share of that
  D  drift: how far the loss of new samples is above its own longer mean, as a share of that
Losses are means over steps that fade: of the last ten or so, and of the last hundred or so for the longer one.
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from torchtune_agent.continual.quota import as_share
from torchtune_agent.errors import UserError

_SHORT, _LONG = 0.1, 0.01  # of a mean, a new step's part
_GRAIN = 1000  # ratios are thousandths, so that what is owed stays a small fraction


class AdaptiveRatio:
    """Starts with `lowest`; takes what was measured of every step."""

    def __init__(self, lowest: Any, highest: Any) -> None:
        self._lowest, self._highest = as_share(lowest), as_share(highest)
        if self._highest < self._lowest:
            raise UserError(f"highest_replay_ratio={highest}: is below replay_ratio={lowest}. Set it to that or more.")
        self._replayed: float | None = None
        self._best: float | None = None
        self._new: float | None = None
        self._new_before: float | None = None

    def measured(self, *, new_loss: float | None, replay_loss: float | None) -> None:
        """Of one step; None for what it had none of. What is not finite is left out."""
        if replay_loss is not None and math.isfinite(replay_loss):
            self._replayed = _mixed(self._replayed, replay_loss, _SHORT)
            self._best = self._replayed if self._best is None else min(self._best, self._replayed)
        if new_loss is not None and math.isfinite(new_loss):
            self._new, self._new_before = _mixed(self._new, new_loss, _SHORT), _mixed(self._new_before, new_loss, _LONG)

    @property
    def forgetting(self) -> float:
        return _above(self._replayed, self._best)

    @property
    def drift(self) -> float:
        return _above(self._new, self._new_before)

    @property
    def ratio(self) -> Fraction:
        share = Fraction(round(min(1.0, self.forgetting + self.drift) * _GRAIN), _GRAIN)
        return self._lowest + (self._highest - self._lowest) * share

    def state_dict(self) -> dict[str, Any]:
        return {"replayed": self._replayed, "best": self._best, "new": self._new, "new_before": self._new_before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._replayed, self._best = state["replayed"], state["best"]
        self._new, self._new_before = state["new"], state["new_before"]


def _mixed(mean: float | None, value: float, part: float) -> float:
    return value if mean is None else mean + part * (value - mean)


def _above(value: float | None, base: float | None) -> float:
    return max(0.0, value / base - 1) if value is not None and base else 0.0
