"""Exact greedy k-center: again and again the sample that is farthest from all that were picked.

The plain loop reads every vector once per pick, and is as slow as memory. Here distances go stale: a distance can only
shrink as centers are added, so an old one is an upper bound. The samples with the largest bounds are the working set;
they are brought up to date by matrix products, many centers at once, and picks are made among them alone as long as the
best of them is at least as far as any bound outside. What is picked is what the plain loop picks. The worst case stays
O(n * k) distances, all of them within matrix products.
"""

from dataclasses import dataclass

import torch

_SMALLEST, _LARGEST = 1024, 4096  # a working set
_ROWS, _CENTERS = 2048, 1024  # of one block of distances
_FEW_PICKS, _MANY_PICKS = 8, 64  # of one working set; the next one is larger or smaller then


@dataclass(frozen=True)
class Centers:
    picks: torch.Tensor  # int64 [number], rows of the vectors, in the order they were picked
    distances: torch.Tensor  # [number], of each pick to all before it; infinite for a first one
    radius: float  # the largest distance of any vector to its nearest center


def k_center(vectors: torch.Tensor, number: int, given: torch.Tensor | None = None) -> Centers:
    """Pick `number` rows of `vectors` [n, d].

    Args:
        vectors: on any device, where the work is done.
        number: at most n.
        given: centers that are there already [m, d]. Where there are none, the first pick is the vector that is
            nearest to the mean of all.
    """
    assert 0 <= number <= len(vectors)
    return _Greedy(vectors, number, given).run()


class _Greedy:
    def __init__(self, vectors: torch.Tensor, number: int, given: torch.Tensor | None) -> None:
        self.vectors = vectors
        self.number = number
        self.squares = squares(vectors)
        self.centers = vectors.new_empty(number, vectors.shape[1])
        self.center_squares = vectors.new_empty(number)
        self.picks: list[int] = []
        self.distances: list[float] = []
        self.bound = torch.full_like(self.squares, torch.inf)  # squared, of what `applied` centers leave
        self.applied = torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
        if given is not None and len(given):
            self.bound = nearest(vectors, given)
        elif number:
            self._pick(int(nearest(vectors, vectors.mean(0, keepdim=True)).argmin()), torch.inf)

    def run(self) -> Centers:
        size = _SMALLEST
        while len(self.picks) < self.number:
            picks = self._round(size)
            if picks < _FEW_PICKS:
                size = min(2 * size, _LARGEST)
            elif picks > _MANY_PICKS:
                size = max(size // 2, _SMALLEST)
        picks = torch.tensor(self.picks, dtype=torch.int64)
        distances = torch.tensor(self.distances, dtype=torch.float64)
        return Centers(picks, distances.clamp(min=0).sqrt(), self._radius())

    def _radius(self) -> float:
        """Found as a next pick would be."""
        while len(self.bound):
            rows = self.bound.topk(min(_SMALLEST, len(self.bound))).indices
            if self.applied[rows[0]] == len(self.picks):
                return max(0.0, float(self.bound[rows[0]])) ** 0.5
            self._catch_up(rows)
        return 0.0

    def _round(self, size: int) -> int:
        """Pick from one working set; returns how many."""
        largest = self.bound.topk(min(size + 1, len(self.bound)))
        outside = float(largest.values[-1]) if len(largest.values) > size else -torch.inf
        rows = largest.indices[:size].sort().values  # of equals, the first is picked
        self._catch_up(rows)
        vectors, own_squares, bound = self.vectors[rows], self.squares[rows], self.bound[rows]
        before = len(self.picks)
        while len(self.picks) < self.number:
            farthest = int(bound.argmax())
            distance = float(bound[farthest])
            if distance < outside:
                break
            center = len(self.picks)
            self._pick(int(rows[farthest]), distance)
            new = own_squares + self.center_squares[center] - 2 * (vectors @ self.centers[center])
            bound = torch.minimum(bound, new.clamp_(min=0))
            bound[farthest] = -1.0
        self.bound[rows] = bound
        self.applied[rows] = len(self.picks)
        return len(self.picks) - before

    def _pick(self, row: int, distance: float) -> None:
        center = len(self.picks)
        self.centers[center] = self.vectors[row]
        self.center_squares[center] = self.squares[row]
        self.picks.append(row)
        self.distances.append(distance)
        self.bound[row] = -1.0  # less than any distance: never picked again

    def _catch_up(self, rows: torch.Tensor) -> None:
        """Apply to `rows` the centers they have not seen; those that lag alike share a block."""
        order = self.applied[rows].argsort(stable=True)
        for block in rows[order].split(_ROWS):
            first = int(self.applied[block[0]])
            centers = self.centers[first : len(self.picks)]
            if len(centers):
                found = nearest(self.vectors[block], centers, self.squares[block])
                self.bound[block] = torch.minimum(self.bound[block], found)
            self.applied[block] = len(self.picks)


def nearest(vectors: torch.Tensor, centers: torch.Tensor, vector_squares: torch.Tensor | None = None) -> torch.Tensor:
    """The squared distance of every vector [n, d] to the nearest of `centers` [m, d], [n]."""
    own = squares(vectors) if vector_squares is None else vector_squares
    others = squares(centers)
    found = torch.full_like(own, torch.inf)
    for start in range(0, len(vectors), _ROWS):
        rows = slice(start, start + _ROWS)
        for first in range(0, len(centers), _CENTERS):
            block = slice(first, first + _CENTERS)
            distances = torch.addmm(others[block], vectors[rows], centers[block].t(), alpha=-2.0)
            torch.minimum(found[rows], distances.amin(1), out=found[rows])
    return found.add_(own).clamp_(min=0)


def squares(vectors: torch.Tensor) -> torch.Tensor:
    """The squared length of every vector, without a second matrix as large as the first."""
    return (
        torch.cat([(block * block).sum(1) for block in vectors.split(65536)]) if len(vectors) else vectors.new_empty(0)
    )
