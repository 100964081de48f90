"""Which samples of a stream a full buffer keeps.

Every decision follows from the seed, a sample's number in the stream and what was offered with it, so ranks that see
the same stream keep the same samples without a word between them.
"""

import heapq
from collections import deque
from typing import Any, Protocol

from torchtune_agent.continual.held import Arrival, Held, random_key
from torchtune_agent.errors import UserError

_RECENT = 1000


class Keeping(Protocol):
    """What a strategy keeps. `held` already has the sample when `added` is called, and still has it in `evict`."""

    def wants(self, arrival: Arrival) -> bool:
        """Asked once of every sample of the stream, in its order."""
        ...

    def added(self, slot: int) -> None: ...

    def evict(self) -> int:
        """The slot to give up."""
        ...

    def changed(self, slot: int) -> None:
        """The importance of a held sample is another."""
        ...

    def state(self) -> dict[str, Any]:
        """Plain values that `held` does not tell."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """`held` was loaded before."""
        ...


class Uniform:
    """A uniform reservoir: of the samples offered so far, those with the smallest random keys.

    They are a uniformly random subset of the stream, as Algorithm R keeps. Unlike there, no decision depends on those
    before, so the same samples are kept whatever portions they come in, and a limit in bytes does not favour short
    samples. With `by_group` every group is such a reservoir, and the largest gives up a sample first: rare groups are
    kept whole, and frequent ones share the rest.
    """

    def __init__(self, held: Held, seed: int, *, by_group: bool = False) -> None:
        self._held, self._seed, self._by_group = held, seed, by_group
        self._heaps: dict[str, list[tuple[int, int]]] = {}  # of a group: (-key, slot)
        self._limits: dict[str, int] = {}  # of a group: the smallest key it ever gave up
        self._largest: list[tuple[int, str]] = []  # (-size, group), with some that are no longer true

    def _group(self, slot: int) -> str:
        return self._held.group(slot) if self._by_group else ""

    def wants(self, arrival: Arrival) -> bool:
        limit = self._limits.get(arrival.group if self._by_group else "")
        return limit is None or arrival.key < limit

    def added(self, slot: int) -> None:
        group = self._group(slot)
        heap = self._heaps.setdefault(group, [])
        heapq.heappush(heap, (-random_key(self._seed, int(self._held.numbers[slot])), slot))
        self._sized(group)

    def _sized(self, group: str) -> None:
        if not self._by_group:
            return
        if len(self._largest) > 4 * len(self._heaps) + 64:
            self._largest = [(-len(heap), name) for name, heap in self._heaps.items()]
            heapq.heapify(self._largest)
        else:
            heapq.heappush(self._largest, (-len(self._heaps[group]), group))

    def evict(self) -> int:
        group = ""
        while self._by_group:
            size, group = self._largest[0]
            if size == -len(self._heaps[group]):
                break
            heapq.heappop(self._largest)
        key, slot = heapq.heappop(self._heaps[group])
        self._limits[group] = -key
        self._sized(group)
        return slot

    def changed(self, slot: int) -> None:
        pass  # importance has no say in what is kept

    def state(self) -> dict[str, Any]:
        return {"limits": {group: str(limit) for group, limit in self._limits.items()}}  # JSON has no 64-bit integers

    def load(self, state: dict[str, Any]) -> None:
        self._heaps, self._largest = {}, []
        for slot in self._held.slots.tolist():
            self.added(slot)
        self._limits = {group: int(limit) for group, limit in state["limits"].items()}


class Recent:
    """The last samples of the stream."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self._slots: deque[int] = deque()  # the oldest first

    def wants(self, arrival: Arrival) -> bool:
        return True

    def added(self, slot: int) -> None:
        self._slots.append(slot)

    def evict(self) -> int:
        return self._slots.popleft()

    def changed(self, slot: int) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        self._slots = deque(sorted(self._held.slots.tolist(), key=lambda slot: self._held.numbers[slot]))


class AboveMean:
    """Samples whose importance exceeds the mean of the stream times `threshold_ratio`; the least important one that is
    held, the oldest of equals, is given up.

    The mean is that of what was offered before, the last thousand counting most. The mean of what is held would rise
    with every sample that passes it, until next to nothing passes any more.
    """

    def __init__(self, held: Held, threshold_ratio: float) -> None:
        if not threshold_ratio >= 0:
            raise UserError(f"threshold_ratio={threshold_ratio}: must be 0 or more.")
        self._held, self._ratio = held, threshold_ratio
        self._heap: list[tuple[float, int, int]] = []  # (importance, number, slot), with some that are no longer true
        self._entered: dict[int, float] = {}  # of a slot: its importance in the heap that is true
        self._mean, self._count = 0.0, 0

    def wants(self, arrival: Arrival) -> bool:
        wanted = self._count == 0 or arrival.importance > self._ratio * self._mean
        self._count = min(self._count + 1, _RECENT)
        self._mean += (arrival.importance - self._mean) / self._count
        return wanted

    def added(self, slot: int) -> None:
        importance = float(self._held.importance[slot])
        heapq.heappush(self._heap, (importance, int(self._held.numbers[slot]), slot))
        self._entered[slot] = importance

    def evict(self) -> int:
        while True:
            importance, number, slot = heapq.heappop(self._heap)
            if self._held.numbers[slot] == number and self._entered.get(slot) == importance:
                del self._entered[slot]
                return slot

    def changed(self, slot: int) -> None:
        self.added(slot)
        if len(self._heap) > 2 * self._held.count + 64:
            self._rebuild()

    def _rebuild(self) -> None:
        held = self._held
        slots = held.slots.tolist()
        self._entered = {slot: float(held.importance[slot]) for slot in slots}
        self._heap = [(self._entered[slot], int(held.numbers[slot]), slot) for slot in slots]
        heapq.heapify(self._heap)

    def state(self) -> dict[str, Any]:
        return {"mean": self._mean, "count": self._count}

    def load(self, state: dict[str, Any]) -> None:
        self._rebuild()
        self._mean, self._count = float(state["mean"]), int(state["count"])
