"""How many replayed samples go with new ones, so that their share of all that is trained is exact."""

from fractions import Fraction
from typing import Any

from torchtune_agent.errors import UserError


def as_share(ratio: Any) -> Fraction:
    """A replay ratio as it is written: 0.1 is a tenth. It is the replayed samples' share of all that are trained."""
    try:
        share = Fraction(str(ratio))
    except ValueError:
        share = Fraction(-1)
    if not 0 <= share < 1:
        raise UserError(
            f"replay_ratio={ratio}: must be 0 or more and less than 1, the replayed samples' share of a batch."
        )
    return share


class Quota:
    """Counts what is owed. Nothing is rounded away: what a batch could not take whole is carried to the next."""

    def __init__(self, ratio: Any) -> None:
        share = as_share(ratio)
        self._per_new = share / (1 - share)
        self._carried = Fraction(0)

    def replays(self, num_new: int) -> int:
        """Replayed samples that are due with the next `num_new` new ones."""
        owed = self._carried + num_new * self._per_new
        self._carried = owed - int(owed)
        return int(owed)

    def state(self) -> list[int]:
        return [self._carried.numerator, self._carried.denominator]

    def load(self, state: list[int]) -> None:
        self._carried = Fraction(*state)
