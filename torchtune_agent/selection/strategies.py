"""The strategies: which samples of a pool to pick, one function and one entry of `STRATEGIES` each.

A strategy sees a `Task`: the pool, which rows it may pick (`candidates`), which are picked already (`given`), and how
many more are wanted. It knows nothing of duplicates, outliers, floors and quotas: those narrow the candidates
(filling.py), and call it as often as they need to.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from torchtune_agent.selection.facility import facility_location as pick_by_facility_location
from torchtune_agent.selection.importance import importance
from torchtune_agent.selection.kcenter import k_center
from torchtune_agent.selection.pool import Pool


@dataclass(frozen=True)
class Picks:
    """Rows of the pool in the order they were picked, the score each was picked by, and what that score is."""

    rows: np.ndarray  # int64 [k]
    scores: np.ndarray  # float64 [k]
    reasons: list[str]

    @classmethod
    def none(cls) -> "Picks":
        return cls(np.empty(0, np.int64), np.empty(0), [])

    def __add__(self, other: "Picks") -> "Picks":
        rows, scores = np.concatenate([self.rows, other.rows]), np.concatenate([self.scores, other.scores])
        return Picks(rows, scores, self.reasons + other.reasons)

    def __getitem__(self, which: np.ndarray) -> "Picks":
        return Picks(self.rows[which], self.scores[which], [self.reasons[i] for i in which])


@dataclass(frozen=True)
class Features:
    """What strategies share and compute once."""

    pool: Pool
    score_on: str = "overall"
    loss_ratio: float = 0.6
    seed: int = 0
    device: str = "cpu"

    @cached_property
    def vectors(self) -> torch.Tensor:
        """Embeddings of length 1: what is compared is what samples are about, not how large the model makes them."""
        vectors = torch.tensor(self.pool.vectors(), dtype=torch.float32, device=self.device)
        for rows in vectors.split(65536):
            rows /= rows.norm(dim=1, keepdim=True).clamp_(min=1e-12)
        return vectors

    @cached_property
    def importance(self) -> np.ndarray:
        loss = self.pool.loss(self.score_on)
        least = np.nanmin(loss) if not np.isnan(loss).all() else 0.0
        return importance(np.where(np.isnan(loss), least, loss), self.pool.surprise(), self.vectors)

    @cached_property
    def random_keys(self) -> np.ndarray:
        """A number of every sample, drawn from the seed: samples keep theirs whatever the candidates are."""
        return np.random.default_rng(self.seed).random(len(self.pool))

    def tensor(self, rows: np.ndarray) -> torch.Tensor:
        """The vectors of some rows; of all, without a copy."""
        if len(rows) == len(self.vectors) and (rows == np.arange(len(rows))).all():
            return self.vectors
        return self.vectors[torch.from_numpy(rows).to(self.device)]


@dataclass(frozen=True)
class Task:
    features: Features
    candidates: np.ndarray  # int64, ascending
    number: int
    given: np.ndarray  # int64


def loss_topk(task: Task) -> Picks:
    """The highest losses. Samples without a token that the loss is of come last."""
    return _highest(task, task.features.pool.loss(task.features.score_on), f"{task.features.score_on} loss")


def uncertainty(task: Task) -> Picks:
    """The highest entropies of the model's predictions."""
    return _highest(task, task.features.pool.uncertainty(), "entropy")


def ssis(task: Task) -> Picks:
    """The highest importance (importance.py)."""
    return _highest(task, task.features.importance, "importance")


def random(task: Task) -> Picks:
    """A uniform draw: what every other strategy must beat."""
    return _highest(task, task.features.random_keys, "random")


def diversity(task: Task) -> Picks:
    """Greedy k-center: each pick is the sample farthest from all picks before it."""
    features = task.features
    centers = k_center(features.tensor(task.candidates), task.number, features.tensor(task.given))
    scores = centers.distances.numpy()
    return Picks(task.candidates[centers.picks.numpy()], scores, ["distance"] * len(scores))


def hybrid(task: Task) -> Picks:
    """`loss_ratio` of the picks by loss, the rest by distance to all picks, those by loss among them."""
    number = round(task.features.loss_ratio * task.number)
    by_loss = loss_topk(replace(task, number=number))
    rest = np.setdiff1d(task.candidates, by_loss.rows)
    given = np.concatenate([task.given, by_loss.rows])
    return by_loss + diversity(replace(task, candidates=rest, number=task.number - number, given=given))


def facility_location(task: Task) -> Picks:
    """Each pick is the sample that brings a similar one to most samples that have none yet."""
    features = task.features
    vectors, given = features.tensor(task.candidates), features.tensor(task.given)
    picks, gains = pick_by_facility_location(vectors, task.number, given, clients=features.vectors, seed=features.seed)
    return Picks(task.candidates[picks], gains, ["gain"] * len(picks))


def _highest(task: Task, values: np.ndarray, reason: str) -> Picks:
    own = np.nan_to_num(values[task.candidates], nan=-np.inf)
    best = np.argsort(-own, kind="stable")[: task.number]  # of equals, the first
    reasons = [reason if np.isfinite(own[i]) else f"no {reason}" for i in best]
    return Picks(task.candidates[best], own[best].astype(np.float64), reasons)


STRATEGIES: dict[str, Callable[[Task], Picks]] = {
    "loss_topk": loss_topk,
    "diversity": diversity,
    "hybrid": hybrid,
    "random": random,
    "uncertainty": uncertainty,
    "facility_location": facility_location,
    "ssis": ssis,
}
# The one that wins where all are compared (docs/experiments/coreset.md)
DEFAULT = "facility_location"
# What a strategy reads of the pool beside ids and lengths
NEEDS: dict[str, tuple[str, ...]] = {
    "loss_topk": ("loss",),
    "diversity": ("embeddings",),
    "hybrid": ("loss", "embeddings"),
    "random": (),
    "uncertainty": ("entropy",),
    "facility_location": ("embeddings",),
    "ssis": ("loss", "error", "embeddings"),
}
