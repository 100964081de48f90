"""Several data sets one after the other, and who each sample is."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable

import numpy as np

from torchtune_agent.data.fingerprint import combine

_NUM_PROBED = 64


@dataclass(frozen=True)
class SampleInfo:
    """What a sample is called, for those who read of it."""

    where: str  # of its record: file:line, or source[index]
    source: str  # what the record says it is from (its `source`), else its file
    tools: tuple[str, ...]  # the name in every call


@runtime_checkable
class Known(Protocol):
    """A data set that knows what its samples are without reading them all."""

    def fingerprint(self) -> str: ...


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

    @property
    def parts(self) -> list[range]:
        """Which samples are from which data set."""
        return [range(first, end) for first, end in zip(self._starts, self._starts[1:], strict=False)]

    def info(self, index: int) -> SampleInfo:
        part, inside = self._find(index)
        own = getattr(self._parts[part], "info", None)
        name = self._names[part]
        return own(inside) if own is not None else SampleInfo(f"{name}[{inside}]", name, ())

    def fingerprint(self) -> str:
        """Of all samples, by content; of a data set that does not know its own, of a few of its samples."""
        return combine([part.fingerprint() if isinstance(part, Known) else _of_some(part) for part in self._parts])

    def _find(self, index: int) -> tuple[int, int]:
        index = range(len(self))[index]
        part = bisect_right(self._starts, index) - 1
        return part, index - self._starts[part]


def _of_some(part: Any) -> str:
    """Of how many samples there are, and of the tokens and labels of some: reading all may mean tokenizing them."""
    chosen = sorted({len(part) * i // _NUM_PROBED for i in range(_NUM_PROBED)}) if len(part) else []
    samples = [part[i] for i in chosen]
    return combine([len(part), [[list(map(int, sample[key])) for key in ("tokens", "labels")] for sample in samples]])
