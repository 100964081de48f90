"""An order instead of a subset: which sample comes when, easy ones first.

A run trains rows one after the other. Each next one is, of the rows that are open, the easiest of those trained least.
At first only the easiest part of the data is open (self-paced learning: a threshold of difficulty that grows with the
steps), in the end all of it is. So an epoch of a strict order is the data from easy to hard, and nothing is repeated
before everything that is open has been trained.
"""

from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ConfigDict

from torchtune_agent.config import check_keys
from torchtune_agent.errors import UserError, did_you_mean
from torchtune_agent.selection.pool import SCORE_ON
from torchtune_agent.training.settings import checked


class Curriculum(BaseModel):
    """The keys of the `curriculum` section.

    by: "loss" of the tokens of `score_on` (rows without such tokens come first), or "length".
    score_on: "overall", "tool_call", "arg_value", ...
    hard_first: the other way round.
    start_share: of the rows, open at the start.
    full_at: the share of the run's steps after which all rows are open; the part grows evenly until then.
    mixing: how far rows may stray from their place, as a share of all: 0 is the strict order, 1 nearly a shuffle.
    scores_from: a scores.parquet, or the ledger of a training run, to begin with; otherwise the model scores the data.
    rescore_every_n_steps: score again with the model as it is then.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: Literal["loss", "length"] = "loss"
    score_on: str = "overall"
    hard_first: bool = False
    start_share: float = 0.3
    full_at: float = 0.5
    mixing: float = 0.0
    scores_from: Path | None = None
    rescore_every_n_steps: int | None = None
    score_batch_size: int = 8

    @classmethod
    def from_config(cls, section: DictConfig) -> "Curriculum":
        if not isinstance(section, DictConfig):
            raise UserError(f"curriculum={section}: must be a section, for example curriculum.by=loss.")
        check_keys(section, set(cls.model_fields), "curriculum.")
        values: Any = OmegaConf.to_container(section, resolve=True)
        made = checked(cls, values, "curriculum.")
        made.check()
        return made

    def check(self) -> None:
        if self.score_on not in SCORE_ON:
            raise UserError(
                f"curriculum.score_on={self.score_on}: no such tokens. {did_you_mean(self.score_on, SCORE_ON)}"
            )
        for name in ("start_share", "full_at"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"curriculum.{name}={getattr(self, name)}: must be above 0 and at most 1.")
        if not 0 <= self.mixing <= 1:
            raise UserError(f"curriculum.mixing={self.mixing}: must be between 0 and 1.")
        for name in ("rescore_every_n_steps", "score_batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"curriculum.{name}={getattr(self, name)}: must be at least 1.")
        if self.by == "length" and (self.scores_from is not None or self.rescore_every_n_steps is not None):
            raise UserError("curriculum.by=length: needs no scores. Leave scores_from and rescore_every_n_steps out.")

    def num_open(self, place: int, num_rows: int, total: int) -> int:
        """Rows that are open when `place` of the run's `total` rows have been trained."""
        grown = min(1.0, place / (self.full_at * total))
        return max(1, round((self.start_share + (1 - self.start_share) * grown) * num_rows))

    def rows(
        self, difficulty: np.ndarray, times_trained: np.ndarray, first: int, total: int, seed: int
    ) -> Iterator[int]:
        """The rows of a run from its place `first` on, without end.

        Args:
            difficulty: of every row; NaN where that cannot be told.
            times_trained: every row, before `first`. Brought up to date as rows are taken.
            total: rows the run trains.
            seed: of what `mixing` draws.
        """
        number = len(difficulty)
        known = np.nan_to_num(difficulty, nan=-np.inf)
        order = np.argsort(-known if self.hard_first else known, kind="stable")
        places = np.empty(number)
        places[order] = np.arange(number)
        drawn: dict[int, np.ndarray] = {}

        def entry(row: int) -> tuple[int, float, int]:
            times = int(times_trained[row])
            if self.mixing and times not in drawn:
                drawn[times] = np.random.default_rng([seed, times]).random(number) * self.mixing * number
            return times, float(places[row] + (drawn[times][row] if self.mixing else 0.0)), row

        open_rows: list[tuple[int, float, int]] = []
        opened = 0
        for place in count(first):
            while opened < self.num_open(place, number, total):
                heappush(open_rows, entry(int(order[opened])))
                opened += 1
            row = heappop(open_rows)[2]
            times_trained[row] += 1
            heappush(open_rows, entry(row))
            yield row
