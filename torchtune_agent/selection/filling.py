"""Picks until a target is reached: first floors of tools and sources, then the strategy within their quotas."""

import math
from dataclasses import dataclass

import numpy as np

from torchtune_agent.errors import UserError
from torchtune_agent.selection.options import Options
from torchtune_agent.selection.pool import Pool
from torchtune_agent.selection.strategies import STRATEGIES, Features, Picks, Task


@dataclass(frozen=True)
class _Group:
    rows: np.ndarray  # of the pool
    floor: int
    quota: int | None
    name: str


class Filling:
    """Picks `number` of `candidates`, or fewer where quotas allow no more."""

    def __init__(self, features: Features, options: Options, candidates: np.ndarray, number: int) -> None:
        self._features, self._options = features, options
        self._strategy = STRATEGIES[options.strategy]
        self._candidates, self._number = candidates, number
        self._groups = self._make_groups(features.pool)
        self._picks = Picks.none()
        self._picked = np.zeros(len(features.pool), bool)

    def run(self) -> Picks:
        self._fill_floors()
        while True:
            wanted = self._number - len(self._picks.rows)
            candidates = self._open()
            if not wanted or not len(candidates):
                return self._picks
            found = self._ask(candidates, min(wanted, len(candidates)))
            self._add(found)

    def _add(self, found: Picks) -> None:
        found = found[self._within_quotas(found)]
        self._picks += found
        self._picked[found.rows] = True

    def _taken(self, group: _Group) -> int:
        return int(self._picked[group.rows].sum())

    def _ask(self, candidates: np.ndarray, number: int) -> Picks:
        return self._strategy(Task(self._features, candidates, number, self._picks.rows))

    def _fill_floors(self) -> None:
        for group in sorted(self._groups, key=lambda g: (len(g.rows), g.name)):
            missing = group.floor - self._taken(group)
            if missing <= 0:
                continue
            own = np.intersect1d(group.rows, self._open())
            if len(own):
                found = self._ask(own, min(missing, len(own)))
                self._add(Picks(found.rows, found.scores, [f"floor of {group.name}, {why}" for why in found.reasons]))
        if len(self._picks.rows) > self._number:
            raise UserError(
                f"min_per_tool={self._options.min_per_tool}, min_per_source={self._options.min_per_source}: the floors "
                f"alone take {len(self._picks.rows):,} samples, and target_size is {self._number:,}. Lower the floors, "
                "or raise target_size."
            )

    def _open(self) -> np.ndarray:
        """Candidates that are not picked and belong to no group that has reached its quota."""
        closed = self._picked.copy()
        for group in self._groups:
            if group.quota is not None and self._taken(group) >= group.quota:
                closed[group.rows] = True
        return self._candidates[~closed[self._candidates]]

    def _within_quotas(self, found: Picks) -> np.ndarray:
        """Places in `found`, in its order, until each group's quota is reached."""
        limited = [group for group in self._groups if group.quota is not None]
        room = {g.name: (g.quota or 0) - self._taken(g) for g in limited}
        new = np.zeros(len(self._picked), bool)
        new[found.rows] = True
        members: dict[int, list[str]] = {}
        for group in limited:
            for row in group.rows[new[group.rows]].tolist():
                members.setdefault(row, []).append(group.name)
        kept = []
        for place, row in enumerate(found.rows.tolist()):
            own = members.get(row, [])
            if all(room[name] > 0 for name in own):
                kept.append(place)
                for name in own:
                    room[name] -= 1
        return np.array(kept, np.int64)

    def _make_groups(self, pool: Pool) -> list[_Group]:
        options = self._options
        groups: list[_Group] = []
        for kind, floor, share, values in (
            ("tool", options.min_per_tool, options.max_share_per_tool, pool.tools),
            ("source", options.min_per_source, options.max_share_per_source, pool.sources),
        ):
            if not floor and share is None:
                continue
            if values is None:
                raise UserError(
                    f"min_per_{kind}={floor}, max_share_per_{kind}={share}: the pool does not say which {kind} a "
                    f"sample is of. Score the data again, or leave both out."
                )
            quota = None if share is None else math.floor(share * self._number)
            members: dict[str, list[int]] = {}
            for row, value in enumerate(values):
                for name in {value} if isinstance(value, str) else set(value):
                    members.setdefault(name, []).append(row)
            groups += [
                _Group(np.intersect1d(rows, self._candidates), floor, quota, f"{kind} {name}")
                for name, rows in sorted(members.items())
            ]
        return groups
