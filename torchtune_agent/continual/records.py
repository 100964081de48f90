"""Samples as bytes: what a replay buffer holds, in memory or in a mapped file.

A buffer of a million samples made of Python objects would cost many times their content, could not be bounded in bytes
and could only be written with pickle. A record is JSON and raw arrays, so reading one never executes anything.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchtune_agent.errors import UserError

_PLAIN, _DEFLATED = b"\0", b"\1"
_WORTH_DEFLATING = 256  # bytes; less gains nothing
_SMALLEST = 1 << 16


def encode(sample: Any) -> bytes:
    """A sample as a record: a JSON value, or a mapping whose values are JSON values, numpy arrays or tensors."""
    arrays: list[bytes] = []
    if isinstance(sample, Mapping):
        sample = {key: _described(value, arrays) for key, value in sample.items()}
        outer = "mapping"
    else:
        sample = _described(sample, arrays)
        outer = "value"
    try:
        head = json.dumps([outer, sample], allow_nan=True, separators=(",", ":")).encode()
    except TypeError as error:
        raise UserError(
            f"replay: a sample cannot be kept: {error}. Samples are made of JSON values, numpy arrays and tensors."
        ) from error
    body = b"".join([len(head).to_bytes(4, "little"), head, *arrays])
    return _PLAIN + body if len(body) < _WORTH_DEFLATING else _DEFLATED + zlib.compress(body, 1)


def _described(value: Any, arrays: list[bytes]) -> list[Any]:
    """[kind, ...] of one value; the content of an array goes to `arrays`."""
    if isinstance(value, torch.Tensor):
        whole = value.detach().cpu().contiguous()
        arrays.append(whole.reshape(-1).view(torch.uint8).numpy().tobytes())
        return ["tensor", str(whole.dtype).removeprefix("torch."), list(whole.shape), len(arrays[-1])]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise UserError("replay: a sample has an array of Python objects. Give an array of numbers.")
        arrays.append(value.tobytes())
        return ["array", value.dtype.str, list(value.shape), len(arrays[-1])]
    return ["json", value]


def decode(record: bytes) -> Any:
    """The sample that `encode` was given. Tuples come back as lists, as in JSON."""
    body = record[1:] if record[:1] == _PLAIN else zlib.decompress(record[1:])
    at = 4 + int.from_bytes(body[:4], "little")
    outer, described = json.loads(body[4:at])
    values = {}
    for key, (kind, *rest) in described.items() if outer == "mapping" else [("", described)]:
        if kind == "json":
            values[key] = rest[0]
            continue
        dtype, shape, size = rest
        content = np.frombuffer(bytearray(body[at : at + size]), np.uint8)  # a copy that may be written to
        at += size
        if kind == "tensor":
            values[key] = torch.from_numpy(content).view(getattr(torch, dtype)).reshape(shape)
        else:
            values[key] = content.view(dtype).reshape(shape)
    return values if outer == "mapping" else values[""]


class Records:
    """Records by slot, end to end in one array, in memory or in a mapped `file`.

    A record that is removed leaves a gap. When the array is full, gaps are closed where they are half of it, and it
    is doubled otherwise: either way a byte is moved about once for every byte written.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._content = self._allocate(_SMALLEST)
        self._end = 0
        self.held = 0  # bytes of all records
        self._starts, self._sizes = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def _allocate(self, size: int) -> np.ndarray:
        if self._file is None:
            return np.zeros(size, np.uint8)
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("ab") as file:
                file.truncate(size)
        except OSError as error:
            raise UserError(
                f"spill_to={self._file}: cannot be written: {error.strerror}. Name a file on a disk with room."
            ) from error
        return np.memmap(self._file, np.uint8, mode="r+", shape=(size,))

    def put(self, slot: int, record: bytes) -> None:
        """Write into an empty slot."""
        if slot >= len(self._sizes):
            grown = max(64, 2 * slot)
            self._starts, self._sizes = (_resized(a, grown) for a in (self._starts, self._sizes))
        if self._end + len(record) > len(self._content):
            self._make_room(len(record))
        self._content[self._end : self._end + len(record)] = np.frombuffer(record, np.uint8)
        self._starts[slot], self._sizes[slot] = self._end, len(record)
        self._end += len(record)
        self.held += len(record)

    def _make_room(self, size: int) -> None:
        if 2 * self.held <= self._end:
            self.compact()
        capacity = len(self._content)
        while self._end + size > capacity:
            capacity *= 2
        if capacity > len(self._content):
            before = self._content
            self._content = self._allocate(capacity)
            if self._file is None:
                self._content[: self._end] = before[: self._end]

    def get(self, slot: int) -> bytes:
        start = int(self._starts[slot])
        return self._content[start : start + int(self._sizes[slot])].tobytes()

    def size(self, slot: int) -> int:
        return int(self._sizes[slot])

    def remove(self, slot: int) -> None:
        self.held -= int(self._sizes[slot])
        self._sizes[slot] = 0

    def compact(self) -> None:
        """Close the gaps."""
        used = np.flatnonzero(self._sizes)
        self._end = 0
        for slot in used[np.argsort(self._starts[used], kind="stable")].tolist():
            start, size = int(self._starts[slot]), int(self._sizes[slot])
            if start != self._end:
                self._content[self._end : self._end + size] = self._content[start : start + size]
            self._starts[slot] = self._end
            self._end += size

    def state(self, num_slots: int) -> dict[str, np.ndarray]:
        """Everything that is held, as arrays."""
        self.compact()
        starts, sizes = (_resized(a[:num_slots], num_slots) for a in (self._starts, self._sizes))
        return {"starts": starts, "sizes": sizes, "content": np.array(self._content[: self._end])}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        content = state["content"]
        self._content = self._allocate(max(_SMALLEST, len(content)))
        self._content[: len(content)] = content
        self._starts, self._sizes = np.array(state["starts"]), np.array(state["sizes"])
        self._end, self.held = len(content), int(self._sizes.sum())


def _resized(array: np.ndarray, size: int) -> np.ndarray:
    grown = np.zeros(size, array.dtype)
    grown[: len(array)] = array
    return grown
