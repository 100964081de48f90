"""Several data sets one after the other, and who each sample is."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np


@dataclass(frozen=True)
class SampleInfo:
    """What a sample is called, for those who read of it."""

    where: str  # of its record: file:line, or source[index]
    source: str  # what the record says it is from (its `source`), else its file
    tools: tuple[str, ...]  # the name in every call


class JoinedDataset:
    """Map-style data sets end to end.

    `lengths` are the tokens of every sample, or None where not every data set knows them without reading.
    """

    def __init__(self, datasets: Mapping[str, Any]) -> None:
        """`datasets` by what they are called where they have no names for their samples."""
        self._names, self._parts = list(datasets), list(datasets.values())
        self._starts = [0, *accumulate(len(part) for part in self._parts)]
        lengths = [getattr(part, "lengths", None) for part in self._parts]
        known = [one for one in lengths if isinstance(one, np.ndarray)]
        self.lengths = np.concatenate(known) if len(known) == len(lengths) else None

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        part, inside = self._find(index)
        return self._parts[part][inside]

    def info(self, index: int) -> SampleInfo:
        part, inside = self._find(index)
        own = getattr(self._parts[part], "info", None)
        name = self._names[part]
        return own(inside) if own is not None else SampleInfo(f"{name}[{inside}]", name, ())

    def _find(self, index: int) -> tuple[int, int]:
        index = range(len(self))[index]
        part = bisect_right(self._starts, index) - 1
        return part, index - self._starts[part]
