"""Which of the samples a buffer holds are replayed."""

from typing import NamedTuple, Protocol

import numpy as np

from torchtune_agent.continual.held import NUM_CLASSES, Held
from torchtune_agent.continual.segment_tree import SegmentTree


class Drawn(NamedTuple):
    slots: np.ndarray  # int64 [n]
    weights: np.ndarray  # float64 [n], of the samples in a loss that is to be that of uniform drawing; at most 1


class Drawing(Protocol):
    """How a strategy draws. `added` and `removed` follow `held`."""

    def added(self, slots: np.ndarray) -> None: ...

    def removed(self, slots: np.ndarray) -> None: ...

    def draw(self, rng: np.random.Generator, n: int, progress: float) -> Drawn:
        """`n` of the held samples, which are at least as many. `progress`: the share of the run that is done."""
        ...

    def state(self) -> dict[str, np.ndarray]: ...

    def load(self, state: dict[str, np.ndarray]) -> None: ...


class _FromHeld:
    """Of drawings that `held` tells everything."""

    def __init__(self, held: Held) -> None:
        self._held = held

    def added(self, slots: np.ndarray) -> None:
        pass

    def removed(self, slots: np.ndarray) -> None:
        pass

    def state(self) -> dict[str, np.ndarray]:
        return {}

    def load(self, state: dict[str, np.ndarray]) -> None:
        self.added(self._held.slots)


class Evenly(_FromHeld):
    """Different samples, all sets of them equally likely."""

    def draw(self, rng: np.random.Generator, n: int, progress: float) -> Drawn:
        held = self._held
        if 4 * n > held.count or 4 * held.count < held.num_slots:
            return Drawn(rng.choice(held.slots, n, replace=False), np.ones(n))
        found: dict[int, None] = {}
        while len(found) < n:
            tried = rng.integers(held.num_slots, size=2 * n)
            found |= dict.fromkeys(tried[held.numbers[tried] >= 0].tolist())
        return Drawn(np.array(list(found)[:n], np.int64), np.ones(n))


class ByGroup(_FromHeld):
    """Different samples, as many of every group as of any other, until a group has no more."""

    def __init__(self, held: Held) -> None:
        super().__init__(held)
        self._members: dict[int, list[int]] = {}  # of a group: its slots, in no order
        self._places: dict[int, int] = {}  # of a slot: where it stands among the members of its group
        self._groups: np.ndarray | None = None  # those with members, in ascending order

    def added(self, slots: np.ndarray) -> None:
        for slot in slots.tolist():
            group = int(self._held.group_ids[slot])
            members = self._members.setdefault(group, [])
            if not members:
                self._groups = None
            self._places[slot] = len(members)
            members.append(slot)

    def removed(self, slots: np.ndarray) -> None:
        for slot in slots.tolist():
            members = self._members[int(self._held.group_ids[slot])]
            place, last = self._places.pop(slot), members.pop()
            if last != slot:
                members[place] = last
                self._places[last] = place
            if not members:
                self._groups = None

    def draw(self, rng: np.random.Generator, n: int, progress: float) -> Drawn:
        if self._groups is None:
            self._groups = np.array(sorted(g for g, members in self._members.items() if members), np.int64)
        counts: dict[int, int] = {}
        groups = self._groups
        while n > sum(counts.values()):
            chosen = rng.permutation(groups)[: n - sum(counts.values())].tolist()
            for group in chosen:
                counts[group] = counts.get(group, 0) + 1
            groups = np.array([g for g in groups.tolist() if counts.get(g, 0) < len(self._members[g])], np.int64)
        slots = []
        for group, count in counts.items():
            members = self._members[group]
            slots += [members[i] for i in rng.choice(len(members), count, replace=False).tolist()]
        return Drawn(np.array(slots, np.int64), np.ones(n))

    def state(self) -> dict[str, np.ndarray]:
        """Members in their order, which the next draw depends on."""
        return {"members": np.array([slot for g in sorted(self._members) for slot in self._members[g]], np.int64)}

    def load(self, state: dict[str, np.ndarray]) -> None:
        self._members, self._places, self._groups = {}, {}, None
        self.added(state["members"])


class _ByTree(_FromHeld):
    """Trees are brought up to date when something is drawn: all changes at once cost little more than one."""

    def __init__(self, held: Held) -> None:
        super().__init__(held)
        self._changed: set[int] = set()

    def added(self, slots: np.ndarray) -> None:
        self._changed.update(slots.tolist())

    def removed(self, slots: np.ndarray) -> None:
        self._changed.update(slots.tolist())

    def _changes(self) -> tuple[np.ndarray, np.ndarray]:
        """Slots that changed since the last time, and which of them are in use."""
        slots = np.array(sorted(self._changed), np.int64)
        self._changed.clear()
        return slots, self._held.numbers[slots] >= 0


class ByImportance(_ByTree):
    """With probability P = I^alpha / sum of I^alpha, with repetition, and weights w = (N P)^-beta / max w.

    Prioritized experience replay (Schaul et al., 2016). One sample comes from each of n equal parts of the total, so
    a sample is drawn n P times on average with less spread than by independent draws. beta rises from its first value
    to its last as the run goes on. The largest weight is over all that are held, so that a weight does not depend on
    which others are drawn.
    """

    def __init__(self, held: Held, alpha: float = 0.6, beta: tuple[float, float] = (0.4, 1.0)) -> None:
        super().__init__(held)
        self._alpha, self._beta = alpha, beta
        self._sums, self._least = SegmentTree(np.add, 0.0), SegmentTree(np.minimum, np.inf)

    def draw(self, rng: np.random.Generator, n: int, progress: float) -> Drawn:
        changed, used = self._changes()
        powers = self._held.importance[changed] ** self._alpha
        self._sums.set(changed, np.where(used, powers, 0.0)[:, None])
        self._least.set(changed, np.where(used, powers, np.inf)[:, None])
        total = self._sums.root[0]
        targets = (np.arange(n) + rng.random(n)) * (total / n)
        slots = self._sums.find(targets, np.zeros(n, np.int64))
        first, last = self._beta
        beta = first + (last - first) * min(1.0, max(0.0, progress))
        return Drawn(slots, (self._sums.values(slots)[:, 0] / self._least.root[0]) ** -beta)  # N and the total cancel


class ByClassLoss(_ByTree):
    """With probability proportional to the loss a sample's tokens have on average, by the live loss of their class.

    P = sum over classes of (share of the class in the sample's trained tokens) * (loss of the class), normalised. That
    is a mixture over classes, so it is drawn class first: new losses cost nothing, however many samples are held.
    """

    def __init__(self, held: Held) -> None:
        super().__init__(held)
        self._sums = SegmentTree(np.add, 0.0, NUM_CLASSES)
        self.losses = np.ones(NUM_CLASSES)

    def draw(self, rng: np.random.Generator, n: int, progress: float) -> Drawn:
        changed, used = self._changes()
        self._sums.set(changed, self._held.shares[changed] * used[:, None])
        masses = self._sums.root * self.losses
        if not masses.sum() > 0:  # every class that is held is learned: all are as good
            masses = self._sums.root
        classes = rng.choice(NUM_CLASSES, n, p=masses / masses.sum())
        targets = rng.random(n) * self._sums.root[classes]
        return Drawn(self._sums.find(targets, classes), np.ones(n))

    def state(self) -> dict[str, np.ndarray]:
        return {"losses": self.losses.copy()}

    def load(self, state: dict[str, np.ndarray]) -> None:
        self.losses = np.array(state["losses"])
        super().load(state)
