"""A tree of sums or minima over slots: changes one and finds one in logarithmic time, many at once in numpy.

Every inner node is made from its two children whenever one of them changes, so nothing drifts: a tree rebuilt from its
leaves is the same to the last bit.
"""

import numpy as np


class SegmentTree:
    """`columns` trees over the same slots; `combine` is np.add or np.minimum, `empty` its neutral value."""

    def __init__(self, combine: np.ufunc, empty: float, columns: int = 1) -> None:
        self._combine, self._empty, self._columns = combine, empty, columns
        self._capacity = 64
        self._nodes = np.full((2 * self._capacity, columns), empty)  # node n has the children 2n and 2n + 1

    def set(self, slots: np.ndarray, values: np.ndarray) -> None:
        """Give `slots` [n] their values [n, columns]."""
        if len(slots) == 0:
            return
        self._grow(int(slots.max()) + 1)
        nodes = slots + self._capacity
        self._nodes[nodes] = values
        while nodes[0] > 1:
            nodes = nodes >> 1
            self._nodes[nodes] = self._combine(self._nodes[2 * nodes], self._nodes[2 * nodes + 1])

    def _grow(self, num_slots: int) -> None:
        if num_slots <= self._capacity:
            return
        leaves = self._nodes[self._capacity :]
        self._capacity = 1 << (num_slots - 1).bit_length()
        self._nodes = np.full((2 * self._capacity, self._columns), self._empty)
        self._nodes[self._capacity : self._capacity + len(leaves)] = leaves
        first = self._capacity // 2
        while first >= 1:
            children = self._nodes[2 * first : 4 * first]
            self._nodes[first : 2 * first] = self._combine(children[0::2], children[1::2])
            first //= 2

    @property
    def root(self) -> np.ndarray:
        """[columns]: all slots combined."""
        return self._nodes[1]

    def values(self, slots: np.ndarray) -> np.ndarray:
        """[n, columns]"""
        return self._nodes[slots + self._capacity]

    def find(self, targets: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Where the running sum of a column first exceeds its target: slots [n], for targets [n] below its total."""
        targets = targets.astype(float)
        nodes = np.ones(len(targets), np.int64)
        sums = self._nodes
        while len(nodes) and nodes[0] < self._capacity:
            left = sums[2 * nodes, column]
            right = (targets >= left) & (sums[2 * nodes + 1, column] > 0)  # rounding must not lead to an empty slot
            targets -= np.where(right, left, 0.0)
            nodes = 2 * nodes + right
        return nodes - self._capacity
