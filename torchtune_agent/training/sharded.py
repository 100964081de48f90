"""Tensors of all ranks in one folder, each rank writing and reading its own shards: torch's distributed checkpoint.

Its layout is a pickle, and it would unpickle whatever the layout calls bytes. A checkpoint may come from anywhere, so
here only tensors are written, the layout is read by an unpickler that knows no other classes than its own, and a layout
that holds anything but tensors, or names files elsewhere, is refused.
"""

import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict

from torchtune_agent.training.checkpoints import Damaged

_LAYOUT = ".metadata"
_OF_LAYOUT = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
}
# Where the checkpoint was written: a path, of which only the text matters, and not even that.
_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path")


class SaveFailed(Exception):
    """Tensors could not be written; says why, as the disk put it."""


class _LayoutUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name in _OF_LAYOUT.get(module_name, ()):
            return super().find_class(module_name, global_name)
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        if module_name.split(".")[0] == "pathlib" and global_name in _PATHS:
            return lambda *parts: "/".join(map(str, parts))
        raise Damaged(f"{_LAYOUT} names {module_name}.{global_name}, which has no place in a checkpoint")


def read_layout(folder: Path) -> Metadata:
    """Names, shapes, types and places of all tensors in `folder`. Executes nothing that is written there."""
    try:
        with (folder / _LAYOUT).open("rb") as file:
            layout = _LayoutUnpickler(file).load()
    except Damaged:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise Damaged(f"{_LAYOUT} cannot be read ({type(error).__name__})") from error
    if not isinstance(layout, Metadata) or not isinstance(layout.storage_data, dict):
        raise Damaged(f"{_LAYOUT} is no layout of tensors")
    for name, tensor in layout.state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata):
            raise Damaged(f"{_LAYOUT} says that {name} is not a tensor")
    for stored in layout.storage_data.values():
        if Path(stored.relative_path).name != stored.relative_path or stored.transform_descriptors:
            raise Damaged(f"{_LAYOUT} names the file {stored.relative_path}, which it must not")
    return layout


class _Reader(FileSystemReader):
    """Reads the layout with `read_layout`, and tensors as torch does it, `weights_only`."""

    def __init__(self, folder: Path, layout: Metadata | None = None) -> None:
        super().__init__(folder)
        self._layout = layout

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        layout = self._layout or read_layout(Path(self.path))
        layout.storage_meta = StorageMeta(load_id=self.load_id)
        return layout


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise Damaged("it holds bytes in place of a tensor")


def save(folder: Path, tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup) -> None:
    """Write `tensors`, on every rank at the same time. What all ranks have alike is written once."""
    try:
        save_state_dict(dict(tensors), storage_writer=FileSystemWriter(folder), process_group=group)
    except CheckpointException as error:  # not an Exception
        cause = next(failure for failure, _ in error.failures.values())
        if (reason := disk_problem(cause)) is not None:
            raise SaveFailed(reason) from error
        raise RuntimeError(f"saving failed: {error}") from error


def load(
    folder: Path, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None, layout: Metadata | None = None
) -> None:
    """Fill `tensors`, which have the shapes they were saved with, on every rank at the same time; None: in this process
    alone. `layout` is the folder's, where it was read already."""
    alone: dict[str, Any] = {"no_dist": True} if group is None else {"process_group": group}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is meant to be
            load_state_dict(tensors, storage_reader=_Reader(folder, layout), planner=_Planner(), **alone)
    except CheckpointException as error:  # not an Exception
        cause = next(failure for failure, _ in error.failures.values())
        raise Damaged(f"its tensors cannot be loaded ({type(cause).__name__}: {cause})") from error


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors in a folder, put together from all ranks' shards, each when it is asked for. Needs no group."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._layout = read_layout(folder)
        self._stored: dict[str, Any] = dict(self._layout.state_dict_metadata)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._stored[name].size)

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._stored[name]
        tensors = {name: torch.empty(stored.size, dtype=stored.properties.dtype)}
        load(self._folder, tensors, None, self._layout)
        return tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def disk_problem(error: BaseException) -> str | None:
    """What the disk refused, where that is why writing failed; None where something else is wrong."""
    text = str(error)
    if isinstance(error, OSError):
        return error.strerror or text
    if isinstance(error, SafetensorError) and "I/O error: " in text:
        return text.partition("I/O error: ")[2]
    if "PytorchStreamWriter" in text or "unexpected pos" in text:
        return "the disk took only part of a file; it is full, or fails"
    return None
