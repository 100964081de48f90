"""Checkpoints that are not as they were written: a thousand, by the lookup and the loading of a resumed run, and some
by whole runs. Nothing damaged may be loaded, the newest good one must be, and without one the run must stop."""

import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from tests.chaos.place import AUTO, TWENTY, Job, Place, check_equal, check_said
from tests.training_runs import Left, digest, launch
from torchtune_agent.distributed import World, make_mesh, own_group, process_group
from torchtune_agent.errors import UserError
from torchtune_agent.training import sharded
from torchtune_agent.training.checkpoints import Checkpoint, CheckpointFolder
from torchtune_agent.training.resume import find
from torchtune_agent.training.settings import Settings
from torchtune_agent.training.state import RUN, TENSORS, rank_file, read_plain

_NUM_DAMAGED = 1_000
_NUM_RESUMED = 10
_KEEP_THREE = "keep_last_n_checkpoints=3"


def jobs(place: Place) -> list[Job]:
    place.whole(*TWENTY, _KEEP_THREE)
    found: list[Job] = [partial(_look_up_all, place)]
    found += [partial(_resume, place, number, leaves_good=True) for number in range(_NUM_RESUMED)]
    found += [partial(_resume, place, number, leaves_good=False) for number in range(_NUM_RESUMED // 2)]
    return found


# Of one file. Each is given the file and one of the same name in another checkpoint.


def _flip(file: Path, other: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def _truncate(file: Path, other: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.choice([0, 1, len(content) - 1, rng.randrange(len(content))])])


def _delete(file: Path, other: Path, rng: random.Random) -> None:
    file.unlink()


def _zero(file: Path, other: Path, rng: random.Random) -> None:
    """A block that was never written, as file systems leave after a power failure."""
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content))
    content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    file.write_bytes(content)


def _append(file: Path, other: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randint(1, 100)))


def _mix(file: Path, other: Path, rng: random.Random) -> None:
    file.write_bytes(other.read_bytes())


def _splice(file: Path, other: Path, rng: random.Random) -> None:
    """The beginning of one, the end of the other, as long as before."""
    content, end = file.read_bytes(), other.read_bytes()
    at = rng.randrange(len(content))
    file.write_bytes((content[:at] + end[at:]).ljust(len(content), b"\0")[: len(content)])


def _swap(file: Path, other: Path, rng: random.Random) -> None:
    """With another file of its own checkpoint."""
    same = rng.choice([path for path in sorted(file.parent.iterdir()) if path.is_file() and path != file] or [other])
    mine, its = file.read_bytes(), same.read_bytes()
    file.write_bytes(its)
    if same != other:
        same.write_bytes(mine)


def _make_folder(file: Path, other: Path, rng: random.Random) -> None:
    file.unlink()
    file.mkdir()


_OF_FILES: dict[str, Callable[[Path, Path, random.Random], None]] = {
    "flipped bit": _flip,
    "truncated": _truncate,
    "deleted": _delete,
    "zeroed": _zero,
    "appended to": _append,
    "mixed with another checkpoint": _mix,
    "spliced with another checkpoint": _splice,
    "swapped within a checkpoint": _swap,
    "replaced by a folder": _make_folder,
}
_COPIED = "a checkpoint copied over another"


def _content(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def _damage(run: Left, folder: CheckpointFolder, step: int, kind: str, rng: random.Random, times: int) -> None:
    """Change the checkpoint of `step` in a copy of those of `run` so that it really is another."""
    path, original = folder.of_step(step), _content(folder.of_step(step))
    whole = CheckpointFolder(run.out / "checkpoints")
    others = [other for other in whole.steps() if other != step]
    if kind == _COPIED:
        shutil.rmtree(path)
        shutil.copytree(whole.of_step(rng.choice(others)), path)
        return
    while _content(path) == original:
        for _ in range(times):
            files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.stat().st_size]
            if not files:
                return
            file = rng.choice(files)
            other = whole.of_step(rng.choice(others)) / file.relative_to(path)
            _OF_FILES[kind](file, other if other.is_file() else file, rng)


def _copy(run: Left, to: Path) -> CheckpointFolder:
    shutil.copytree(run.out / "checkpoints", to / "out" / "checkpoints")
    return CheckpointFolder(to / "out" / "checkpoints")


def _look_up_all(place: Place) -> None:
    """In a process of its own would be more alike; one rank and the same functions are enough, and fast."""
    run = place.whole(*TWENTY, _KEEP_THREE)
    with process_group("cpu"):
        world, group = World(0, 1, torch.device("cpu"), make_mesh("cpu", 1, 1)), own_group()
        good = {step: _loaded(CheckpointFolder(run.out / "checkpoints").of_step(step), group) for step in run.saved}
        assert len(good) == len(set(good.values())) == 3
        for number in range(_NUM_DAMAGED):
            _look_up(place, run, world, good, group, random.Random(f"{place.seed} {number}"))


def _look_up(place: Place, run: Left, world: World, good: dict[int, str], group: object, rng: random.Random) -> None:
    kind = rng.choice([*_OF_FILES, _COPIED])
    fault = f"checkpoint: {kind}"
    to = place.new("damage")
    folder = _copy(run, to)
    bad = set(rng.sample(run.saved, rng.choice([1, 1, 2, 2, 3])))
    for step in sorted(bad):
        _damage(run, folder, step, kind, rng, rng.choice([1, 1, 2, 5]))
    if rng.random() < 0.2:
        (folder.path / "latest").write_bytes(rng.randbytes(8))
    said: list[str] = []
    with place.table.trial(fault, to, quiet=True):
        left = sorted(set(run.saved) - bad)
        try:
            found = find(Settings(output_dir=to / "out", resume_from_checkpoint="auto"), world, said.append)
        except UserError as error:
            assert not left, f"stopped, with steps {left} still good: {error}"
            assert "has no good checkpoint" in str(error)
            assert all(f"step_{step}: " in str(error) for step in bad if folder.of_step(step).exists())
            return
        assert found is not None, "started anew in silence"
        assert left and found.manifest.step == left[-1], f"took step {found.manifest.step}; good are {left}"
        assert _loaded(found.path, group) == good[left[-1]], "loaded something else than was saved"
        newer = [step for step in bad if step > left[-1]]
        assert len(said) == len(newer) and all(any(f"step_{step}: " in line for line in said) for step in newer), said


def _loaded(path: Path, group: object) -> str:
    """Digest of everything in a checkpoint, read as a resumed run reads it."""
    layout = sharded.read_layout(path / TENSORS).state_dict_metadata
    tensors = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in layout.items()}  # pyright: ignore
    sharded.load(path / TENSORS, tensors, group)  # pyright: ignore
    world_size = Checkpoint.open(path).manifest.world_size
    of_ranks = [read_plain(path / rank_file(rank)) for rank in range(world_size)]
    return digest([tensors, read_plain(path / RUN), of_ranks])


def _resume(place: Place, number: int, *, leaves_good: bool) -> None:
    """A whole run over damaged checkpoints."""
    fault = f"a run resumed over damaged checkpoints, {'some' if leaves_good else 'none'} good"
    rng = random.Random(f"{place.seed} resumed {number}")
    run, to = place.whole(*TWENTY, _KEEP_THREE), place.new("resumed")
    with place.table.trial(fault, to):
        shutil.copytree(run.folder, to, dirs_exist_ok=True)
        folder = CheckpointFolder(to / "out" / "checkpoints")
        bad = run.saved[: rng.randint(1, 2)] if leaves_good else run.saved
        for step in bad:
            _damage(run, folder, step, rng.choice(list(_OF_FILES)), rng, 1)
        before = (to / "out" / "logs" / "metrics.jsonl").read_bytes()
        ended = launch(to, *TWENTY, _KEEP_THREE, AUTO)
        if leaves_good:
            assert ended.codes == [0, 0], ended.output[-3000:]
            check_said(ended.output, "It is not used.", f"step_{run.saved[len(bad)]}, after")
            check_equal(ended, run)
        else:
            assert ended.codes == [1, 1], f"{ended.codes} {ended.output[-2000:]}"
            check_said(ended.output, "has no good checkpoint", "resume_from_checkpoint=False")
            assert (to / "out" / "logs" / "metrics.jsonl").read_bytes() == before
