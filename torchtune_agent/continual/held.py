"""What is known of every sample a buffer holds, by slot, and the random key every sample of a stream has."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from torchtune_agent.data.token_class import TokenClass

NUM_CLASSES = len(TokenClass)
_MASK = 2**64 - 1


def random_key(seed: int, number: int) -> int:
    """64 random bits of a sample, from the seed and its number in the stream alone (two rounds of splitmix64)."""
    state = seed & _MASK
    for part in (number, 0):
        state = (state + (part + 1) * 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


@dataclass(frozen=True)
class Arrival:
    """A sample of the stream, before it is decided whether it is kept."""

    number: int  # in the stream, from 0
    key: int  # see random_key
    importance: float = 1.0
    group: str = ""
    shares: np.ndarray | None = None  # [NUM_CLASSES], of its trained tokens


class Held:
    """Columns by slot. Empty slots have number -1 and are filled again before new ones are made."""

    def __init__(self) -> None:
        self.numbers = np.full(64, -1, np.int64)
        self.importance = np.zeros(64)
        self.group_ids = np.zeros(64, np.int32)
        self.shares = np.zeros((64, 0), np.float32)  # its columns are made when the first sample has some
        self.groups: list[str] = []
        self._group_ids: dict[str, int] = {}
        self.num_slots = 0  # slots ever used
        self.count = 0
        self._free: list[int] = []

    def add(self, arrival: Arrival) -> int:
        slot = self._free.pop() if self._free else self.num_slots
        if slot == self.num_slots:
            self.num_slots += 1
            if slot == len(self.numbers):
                self._resize(2 * slot)
        self.numbers[slot], self.importance[slot] = arrival.number, arrival.importance
        self.group_ids[slot] = self._group_id(arrival.group)
        if arrival.shares is not None:
            if self.shares.shape[1] == 0:
                self.shares = np.zeros((len(self.numbers), NUM_CLASSES), np.float32)
            self.shares[slot] = arrival.shares
        self.count += 1
        return slot

    def _group_id(self, group: str) -> int:
        if group not in self._group_ids:
            self._group_ids[group] = len(self.groups)
            self.groups.append(group)
        return self._group_ids[group]

    def group(self, slot: int) -> str:
        return self.groups[self.group_ids[slot]]

    def remove(self, slot: int) -> None:
        self.numbers[slot] = -1
        self._free.append(slot)
        self.count -= 1

    @property
    def slots(self) -> np.ndarray:
        """All that are in use."""
        return np.flatnonzero(self.numbers[: self.num_slots] >= 0)

    def _resize(self, size: int) -> None:
        for name in ("numbers", "importance", "group_ids", "shares"):
            column = getattr(self, name)
            grown = np.full((size, *column.shape[1:]), -1 if name == "numbers" else 0, column.dtype)
            used = min(size, len(column))
            grown[:used] = column[:used]
            setattr(self, name, grown)

    def state(self) -> dict[str, np.ndarray]:
        columns = {
            name: getattr(self, name)[: self.num_slots].copy() for name in ("numbers", "importance", "group_ids")
        }
        return columns | {"shares": self.shares[: self.num_slots].copy(), "free": np.array(self._free, np.int64)}

    def load(self, state: Mapping[str, np.ndarray], groups: list[str]) -> None:
        for name in ("numbers", "importance", "group_ids", "shares"):
            setattr(self, name, np.array(state[name]))
        self.num_slots = len(self.numbers)
        self.groups, self._group_ids = list(groups), {name: i for i, name in enumerate(groups)}
        self._free = state["free"].tolist()
        self.count = self.num_slots - len(self._free)
        self._resize(max(64, self.num_slots))
