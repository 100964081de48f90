"""Tokenized samples: a few flat arrays, in memory or mapped from files, which cost no more than their bytes.

Tokens stand end to end. What is said of them (class, call, weight) changes rarely from one token to the next, so it
is kept as runs of equal ones.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchtune_agent.data.encode import Encoded

_TOKEN = np.dtype("<i4")
_RUN = np.dtype([("length", "<u4"), ("token_class", "u1"), ("call_index", "<i4"), ("weight", "<f4")])
# Where a sample's tokens and runs end, and the record it was made of: its number in source `source`.
_SAMPLE = np.dtype([("tokens", "<i8"), ("runs", "<i8"), ("source", "<i4"), ("number", "<i8")])
_DTYPES = {"tokens": _TOKEN, "runs": _RUN, "samples": _SAMPLE}
_SUMMARY = "summary.json"


@dataclass(frozen=True)
class Part:
    """Some samples, flat; `samples` counts from the beginning of the part."""

    tokens: np.ndarray
    runs: np.ndarray
    samples: np.ndarray

    @classmethod
    def of(cls, encoded: Sequence[Encoded], numbers: Sequence[int], source: int = 0) -> "Part":
        """`numbers` says which record of `source` each sample was made of."""
        runs = [_runs(sample) for sample in encoded]
        samples = np.zeros(len(encoded), _SAMPLE)
        samples["tokens"] = np.cumsum([len(sample.tokens) for sample in encoded])
        samples["runs"] = np.cumsum([len(run) for run in runs])
        samples["source"], samples["number"] = source, numbers
        tokens = [np.zeros(0, _TOKEN), *(sample.tokens for sample in encoded)]
        return cls(np.concatenate(tokens).astype(_TOKEN), np.concatenate([np.zeros(0, _RUN), *runs]), samples)

    def moved(self, tokens: int, runs: int) -> "Part":
        """The same behind that many tokens and runs."""
        samples = self.samples.copy()
        samples["tokens"] += tokens
        samples["runs"] += runs
        return Part(self.tokens, self.runs, samples)


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
        samples: np.ndarray,
        summary: dict[str, Any],
        folder: Path | None = None,
    ) -> None:
        self._tokens, self._runs, self._samples = tokens, runs, samples
        self.summary = summary
        self.folder = folder

    @classmethod
    def in_memory(cls, parts: Iterable[Part], summary: dict[str, Any]) -> "TokenStore":
        """`summary` may still be filled while `parts` are made."""
        gathered = [Part.of([], [])]
        num_tokens = num_runs = 0
        for part in parts:
            gathered.append(part.moved(num_tokens, num_runs))
            num_tokens += len(part.tokens)
            num_runs += len(part.runs)
        tokens, runs, samples = (np.concatenate([getattr(part, name) for part in gathered]) for name in _DTYPES)
        return cls(tokens, runs, samples, summary)

    @classmethod
    def write(cls, folder: Path, parts: Iterable[Part], summary: dict[str, Any]) -> None:
        """Write a store into the new `folder`, part by part."""
        folder.mkdir(parents=True)
        files = {name: (folder / f"{name}.bin").open("wb") for name in _DTYPES}
        try:
            num_tokens = num_runs = 0
            for part in parts:
                part = part.moved(num_tokens, num_runs)
                for name, file in files.items():
                    file.write(getattr(part, name).tobytes())
                num_tokens += len(part.tokens)
                num_runs += len(part.runs)
            sizes = {name: file.tell() for name, file in files.items()}
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        finally:
            for file in files.values():
                file.close()
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
        tokens, runs, samples = (_map(folder / f"{name}.bin", dtype) for name, dtype in _DTYPES.items())
        return cls(tokens, runs, samples, written["summary"], folder)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Encoded:
        index = range(len(self))[index]
        first = self._samples[index - 1] if index else np.zeros((), _SAMPLE)
        after = self._samples[index]
        runs = self._runs[first["runs"] : after["runs"]]
        lengths = runs["length"]
        return Encoded(
            np.array(self._tokens[first["tokens"] : after["tokens"]]),
            np.repeat(runs["token_class"], lengths),
            np.repeat(runs["call_index"], lengths),
            np.repeat(runs["weight"], lengths),
        )

    def record_of(self, index: int) -> tuple[int, int]:
        """The source and number of the record that a sample was made of."""
        sample = self._samples[index]
        return int(sample["source"]), int(sample["number"])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in every sample."""
        return np.diff(self._samples["tokens"], prepend=0)


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:  # nothing to map
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")
