"""When a run saves itself, and how: aside, on all ranks together, hashed, flushed, and only then under its name.

In the background the same happens in a thread and on a process group of its own, from a copy of the tensors in host
memory; training waits for the copy alone, and for the save before where that is not done yet.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from torchtune_agent.distributed import World, collected, on_main, own_group, together
from torchtune_agent.errors import UserError, did_you_mean
from torchtune_agent.training import sharded, state
from torchtune_agent.training.checkpoints import Best, CheckpointFolder, Manifest, Stored, files_in, write_file
from torchtune_agent.training.settings import Settings

FOLDER = "checkpoints"
_HIGHER_IS_BETTER = ("accuracy", "exact", "_prob")


class Saver:
    """Saves checkpoints of a run; every rank has one and calls it at the same steps."""

    def __init__(self, settings: Settings, world: World, saved: Manifest | None = None) -> None:
        """`saved` is of the checkpoint that the run goes on from."""
        self.folder = CheckpointFolder(settings.output_dir / FOLDER)
        self.group = own_group()
        self.best = None if saved is None else saved.best
        self.num_saved = 0
        self.stalled = 0.0  # seconds that training has waited for saving
        self._settings = settings
        self._world = world
        self._last = None if saved is None else _moment(saved)
        self._shown = 0.0
        self._background: Thread | None = None
        self._failure: BaseException | None = None
        self._stager: DefaultStager | None = None

    def is_due(self, step: int, validated: Mapping[str, float] | None) -> bool:
        """Whether to save after `step`, of which `validated` is the validation, where there was one."""
        every = self._settings.save_every_n_steps
        is_best = False
        if validated is not None and on_main(lambda: self._is_best(validated)):  # all ranks decide alike
            self.best, is_best = Best(step, float(validated[str(self._settings.keep_best)])), True
        return is_best or (every is not None and step % every == 0)

    def _is_best(self, validated: Mapping[str, float]) -> bool:
        name = self._settings.keep_best
        if name is None:
            return False
        if name not in validated:
            raise UserError(f"keep_best={name}: validation does not measure it. {did_you_mean(name, validated)}")
        value = float(validated[name])
        sign = -1 if name.endswith(_HIGHER_IS_BETTER) else 1
        return math.isfinite(value) and (self.best is None or sign * value < sign * self.best.value)

    def save(self, snapshot: Callable[[], state.Snapshot], manifest: Manifest) -> float:
        """Save what `snapshot` gives; returns the seconds it took out of training. A moment is saved only once."""
        if self._last == _moment(manifest):
            return 0.0
        started = time.perf_counter()
        self.wait()
        content = snapshot()
        manifest = replace(manifest, best=self.best)
        if self._settings.enable_async_checkpointing:
            content = replace(content, tensors=self._copy(content.tensors))
            self._background = Thread(target=self._write_in_background, args=(content, manifest), daemon=True)
            self._background.start()
        else:
            self._write(content, manifest)
        self._last = _moment(manifest)
        self.num_saved += 1
        seconds = time.perf_counter() - started
        self.stalled += seconds
        return seconds

    def wait(self) -> None:
        """Wait for what is being written in the background; where it failed, every rank learns of it here."""
        if self._background is not None:
            self._background.join()
            self._background = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def finish(self) -> None:
        """The run is over: wait for the last checkpoint."""
        started = time.perf_counter()
        self.wait()
        self.stalled += time.perf_counter() - started

    def take_stall(self) -> dict[str, float]:
        """For the next row: the seconds that training has waited since the last."""
        seconds, self._shown = self.stalled - self._shown, self.stalled
        return {"checkpoint_stall_seconds": seconds} if seconds else {}

    def _copy(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self._stager is None:
            on_device = self._world.device.type == "cuda"
            self._stager = DefaultStager(StagingOptions(on_device, False, False, on_device))
        copied: Any = self._stager.stage(tensors)
        return copied

    def _write_in_background(self, content: state.Snapshot, manifest: Manifest) -> None:
        try:
            self._write(content, manifest)
        except BaseException as error:  # raised in the training thread, by `wait`
            self._failure = error

    def _write(self, content: state.Snapshot, manifest: Manifest) -> None:
        step = manifest.step
        try:
            on_main(self._of_disk(step, lambda: self.folder.begin(step)), self.group)
            partial = self.folder.partial(step)
            together(self._of_disk(step, lambda: _write_files(partial, content.files)), self.group)
            try:
                sharded.save(partial / state.TENSORS, content.tensors, self.group)
            except sharded.SaveFailed as error:
                raise self._failed(step, str(error)) from error
            files = self._hashed(step, partial)
            on_main(self._of_disk(step, lambda: self._publish(replace(manifest, files=files))), self.group)
        except UserError:
            on_main(lambda: self.folder.give_up(step), self.group)
            raise

    def _hashed(self, step: int, partial: Path) -> dict[str, Stored]:
        """Size and SHA-256 of every file; each rank reads a share of them."""
        names = on_main(lambda: list(files_in(partial)), self.group)
        own = names[self._world.rank :: self._world.size]
        stored = together(self._of_disk(step, lambda: {name: Stored.of(partial / name) for name in own}), self.group)
        return {name: one for part in collected(stored, self.group) for name, one in part.items()}

    def _publish(self, manifest: Manifest) -> None:
        self.folder.publish(manifest)
        best = () if self._settings.keep_best is None or manifest.best is None else (manifest.best.step,)
        self.folder.prune(self._settings.keep_last_n_checkpoints, best)

    def _of_disk(self, step: int, work: Callable[[], Any]) -> Callable[[], Any]:
        """`work`, with what the disk refuses said as the user's to mend."""

        def run() -> Any:
            try:
                return work()
            except OSError as error:
                raise self._failed(step, error.strerror or str(error)) from error

        return run

    def _failed(self, step: int, reason: str) -> UserError:
        others = [other for other in self.folder.steps() if other != step]
        before = f"The checkpoint of step {others[0]} is untouched" if others else "There is none before it"
        return UserError(
            f"{self.folder.of_step(step)}: the checkpoint cannot be saved: {reason}. {before}. Make room or allow "
            "writing there, and go on with resume_from_checkpoint=auto."
        )


def _moment(manifest: Manifest) -> tuple[int, bool]:
    """Of a run: after a step, before or after what is due then."""
    return manifest.step, manifest.owes_validation


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        write_file(folder / name, content)
