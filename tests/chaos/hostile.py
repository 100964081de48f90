"""Files that were made to harm whoever loads them, paths that lead elsewhere, and secrets that must not come out."""

import gzip
import io
import json
import os
import pickle
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyarrow import parquet
from torch.distributed.checkpoint.filesystem import _StorageInfo

from tests.chaos.launched import Launched
from tests.chaos.place import AUTO, TWENTY, Job, Place, check_said
from tests.faulty import CANARY as IN_EXCEPTION
from tests.training_runs import Left, launch
from torchtune_agent.data import AgentSFTDataset
from torchtune_agent.training import sharded
from torchtune_agent.training.checkpoints import MANIFEST, Checkpoint, Stored

_SECRETS = {  # none of which is written like a kind of key that is known, so that only its place gives it away
    "environment": {
        "WANDB_API_KEY": "canary0environment0wandb" + "0" * 16,
        "MY_SERVICE_TOKEN": "canary-environment-own",
    },
    "config": {"dataset.api_token": "canary-config-token", "dataset.url": "https://user:canary-config-url@example.org"},
}
_CANARY = re.compile(rb"canary[-0](environment|config|in)[-0][a-z]+")
_EVIL = (
    "../../../escaped",
    "/tmp/chaos_escaped",
    "..",
    "a/../../escaped",
    "con\x00trol",
    "\x1b]0;owned\x07",
    "x" * 300,
)


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def jobs(place: Place) -> list[Job]:
    place.whole(*TWENTY)
    found: list[Job] = [partial(_secrets, place, fault) for fault in ("none", "raise", "die")]
    for name in (
        "run.pt",
        "rank_0.pt",
        "rank_1.pt",
        "tensors/.metadata",
        "tensors/__0_0.distcp",
        "tensors/__1_0.distcp",
    ):
        found += [partial(_malicious, place, name, how) for how in ("pickle", "zip", "hidden in a sound one")]
    found += [partial(_layout_that_leads_elsewhere, place, path) for path in ("../../../secret", "/etc/passwd")]
    found += [partial(_manifest_that_leads_elsewhere, place, path) for path in ("../../../secret", "/etc/passwd")]
    found += [partial(_malicious_weights, place, how) for how in ("pickle", "zip")]
    found += [partial(_evil_names, place), partial(_evil_config, place)]
    return found


# Malicious files


def _bomb(path: Path, how: str, flag: Path) -> None:
    """Put a pickle that runs a command in the place of a file."""
    if how == "zip" or path.suffix in (".pt", ".distcp") and how != "pickle":
        packed = io.BytesIO()
        torch.save({"random": Bomb(flag), "detail": {}, "position": Bomb(flag)}, packed)
        path.write_bytes(packed.getvalue())
    elif how == "pickle":
        path.write_bytes(pickle.dumps(Bomb(flag)))
    else:
        layout = sharded.read_layout(path.parent)
        layout.planner_data = Bomb(flag)
        path.write_bytes(pickle.dumps(layout))


def _sealed(path: Path) -> None:
    """Write a manifest by which the checkpoint is as it should be, as whoever made it would."""
    manifest = Checkpoint.open(path).manifest
    files = {name: Stored.of(path / name) for name in manifest.files}
    (path / MANIFEST).write_bytes(replace(manifest, files=files).to_bytes())


def _copy(place: Place, fault: str) -> tuple[Path, Path]:
    """A copy of a run's folder, and its last checkpoint before the end."""
    folder, run = place.new(fault), place.whole(*TWENTY)
    shutil.copytree(run.folder, folder, dirs_exist_ok=True)
    return folder, folder / "out" / "checkpoints" / "step_18"


def _malicious(place: Place, name: str, how: str) -> None:
    fault = f"malicious .{name.rpartition('.')[2]} with a manifest that fits"
    folder, checkpoint = _copy(place, fault)
    flag = folder / "executed"
    with place.table.trial(fault, folder):
        _bomb(checkpoint / name, how, flag)
        _sealed(checkpoint)
        run = launch(folder, *TWENTY, f"resume_from_checkpoint={checkpoint}")
        assert not flag.exists(), "it was executed"
        assert run.codes == [1, 1], f"{run.codes} {run.output[-3000:]}"
        check_said(run.output, "step_18: cannot be resumed from: ", "Name another checkpoint")
        # Without a manifest that fits it is not even opened
        shutil.copy(place.whole(*TWENTY).out / "checkpoints" / "step_18" / MANIFEST, checkpoint / MANIFEST)
        run = launch(folder, *TWENTY, f"resume_from_checkpoint={checkpoint}")
        assert run.codes == [1, 1] and not flag.exists()
        check_said(run.output, f"not a good checkpoint: {name} ")


def _layout_that_leads_elsewhere(place: Place, path: str) -> None:
    fault = ".metadata that names files elsewhere"
    folder, checkpoint = _copy(place, fault)
    with place.table.trial(fault, folder):
        layout = sharded.read_layout(checkpoint / "tensors")
        layout.storage_data = {
            index: _StorageInfo(path, stored.offset, stored.length) for index, stored in layout.storage_data.items()
        }
        (checkpoint / "tensors" / ".metadata").write_bytes(pickle.dumps(layout))
        _sealed(checkpoint)
        run = launch(folder, *TWENTY, f"resume_from_checkpoint={checkpoint}")
        assert run.codes == [1, 1], f"{run.codes} {run.output[-2000:]}"
        check_said(run.output, f".metadata names the file {path}, which it must not")


def _manifest_that_leads_elsewhere(place: Place, path: str) -> None:
    fault = "manifest that names files elsewhere"
    folder, checkpoint = _copy(place, fault)
    with place.table.trial(fault, folder):
        manifest = Checkpoint.open(checkpoint).manifest
        files = {**manifest.files, path: Stored(1, "0" * 64)}
        (checkpoint / MANIFEST).write_bytes(replace(manifest, files=files).to_bytes())
        run = launch(folder, *TWENTY, f"resume_from_checkpoint={checkpoint}")
        assert run.codes == [1, 1], f"{run.codes} {run.output[-2000:]}"
        check_said(run.output, f"names {path}, which is not in the checkpoint")


def _malicious_weights(place: Place, how: str) -> None:
    """What a run starts from, loaded by torchtune's own checkpointer."""
    fault = "malicious .pt as the base model"
    folder = place.new(fault)
    flag = folder / "executed"
    with place.table.trial(fault, folder):
        (folder / "base").mkdir()
        _bomb(folder / "base" / "model.pt", how, flag)
        run = launch(
            folder, *TWENTY,
            "checkpointer=torchtune.training.FullModelTorchTuneCheckpointer",
            f"checkpointer.checkpoint_dir={folder / 'base'}",
            "checkpointer.checkpoint_files=[model.pt]",
            "checkpointer.model_type=QWEN2",
        )  # fmt: skip
        assert not flag.exists(), "it was executed"
        assert run.codes == [1, 1], f"{run.codes} {run.output[-2000:]}"
        check_said(run.output, "error: checkpointer: ")


# Paths from data and config


def _tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def of_files(tokenizer: Any, *, data_files: str, split: str, num_tasks: int, num_tools: int) -> AgentSFTDataset:
    """A dataset of files in a config that was made for ToolWorld's."""
    return AgentSFTDataset(tokenizer, data_files=data_files, max_bad_fraction=0.5)  # a NUL makes a record bad


def _evil_names(place: Place) -> None:
    """Tools, sources and tasks that are called like paths, and a terminal that they would like to drive."""
    fault = "path traversal and terminal escapes by names in data"
    folder = place.new(fault)
    with place.table.trial(fault, folder):
        data = folder / "data.jsonl"
        with data.open("w") as file:
            for name in (*_EVIL, *_EVIL):
                call = {
                    "id": "c",
                    "type": "function",
                    "function": {"name": name, "arguments": json.dumps({name: name})},
                }
                messages = [
                    {"role": "user", "content": f"call {name[:50]}"},
                    {"role": "assistant", "content": "", "tool_calls": [call]},
                    {"role": "tool", "tool_call_id": "c", "name": name, "content": "done"},
                    {"role": "assistant", "content": f"done {name[:50]}"},
                ]
                file.write(json.dumps({"messages": messages, "source": name, "task": name, "id": name}) + "\n")
        run = launch(
            folder, *TWENTY[1:],
            "dataset=tests.chaos.hostile.of_files", "trusted_components=[tests]", f"dataset.data_files={data}",
            "tokenizer.max_seq_len=2048", "model.max_seq_len=2048",
        )  # fmt: skip
        assert run.codes == [0, 0], run.output[-3000:]
        check_said(run.output)
        parts = ("escaped", "owned", "xxxxx", "\x1b")
        strange = [name for name in _tree(folder) if any(part in name for part in parts)]
        outside = [one for one in (folder, *folder.parents) if (one / "escaped").exists()]
        assert not strange and not outside and not Path("/tmp/chaos_escaped").exists(), (strange, outside)
        assert "\x1b]0;" not in run.output and "\x07" not in run.output


def _evil_config(place: Place) -> None:
    """Components that are no components, and names that would become files."""
    fault = "config that names code or files it must not"
    for override, text in (
        ("dataset=os.system", "cannot load 'os.system'"),
        ("dataset=torchtune.config._instantiate.os.system", "cannot load"),
        ("optimizer=builtins.exec", "cannot load 'builtins.exec'"),
        ("metric_logger=subprocess.Popen", "cannot load 'subprocess.Popen'"),
        ("log_by=[../../escaped]", "log_by"),
        ("keep_best=../../escaped", "keep_best=../../escaped: validation does not measure it"),
    ):
        folder = place.new(fault)
        with place.table.trial(fault, folder):
            run = launch(folder, *TWENTY, override)
            assert run.codes == [1, 1], f"{override}: {run.codes} {run.output[-2000:]}"
            check_said(run.output, "error: ", text)
            assert not [name for name in _tree(folder) if "escaped" in name]


# Secrets


def _readable(path: Path) -> Iterator[bytes]:
    """What is in a file, also where it is packed."""
    content = path.read_bytes()
    yield content
    if path.suffix == ".parquet":
        yield repr(parquet.read_table(path).to_pylist()).encode()
        yield repr(parquet.read_metadata(path).metadata).encode()
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            yield from (packed.read(name) for name in packed.namelist())
    elif content[:2] == b"\x1f\x8b":
        yield gzip.decompress(content)
    elif content[:8] == b"\x89PNG\r\n\x1a\n":
        yield b"".join(zlib.decompress(text) for text in re.findall(rb"zTXt[^\0]*\0\0(.*?)IDAT", content, re.DOTALL))


def _secrets(place: Place, what: str) -> None:
    """Of the environment and the config, in every file a run writes: its output, its home, its temp folder."""
    how = {"none": "finishes", "raise": "raises", "die": "is killed"}[what]
    fault = f"secret canaries in all files of a run that {how}"
    folder = place.new(fault)
    with place.table.trial(fault, folder):
        for name in ("home", "temp", "wandb"):
            (folder / name).mkdir()
        env = {**_SECRETS["environment"], "WANDB_MODE": "offline"}
        env |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "temp"), "WANDB_DIR": str(folder / "wandb")}
        logger = (
            "metric_logger=torchtune.training.metric_logging.WandBLogger",
            f"metric_logger.log_dir={folder / 'wandb'}",
        )
        faulty = (
            "dataset=tests.faulty.dataset",
            "trusted_components=[tests]",
            f"dataset.fault={what}",
            "dataset.at=15",
        )
        secrets = [f"{key}={value}" for key, value in _SECRETS["config"].items()]
        run = Launched(folder, *TWENTY, *faulty, *secrets, *logger, "dataset.at=15", AUTO, env=env).finish()
        assert run.codes == [0 if what == "none" else 1], f"{run.codes} {run.output[-3000:]}"
        written = [path for path in folder.rglob("*") if path.is_file()]
        suffixes = {path.suffix for path in written}
        assert {".jsonl", ".pt", ".distcp", ".json", ".yaml", ".parquet", ".wandb", ".txt"} <= suffixes, suffixes
        found = [str(path) for path in written if any(_CANARY.search(text) for text in _readable(path))]
        assert not found, f"in {found}"
        assert IN_EXCEPTION not in run.output
        assert Left(folder, [], "").saved
