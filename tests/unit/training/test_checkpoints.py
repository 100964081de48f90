"""The folder of checkpoints: whole or damaged, never in between, and nothing in it is ever executed."""

import os
import pickle
import random
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from torchtune_agent.distributed import World, make_mesh, own_group, process_group
from torchtune_agent.errors import UserError
from torchtune_agent.training import sharded
from torchtune_agent.training.checkpoints import (
    Best,
    Checkpoint,
    CheckpointFolder,
    Damaged,
    Manifest,
    Stored,
    files_in,
    write_file,
    write_readme,
)
from torchtune_agent.training.resume import check_unchanged, find
from torchtune_agent.training.saving import Saver
from torchtune_agent.training.settings import Settings
from torchtune_agent.training.state import Snapshot, read_plain, to_bytes


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_group("cpu") as (rank, size):
        yield World(rank, size, torch.device("cpu"), make_mesh("cpu", 1, 1))


def manifest(step: int = 1, **more: Any) -> Manifest:
    values: dict[str, Any] = {"epoch": 0, "world_size": 2, "rows_per_step": 8, "version": "0", "config": {"a": 1}}
    return Manifest(step=step, data={"dataset": "3 samples, abc"}, **{**values, **more})


def add(folder: CheckpointFolder, step: int) -> Path:
    """A checkpoint of three small files."""
    partial = folder.begin(step)
    (partial / "tensors").mkdir()
    for name in ("run.pt", "rank_0.pt", "tensors/__0_0.distcp"):
        write_file(partial / name, random.Random(f"{step} {name}").randbytes(40))
    stored = {name: Stored.of(partial / name) for name in files_in(partial)}
    return folder.publish(Manifest(**{**vars(manifest(step)), "files": stored}))


def settings(folder: Path, resume: Any = "auto", **more: Any) -> Settings:
    return Settings(output_dir=folder, resume_from_checkpoint=resume, **more)


def damage(path: Path, rng: random.Random) -> None:
    """Change a checkpoint in one of the ways disks and people do."""
    file = rng.choice([p for p in sorted(path.rglob("*")) if p.is_file()])
    content = bytearray(file.read_bytes())
    kind = rng.choice(["flip", "truncate", "delete", "zero", "append", "other"])
    if kind == "delete":
        file.unlink()
        return
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        content = content[: rng.randrange(len(content))]
    elif kind == "append":
        content += rng.randbytes(rng.randint(1, 9))
    elif kind == "zero":
        start = rng.randrange(len(content))
        content[start:] = bytes(len(content) - start)
    else:  # the same file of another checkpoint
        content = bytearray((path.with_name("step_1") / file.relative_to(path)).read_bytes())
    file.write_bytes(content)


def test_no_damage_is_loaded_and_the_newest_good_one_is_found(tmp_path: Path, world: World) -> None:
    whole = CheckpointFolder(tmp_path / "whole" / "checkpoints")
    for step in (1, 2, 3, 4):
        add(whole, step)
    for seed in range(150):
        rng = random.Random(seed)
        out = tmp_path / "tried"
        shutil.copytree(whole.path, out / "checkpoints")
        bad = sorted(rng.sample([2, 3, 4], rng.randint(1, 3)))
        for step in bad:
            damage(out / "checkpoints" / f"step_{step}", rng)
        said: list[str] = []
        found = find(settings(out), world, said.append)
        good = max({1, 2, 3, 4} - set(bad))
        assert found is not None and found.path.name == f"step_{good}", (seed, bad)
        newer = [step for step in bad if step > good]
        assert len(said) == len(newer) and all(any(f"step_{step}:" in line for line in said) for step in newer)
        shutil.rmtree(out)


def test_where_none_is_good_the_run_stops(tmp_path: Path, world: World) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for step in (1, 2):
        (add(folder, step) / "manifest.json").unlink()
    for resume in (True, "auto"):
        with pytest.raises(UserError, match=r"has no good checkpoint\n.*step_2: it has no manifest.json\n.*step_1"):
            find(settings(tmp_path, resume), world, lambda _: None)
    shutil.rmtree(folder.of_step(1))
    shutil.rmtree(folder.of_step(2))  # `latest` still says that there was one
    with pytest.raises(UserError, match="has no good checkpoint"):
        find(settings(tmp_path), world, lambda _: None)


def test_auto_starts_anew_only_where_there_never_was_one(tmp_path: Path, world: World) -> None:
    assert find(settings(tmp_path), world, print) is None
    CheckpointFolder(tmp_path / "checkpoints").begin(3)  # killed while it saved its first
    assert find(settings(tmp_path), world, print) is None
    with pytest.raises(UserError, match="has no checkpoint.*resume_from_checkpoint=auto"):
        find(settings(tmp_path, True), world, print)


def test_a_path_is_that_one_or_none(tmp_path: Path, world: World) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for step in (1, 2):
        add(folder, step)
    found = find(settings(tmp_path, folder.of_step(1)), world, print)
    assert found is not None and found.manifest.step == 1
    (folder.of_step(1) / "run.pt").unlink()
    with pytest.raises(UserError, match="run.pt is missing"):
        find(settings(tmp_path, folder.of_step(1)), world, print)


def test_a_copy_under_another_name_is_not_that_checkpoint(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    shutil.copytree(add(folder, 1), folder.of_step(5))
    with pytest.raises(Damaged, match="copy of step_1"):
        Checkpoint.open(folder.of_step(5))


def test_a_manifest_is_read_back_as_it_was_written() -> None:
    written = manifest(7, best=Best(5, 0.1), files={"a/b": Stored(3, "f" * 64)})
    assert Manifest.from_bytes(written.to_bytes()) == written
    outside = manifest(7, files={"../b": Stored(3, "f" * 64)}).to_bytes()
    with pytest.raises(Damaged, match="not in the checkpoint"):
        Manifest.from_bytes(outside)


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for step in range(1, 7):
        add(folder, step)
    folder.prune(2, keep=(3,))
    assert folder.steps() == [6, 5, 3]
    folder.prune(0)  # never the last one
    assert folder.steps() == [6]
    assert (tmp_path / "latest").read_text() == "step_6\n"


def test_what_is_later_is_put_aside(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        add(folder, step)
    assert folder.set_aside(3) is None
    assert folder.set_aside(1) == tmp_path / "checkpoints.earlier-1"
    assert folder.steps() == [1] and (folder.path / "latest").read_text() == "step_1\n"
    assert folder.set_aside(None) == tmp_path / "checkpoints.earlier-2"
    assert not folder.has_had_any


def test_the_readme_has_five_lines_and_names_the_weights(tmp_path: Path) -> None:
    write_readme(tmp_path, tmp_path / "model")
    lines = (tmp_path / "README.txt").read_text().splitlines()
    assert len(lines) == 5 and lines[2].startswith("model/") and lines[3].startswith("checkpoints/")


def checkpoint_of(config: dict[str, Any], **more: Any) -> Checkpoint:
    return Checkpoint(Path("checkpoints/step_1"), manifest(config=config, **more))


def test_changes_that_do_not_change_training_are_free(tmp_path: Path) -> None:
    then = checkpoint_of({"log_every_n_steps": 1, "dataset": [{"cache_dir": "a"}], "batch_size": 4, "epochs": 2})
    new = {"log_every_n_steps": 5, "dataset": [{"cache_dir": "b"}], "batch_size": 2, "epochs": 2}
    check_unchanged(then, settings(tmp_path), manifest(config=new, world_size=4))  # steps of as many rows
    with pytest.raises(UserError, match=r"batch_size: 4 → 2\n.*resume_override=\[batch_size\]"):
        check_unchanged(then, settings(tmp_path), manifest(config=new, rows_per_step=4))
    with pytest.raises(UserError, match="epochs: 2 → 3"):
        check_unchanged(then, settings(tmp_path), manifest(config={**new, "epochs": 3}))
    check_unchanged(then, settings(tmp_path, resume_override=["epochs"]), manifest(config={**new, "epochs": 3}))
    check_unchanged(then, settings(tmp_path), manifest(config={**new, "epochs": 2}, rows_per_step=8))


def test_what_is_best_depends_on_the_metric(tmp_path: Path, world: World) -> None:
    for name, values, due in (
        ("val_loss", [2.0, float("nan"), 1.5, 1.5, 1.4], [True, False, True, False, True]),
        ("val_tool_call_accuracy", [0.2, 0.1, 0.2, 0.3, float("inf")], [True, False, False, True, False]),
    ):
        saver = Saver(settings(tmp_path, keep_best=name), world)
        assert [saver.is_due(step, {name: value}) for step, value in enumerate(values)] == due
        with pytest.raises(UserError, match=f"keep_best={name}: validation does not measure it"):
            saver.is_due(9, {"val_lost": 1.0})
    every = Saver(settings(tmp_path, save_every_n_steps=3), world)
    assert [step for step in range(1, 8) if every.is_due(step, None)] == [3, 6]


@contextmanager
def small_disk() -> Iterator[None]:
    """A disk that takes only part of a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("background", [False, True])
def test_a_save_that_fails_stops_the_run_and_leaves_the_one_before(
    tmp_path: Path, world: World, background: bool
) -> None:
    saver = Saver(settings(tmp_path, enable_async_checkpointing=background), world)
    saver.save(lambda: Snapshot({"a": torch.arange(1000.0)}, {"run.pt": b"1"}), manifest(1))
    saver.wait()
    with small_disk():
        with pytest.raises(UserError, match="step_2: the checkpoint cannot be saved: .*step 1 is untouched.*=auto"):
            saver.save(lambda: Snapshot({"a": torch.arange(1000.0)}, {"run.pt": b"1"}), manifest(2))
            saver.wait()
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["latest", "step_1"]
    found = find(settings(tmp_path), world, print)
    assert found is not None and found.manifest.step == 1


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def layout(**replaced: Any) -> Metadata:
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))
    tensor = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([2]), [chunk])
    stored = {MetadataIndex("a", [0]): _StorageInfo("__0_0.distcp", 0, 10)}
    return Metadata(**{"state_dict_metadata": {"a": tensor}, "storage_data": stored, **replaced})


def test_a_malicious_layout_is_refused_and_nothing_of_it_runs(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    elsewhere = {MetadataIndex("a", [0]): _StorageInfo("../../elsewhere", 0, 10)}
    for bad, reason in (
        (Canary(canary), "posix.system"),
        (layout(planner_data=Canary(canary)), "posix.system"),
        (layout(state_dict_metadata={"a": BytesStorageMetadata()}), "BytesStorageMetadata"),
        (layout(storage_data=elsewhere), "must not"),
        ({"a": 1}, "no layout"),
        (layout(storage_data=None), "no layout"),
    ):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(bad))
        with pytest.raises(Damaged, match=reason):
            sharded.read_layout(tmp_path)
    for junk in (b"", b"\x80", b"cos\nsystem\n(S'touch x'\ntR."):
        (tmp_path / ".metadata").write_bytes(junk)
        with pytest.raises(Damaged):
            sharded.read_layout(tmp_path)
    assert not canary.exists()


def test_a_malicious_file_of_plain_values_is_refused_and_nothing_of_it_runs(tmp_path: Path) -> None:
    torch.save({"random": Canary(tmp_path / "canary")}, tmp_path / "rank_0.pt")
    with pytest.raises(Damaged, match="rank_0.pt cannot be loaded"):
        read_plain(tmp_path / "rank_0.pt")
    with pytest.raises(TypeError, match=r"state\.a\[0\] is a Canary"):
        to_bytes({"a": [Canary(tmp_path / "canary")]})
    assert not (tmp_path / "canary").exists()


def test_tensors_that_were_made_malicious_are_refused(tmp_path: Path, world: World) -> None:
    group = own_group()
    sharded.save(tmp_path, {"a": torch.arange(4.0)}, group)
    loaded = {"a": torch.zeros(4)}
    sharded.load(tmp_path, loaded, group)
    assert loaded["a"].equal(torch.arange(4.0))
    torch.save(Canary(tmp_path / "canary"), tmp_path / "__0_0.distcp")
    with pytest.raises(Damaged, match="cannot be loaded"):
        sharded.load(tmp_path, {"a": torch.zeros(4)}, group)
    assert not (tmp_path / "canary").exists()
    dist.destroy_process_group(group)


@pytest.mark.parametrize("write", [save_file, torch.save])
def test_each_way_to_write_weights_says_that_the_disk_refuses(tmp_path: Path, write: Any) -> None:
    with small_disk(), pytest.raises(Exception) as failed:
        write({"a": torch.arange(1000.0)}, tmp_path / "weights")
    assert "File too large" in str(problem := sharded.disk_problem(failed.value)) or "only part of a file" in str(
        problem
    )
    assert sharded.disk_problem(RuntimeError("a mistake")) is None


def test_a_disk_that_refuses_is_told_from_a_mistake_in_the_program(tmp_path: Path, world: World) -> None:
    group = own_group()
    (tmp_path / "file").write_text("")
    with pytest.raises(sharded.SaveFailed, match="Not a directory"):
        sharded.save(tmp_path / "file" / "tensors", {"a": torch.arange(4.0)}, group)
    dist.destroy_process_group(group)
