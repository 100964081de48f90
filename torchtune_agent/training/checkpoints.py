"""The folder of checkpoints to resume from: what makes one whole, what is wrong with a damaged one, which may go.

    checkpoints/latest              the name of the newest
    checkpoints/step_40/            one checkpoint, as the run was after step 40
        manifest.json               what the checkpoint is of, and size and SHA-256 of every other file
        run.pt, rank_0.pt, ...      see state.py
        tensors/                    see sharded.py
    checkpoints/.step_60.partial/   one that is being written, or was when the run was killed

A checkpoint is written aside and renamed when all of it is on disk: `step_N` is whole, or was damaged afterwards.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

MANIFEST = "manifest.json"
_LATEST = "latest"
_NAME = re.compile(r"step_(\d+)")
_BLOCK_BYTES = 1 << 22


class Damaged(Exception):
    """A checkpoint is not as it was written; says which file, and what is wrong with it."""


@dataclass(frozen=True)
class Stored:
    """A file as it was written."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "Stored":
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as file:
            while content := file.read(_BLOCK_BYTES):
                digest.update(content)
                size += len(content)
        return cls(size, digest.hexdigest())


@dataclass(frozen=True)
class Best:
    """The best value of the metric that `keep_best` names, and the step that had it."""

    step: int
    value: float


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    epoch: int  # epochs that are done
    world_size: int
    rows_per_step: int
    version: str  # of this package
    config: dict[str, Any]  # as logged, without secrets
    data: dict[str, str]  # fingerprints of the data sets' samples
    owes_validation: bool = False  # the run was stopped before a validation that is due at this step
    best: Best | None = None  # so far
    files: dict[str, Stored] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Nothing in it can change unnoticed: it begins with its own SHA-256, and is read back only byte for byte."""
        content = json.dumps(asdict(self), indent=1, sort_keys=True, default=str)
        return f'{{"sha256": "{hashlib.sha256(content.encode()).hexdigest()}",\n"manifest": {content}}}\n'.encode()

    @classmethod
    def from_bytes(cls, written: bytes) -> "Manifest":
        try:
            values = json.loads(written)["manifest"]
            best, files = values.pop("best"), values.pop("files")
            manifest = cls(
                **values,
                best=None if best is None else Best(**best),
                files={name: Stored(**file) for name, file in files.items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Damaged(f"{MANIFEST} cannot be read") from error
        if manifest.to_bytes() != written:
            raise Damaged(f"{MANIFEST} has changed")
        for name in manifest.files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise Damaged(f"{MANIFEST} names {name}, which is not in the checkpoint")
        return manifest


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest is sound; its other files are as good as `problem_of` says."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        try:
            manifest = Manifest.from_bytes((path / MANIFEST).read_bytes())
        except FileNotFoundError as error:
            raise Damaged(f"it has no {MANIFEST}" if path.is_dir() else "there is no such folder") from error
        except OSError as error:
            raise Damaged(f"{MANIFEST} cannot be read: {error.strerror}") from error
        if (found := _NAME.fullmatch(path.name)) and int(found[1]) != manifest.step:
            raise Damaged(f"it is a copy of step_{manifest.step}")
        return cls(path, manifest)

    def problem_of(self, name: str) -> str | None:
        """What is wrong with one of the manifest's files."""
        known = self.manifest.files[name]
        try:
            found = Stored.of(self.path / name)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if found.size != known.size:
            return f"{name} has {found.size:,} bytes, was written with {known.size:,}"
        return None if found == known else f"{name} has changed: its SHA-256 is not the one it was written with"


class CheckpointFolder:
    """All checkpoints of a run. Only rank 0 changes the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def of_step(self, step: int) -> Path:
        return self.path / f"step_{step}"

    def partial(self, step: int) -> Path:
        return self.path / f".step_{step}.partial"

    def steps(self) -> list[int]:
        """Of every checkpoint, whole or damaged, the newest first."""
        if not self.path.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self.path.iterdir())
        return sorted((int(match[1]) for match in found if match), reverse=True)

    @property
    def has_had_any(self) -> bool:
        """Whether a checkpoint was ever finished here, even if it is gone."""
        return bool(self.steps()) or (self.path / _LATEST).exists()

    def begin(self, step: int) -> Path:
        """An empty folder to write the checkpoint of `step` into."""
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.partial(step)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        return partial

    def publish(self, manifest: Manifest) -> Path:
        """Make what `begin` gave the checkpoint of its step. All files but the manifest are on disk already."""
        partial, final = self.partial(manifest.step), self.of_step(manifest.step)
        write_file(partial / MANIFEST, manifest.to_bytes())
        for folder in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
            _sync_folder(folder)
        if final.exists():  # the run was stopped here, and has now done what was due at this step
            final.rename(self._replaced(final.name))
        partial.rename(final)
        _sync_folder(self.path)
        shutil.rmtree(self._replaced(final.name), ignore_errors=True)
        draft = self.path / f".{_LATEST}.partial"
        write_file(draft, f"{final.name}\n".encode())
        draft.rename(self.path / _LATEST)
        _sync_folder(self.path)
        return final

    def give_up(self, step: int) -> None:
        """Remove what was written of a checkpoint that could not be finished."""
        shutil.rmtree(self.partial(step), ignore_errors=True)

    def prune(self, keep_last: int, keep: Collection[int] = ()) -> None:
        """Remove all but the newest `keep_last`, which are never fewer than one, and those of the steps in `keep`."""
        for step in self.steps()[max(1, keep_last) :]:
            if step not in keep:
                # A folder without its manifest is no checkpoint: first that goes, then the rest.
                (self.of_step(step) / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(self.of_step(step), ignore_errors=True)

    def _replaced(self, name: str) -> Path:
        return self.path / f".{name}.replaced"

    def recover(self) -> None:
        """Give back its name to a checkpoint that was being replaced when the run was killed."""
        for path in self.path.glob(".step_*.replaced"):
            final = self.path / path.name.removeprefix(".").removesuffix(".replaced")
            if final.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(final)

    def clean(self) -> None:
        """Remove what a run that was killed has left half written."""
        for path in self.path.glob(".step_*.partial"):
            shutil.rmtree(path, ignore_errors=True)

    def set_aside(self, after: int | None) -> Path | None:
        """Move the checkpoints after a step to a folder of their own, or all of them; returns it where there are some.

        What goes on from an earlier step is another run from there: its checkpoints must not mix with these.
        """
        later = [step for step in self.steps() if after is None or step > after]
        if not later:
            return None
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.earlier-{number}")).exists():
            number += 1
        aside.mkdir()
        for step in later:
            self.of_step(step).rename(aside / self.of_step(step).name)
        (self.path / _LATEST).unlink(missing_ok=True)
        if after is not None and self.of_step(after).exists():
            write_file(self.path / _LATEST, f"{self.of_step(after).name}\n".encode())
        return aside


_README = """\
What is in this folder:
logs/          metrics.jsonl, report.html, config.yaml: what the run measured, and how it was set up
{weights}  the trained model, a folder for each epoch: load and serve these
checkpoints/   what the run resumes from, with resume_from_checkpoint=auto; not a model to load; delete it when done
*.earlier-N    what an earlier run here, or one that was resumed from before it, had left; safe to delete
"""


def write_readme(output_dir: Path, weights: Path) -> None:
    """Say in a run's folder what is what."""
    inside = weights.is_relative_to(output_dir) and weights != output_dir
    name = f"{weights.relative_to(output_dir)}/" if inside else str(weights)
    (output_dir / "README.txt").write_text(_README.format(weights=name.ljust(13)), encoding="utf-8")


def write_file(path: Path, content: bytes) -> None:
    """Write a file, and do not return before it is on disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def files_in(folder: Path) -> Iterator[str]:
    """The names of all files of a checkpoint that is being written."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix()


def _sync_folder(path: Path) -> None:
    """Make the names in a folder as lasting as the files they name."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
