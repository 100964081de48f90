"""Tokenized samples: a few flat arrays, in memory or mapped from files, which cost no more than their bytes.

Tokens stand end to end. What is said of them (class, call, weight) changes rarely from one token to the next, so it
is kept as runs of equal ones.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from torchtune_agent.data.encode import Encoded

_TOKEN = np.dtype("<i4")
_RUN = np.dtype([("length", "<u4"), ("token_class", "u1"), ("call_index", "<i4"), ("weight", "<f4")])
_CALL = np.dtype("<i4")  # what each call calls, a number in a table of names
# Where a sample's tokens, runs and calls end; the record it was made of, by its number in source `source`; and what
# that says it is from, a number in the table of names.
_SAMPLE = np.dtype(
    [("tokens", "<i8"), ("runs", "<i8"), ("calls", "<i8"), ("source", "<i4"), ("number", "<i8"), ("origin", "<i4")]
)
_DTYPES = {"tokens": _TOKEN, "runs": _RUN, "calls": _CALL, "samples": _SAMPLE}
_FLAT = ("tokens", "runs", "calls")
_SUMMARY = "summary.json"
_BLOCK = 1 << 20  # entries


@dataclass(frozen=True)
class Part:
    """Some samples, flat. `samples` counts from the beginning of the part; `names` is its table of names."""

    tokens: np.ndarray
    runs: np.ndarray
    calls: np.ndarray
    samples: np.ndarray
    names: list[str]

    @classmethod
    def of(cls, encoded: Sequence[Encoded], numbers: Sequence[int]) -> "Part":
        """`numbers` says which record of the source each sample was made of."""
        names: dict[str, int] = {}
        runs = [_runs(sample) for sample in encoded]
        calls = [names.setdefault(name, len(names)) for sample in encoded for name in sample.tools]
        samples = np.zeros(len(encoded), _SAMPLE)
        samples["tokens"] = np.cumsum([len(sample.tokens) for sample in encoded])
        samples["runs"] = np.cumsum([len(run) for run in runs])
        samples["calls"] = np.cumsum([len(sample.tools) for sample in encoded])
        samples["number"] = numbers
        samples["origin"] = [names.setdefault(sample.origin, len(names)) for sample in encoded]
        tokens = np.concatenate([np.zeros(0, _TOKEN), *(sample.tokens for sample in encoded)]).astype(_TOKEN)
        return cls(tokens, np.concatenate([np.zeros(0, _RUN), *runs]), np.array(calls, _CALL), samples, list(names))

    def renamed(self, source: int, table: dict[str, int]) -> "Part":
        """The same as a part of source `source`, with its names numbered (and entered) in `table`."""
        numbers = np.array([table.setdefault(name, len(table)) for name in self.names], _CALL)
        samples = self.samples.copy()
        samples["source"] = source
        samples["origin"] = numbers[samples["origin"]]
        return Part(self.tokens, self.runs, numbers[self.calls], samples, [])


def _behind(parts: Iterable[Part]) -> Iterator[Part]:
    """The parts as pieces of one store: each counts from the end of the one before."""
    sizes = dict.fromkeys(_FLAT, 0)
    for part in parts:
        samples = part.samples.copy()
        for name in _FLAT:
            samples[name] += sizes[name]
            sizes[name] += len(getattr(part, name))
        yield replace(part, samples=samples)


def _runs(sample: Encoded) -> np.ndarray:
    columns = (sample.token_class, sample.call_index, sample.weights)
    changes = np.zeros(max(0, len(sample.tokens) - 1), bool)
    for column in columns:
        changes |= column[1:] != column[:-1]
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])[: len(sample.tokens)]
    runs = np.zeros(len(starts), _RUN)
    runs["length"] = np.diff(starts, append=len(sample.tokens))
    for name, column in zip(("token_class", "call_index", "weight"), columns, strict=True):
        runs[name] = column[starts]
    return runs


class TokenStore:
    """Random access to tokenized samples. `summary` is what its maker wanted remembered, as JSON; `folder` is where the
    store is kept, None in memory."""

    def __init__(
        self,
        tokens: np.ndarray,
        runs: np.ndarray,
        calls: np.ndarray,
        samples: np.ndarray,
        summary: dict[str, Any],
        folder: Path | None = None,
    ) -> None:
        self._tokens, self._runs, self._calls, self._samples = tokens, runs, calls, samples
        self.summary = summary
        self.folder = folder
        self._digest: str | None = None

    @classmethod
    def in_memory(cls, parts: Iterable[Part], summary: dict[str, Any]) -> "TokenStore":
        """`summary` may still be filled while `parts` are made."""
        gathered = list(_behind([Part.of([], []), *parts]))
        tokens, runs, calls, samples = (np.concatenate([getattr(part, name) for part in gathered]) for name in _DTYPES)
        return cls(tokens, runs, calls, samples, summary)

    @classmethod
    def write(cls, folder: Path, parts: Iterable[Part], summary: dict[str, Any]) -> None:
        """Write a store into the new `folder`, part by part; `summary` as for `in_memory`."""
        folder.mkdir(parents=True)
        with ExitStack() as stack:
            files = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in _DTYPES}
            for part in _behind(parts):
                for name, file in files.items():
                    file.write(getattr(part, name).tobytes())
            sizes = {name: file.tell() for name, file in files.items()}
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        with (folder / _SUMMARY).open("w", encoding="utf-8") as file:
            json.dump({"sizes": sizes, "summary": summary}, file, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def open(cls, folder: Path) -> "TokenStore | None":
        """The store in `folder`; None where there is none, or where its files are not of the size they were written."""
        try:
            written = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
            if any((folder / f"{name}.bin").stat().st_size != size for name, size in written["sizes"].items()):
                return None
        except (OSError, ValueError, KeyError):
            return None
        tokens, runs, calls, samples = (_map(folder / f"{name}.bin", dtype) for name, dtype in _DTYPES.items())
        return cls(tokens, runs, calls, samples, written["summary"], folder)

    def fingerprint(self) -> str:
        """Of every sample: equal ones mean equal samples in the same order, wherever they were read from."""
        if self._digest is None:
            digest = hashlib.blake2b(digest_size=16)
            for array in (self._tokens, self._runs, self._samples["tokens"], self._samples["runs"]):
                for start in range(0, len(array), _BLOCK):
                    digest.update(np.ascontiguousarray(array[start : start + _BLOCK]).tobytes())
            self._digest = digest.hexdigest()
        return self._digest

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Encoded:
        """The sample, without its number of cut tokens and names."""
        tokens, runs, _ = self._slices(index)
        labels = self._runs[runs]
        lengths = labels["length"]
        return Encoded(
            np.array(self._tokens[tokens]),
            np.repeat(labels["token_class"], lengths),
            np.repeat(labels["call_index"], lengths),
            np.repeat(labels["weight"], lengths),
        )

    def _slices(self, index: int) -> tuple[slice, slice, slice]:
        index = range(len(self))[index]
        first = self._samples[index - 1] if index else np.zeros((), _SAMPLE)
        after = self._samples[index]
        tokens, runs, calls = (slice(int(first[name]), int(after[name])) for name in _FLAT)
        return tokens, runs, calls

    def record_of(self, index: int) -> tuple[int, int]:
        """The source and number of the record that a sample was made of."""
        sample = self._samples[index]
        return int(sample["source"]), int(sample["number"])

    def origin(self, index: int) -> int:
        """What the record says it is from, a number in the table of names."""
        return int(self._samples[index]["origin"])

    def calls(self, index: int) -> list[int]:
        """What each call of a sample calls, as numbers in the table of names."""
        return self._calls[self._slices(index)[2]].tolist()

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in every sample."""
        return np.diff(self._samples["tokens"], prepend=0)


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:  # nothing to map
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")
