"""The weights in a Hugging Face folder, one tensor at a time, in our names and layout.

Files are mapped, not read: a tensor costs memory while someone holds it, the pages behind it are shared by all
processes of a machine, and a rank that wants a few rows of a matrix reads those rows.
"""

import json
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from torchtune_agent.errors import UserError
from torchtune_agent.models.conversion import Conversion

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Weights(MutableMapping[str, torch.Tensor]):
    """A model's weights by name, of which a caller may ask for the shape, or for some rows only."""

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self[name].shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self[name][start:stop]


class HeldWeights(Weights):
    """Weights in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self._tensors[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class HFWeights(Weights):
    """What the safetensors files of a folder hold. A tensor that is set replaces the file's in this mapping alone."""

    def __init__(self, folder: Path, conversion: Conversion) -> None:
        self._folder = folder
        self._conversion = conversion
        self._open: dict[str, Any] = {}
        self._places: dict[str, tuple[str, str]] = {}  # our name: (file, name in it)
        self._stacks: dict[str, list[tuple[str, str]]] = {}  # the same of every expert in a stack
        self._replaced: dict[str, torch.Tensor] = {}
        files = files_by_name(folder)
        for theirs, file in files.items():
            ours = conversion.from_hf(theirs)
            if ours is not None:
                self._places[ours] = (file, theirs)
        for ours in self._places:
            experts = conversion.experts_of(ours)
            if experts is not None:
                self._stacks[ours] = self._stack(experts, files)

    def _stack(self, experts: list[str], files: Mapping[str, str]) -> list[tuple[str, str]]:
        missing = next((name for name in experts if name not in files), None)
        if missing is not None:
            raise UserError(f"model_dir: {self._folder} lacks {missing!r}. Download the checkpoint again.")
        return [(files[name], name) for name in experts]

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._replaced:
            return self._replaced[name]
        if name in self._stacks:
            return torch.stack([self._tensor(*place) for place in self._stacks[name]])
        return self._conversion.rows_from_hf(name, self._tensor(*self._places[name]))

    def _tensor(self, file: str, theirs: str) -> torch.Tensor:
        try:
            return self._file(file).get_tensor(theirs)
        except SafetensorError as error:
            raise _broken(self._folder / file, error) from error

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._replaced:
            return tuple(self._replaced[name].shape)
        file, theirs = self._places[name]
        shape = tuple(self._file(file).get_slice(theirs).get_shape())
        return (len(self._stacks[name]), *shape) if name in self._stacks else shape

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name in self._replaced or self._conversion.reorders(name):
            return self[name][start:stop]
        if name in self._stacks:
            some = [self._tensor(*place) for place in self._stacks[name][start:stop]]
            return torch.stack(some) if some else torch.empty(0, *self.shape(name)[1:])
        file, theirs = self._places[name]
        try:
            return self._file(file).get_slice(theirs)[start:stop]
        except SafetensorError as error:
            raise _broken(self._folder / file, error) from error

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self._replaced[name] = tensor

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        self._places.pop(name, None)
        self._stacks.pop(name, None)
        self._replaced.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        yield from self._places
        yield from (name for name in self._replaced if name not in self._places)

    def __len__(self) -> int:
        return len(self._places.keys() | self._replaced.keys())

    def __contains__(self, name: object) -> bool:  # without this, asking would read the tensor
        return name in self._places or name in self._replaced

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = open_safetensors(self._folder / name)
        return self._open[name]


def open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise UserError(f"model_dir: {path} is missing. Download the checkpoint again.") from error
    except (OSError, SafetensorError) as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> UserError:
    return UserError(f"model_dir: {path} cannot be read ({error}). Download the checkpoint again.")


def files_by_name(folder: Path) -> dict[str, str]:
    """Hugging Face's name of every weight, and the file it is in."""
    index = folder / INDEX
    if index.exists():
        try:
            return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"model_dir: {index} is not an index of weights: {error!r}.") from error
    if (folder / SINGLE).exists():
        return dict.fromkeys(open_safetensors(folder / SINGLE).keys(), SINGLE)
    older = " It holds .bin files: convert them to safetensors first." if list(folder.glob("*.bin")) else ""
    raise UserError(f"model_dir: {folder} holds neither {SINGLE} nor {INDEX}.{older}")
