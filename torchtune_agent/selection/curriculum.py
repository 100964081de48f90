"""An order instead of a subset: which samples an epoch trains, and in which order.

A curriculum is a function of the epoch alone, so every rank and every resumed run sees the same order. Self-paced
learning begins with the easy part of the pool, and the part grows until it is all; samples of the last epochs are all.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from torchtune_agent.errors import UserError, did_you_mean
from torchtune_agent.selection.pool import SCORE_ON, Pool

BY = ("loss", "length")


@dataclass(frozen=True)
class Curriculum:
    """Easy to hard.

    Args:
        by: "loss" of the tokens of `score_on` (samples without such tokens come first), or "length".
        score_on: "overall", "tool_call", "arg_value", ...
        hard_first: the other way round.
        start_share: of the pool, trained in the first epoch, the easiest first. 1: all.
        full_at_epoch: the epoch (from 0) from which on all are trained; the share grows evenly until then.
        mixing: how far samples may stray from their place, as a share of the pool: 0 is the strict order, 1 is nearly
            a shuffle.
        seed: of what `mixing` draws.
    """

    by: Literal["loss", "length"] = "loss"
    score_on: str = "overall"
    hard_first: bool = False
    start_share: float = 1.0
    full_at_epoch: int = 0
    mixing: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise UserError(f"curriculum.by={self.by}: {did_you_mean(self.by, BY)}")
        if self.score_on not in SCORE_ON:
            raise UserError(f"curriculum.score_on={self.score_on}: {did_you_mean(self.score_on, SCORE_ON)}")
        if not 0 < self.start_share <= 1:
            raise UserError(f"curriculum.start_share={self.start_share}: must be above 0 and at most 1.")
        if not 0 <= self.mixing <= 1:
            raise UserError(f"curriculum.mixing={self.mixing}: must be between 0 and 1.")
        if self.full_at_epoch < 0:
            raise UserError(f"curriculum.full_at_epoch={self.full_at_epoch}: must be 0 or more.")
        if self.start_share < 1 and self.full_at_epoch == 0:
            raise UserError(
                f"curriculum.start_share={self.start_share}: the share must grow to all. Set curriculum.full_at_epoch "
                "to the first epoch that trains the whole pool, at least 1."
            )

    def share(self, epoch: int) -> float:
        """Of the pool, that the epoch trains."""
        if epoch >= self.full_at_epoch:
            return 1.0
        return self.start_share + (1 - self.start_share) * epoch / self.full_at_epoch

    def order(self, pool: Pool, epoch: int) -> np.ndarray:
        """Rows of the pool in the order the epoch trains them."""
        values = pool.num_tokens if self.by == "length" else pool.loss(self.score_on)
        difficulty = np.nan_to_num(np.asarray(values, np.float64), nan=-np.inf)
        places = np.empty(len(pool))
        places[np.argsort(-difficulty if self.hard_first else difficulty, kind="stable")] = np.arange(len(pool))
        kept = np.flatnonzero(places < max(1, round(self.share(epoch) * len(pool))))
        drawn = np.random.default_rng([self.seed, epoch]).random(len(pool))
        return kept[np.argsort((places + drawn * self.mixing * len(pool))[kept], kind="stable")]
