"""What the config's words for models and data stand for: folders, files, the Hugging Face hub, and registered names.

Data is named by a path, a glob or a folder; as `ORG/NAME:SPLIT`, a data set of the hub; or as `NAME:SPLIT`, where NAME
is what a program has registered with `register_data`.
"""

import re
from collections.abc import Callable, Mapping
from glob import glob
from pathlib import Path
from typing import Any

from torchtune_agent.errors import UserError, did_you_mean

Splits = str | Path | Mapping[str, str | Path] | Callable[[str], str | Path]

_REGISTERED_FORM = re.compile(r"([\w.-]+):([\w.-]+)")
_HUB_DATA_FORM = re.compile(r"(\w[\w.-]*/[\w.-]+):(\S+)")
_HUB_MODEL_FORM = re.compile(r"\w[\w.-]*/[\w.-]+")
# All that a run reads of a model on the hub. Weights in other formats are not even downloaded.
_MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "LICENSE*"]
_registered: dict[str, Splits] = {}


def register_data(name: str, splits: Splits) -> None:
    """Let `NAME:SPLIT` name data, in this process, from now on.

    `splits` is a folder that has SPLIT.jsonl (or another format that is read, or a folder SPLIT) for every split, or a
    mapping of splits to paths, or a function that gives the path of a split.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"register_data({name!r}): a name is made of letters, digits, '_', '.' and '-'.")
    _registered[name] = splits


def data_section(reference: str | Path, field: str) -> dict[str, Any]:
    """The config section of the data set that `reference`, the value of `field`, names."""
    text = str(reference)
    component = {"_component_": "torchtune_agent.data.AgentSFTDataset"}
    if (named := _REGISTERED_FORM.fullmatch(text)) and named[1] in _registered:
        return component | {"source": "json", "data_files": str(_registered_path(named[1], named[2], field))}
    if Path(text).expanduser().exists():
        return component | {"source": "json", "data_files": str(Path(text).expanduser().absolute())}
    if glob(text, recursive=True):
        return component | {"source": "json", "data_files": str(Path.cwd() / text)}
    if hub := _HUB_DATA_FORM.fullmatch(text):
        return component | {"source": hub[1], "split": hub[2]}
    if named:
        registered = f"Registered: {', '.join(sorted(_registered))}." if _registered else "Nothing is registered yet."
        raise UserError(
            f"{field}={text}: no data is registered as '{named[1]}'. {registered} Say where its splits are, before "
            f"training: torchtune_agent.register_data('{named[1]}', 'folder/with/{named[2]}.jsonl/in/it'), or give the "
            "path of a file."
        )
    raise UserError(
        f"{field}={text}: no such file (looked from {Path.cwd()}). Give a path, a glob or a folder, 'NAME:SPLIT' of "
        "registered data, or 'ORG/NAME:SPLIT' of the Hugging Face hub."
    )


def _registered_path(name: str, split: str, field: str) -> Path:
    splits = _registered[name]
    if isinstance(splits, Mapping):
        if split not in splits:
            raise UserError(f"{field}={name}:{split}: no such split is registered. {did_you_mean(split, splits)}")
        path = Path(splits[split])
    elif isinstance(splits, str | Path):
        path = _in_folder(Path(splits).expanduser(), split, f"{field}={name}:{split}")
    else:
        path = Path(splits(split))
    if not path.exists() and not glob(str(path), recursive=True):
        raise UserError(f"{field}={name}:{split}: {path} is registered for it, and is not there. Register another.")
    return path.absolute()


def _in_folder(folder: Path, split: str, reference: str) -> Path:
    found = sorted(path for path in folder.glob(f"{split}*") if path.name.partition(".")[0] == split)
    if len(found) != 1:
        what = "has no" if not found else "has more than one"
        raise UserError(
            f"{reference}: the registered folder {folder} {what} file or folder called '{split}'. Put exactly one "
            f"there, for example {split}.jsonl."
        )
    return found[0]


def model_folder(reference: str | Path, field: str) -> Path:
    """The Hugging Face folder that `reference`, the value of `field`, names; fetched from the hub where it is there."""
    text = str(reference)
    folder = Path(text).expanduser()
    if folder.is_dir():
        _check_folder(folder, field)
        return folder.absolute()
    if isinstance(reference, Path) or not _HUB_MODEL_FORM.fullmatch(text):
        raise UserError(
            f"{field}={text}: no such folder (looked from {Path.cwd()}). Name a folder with config.json, weights and "
            "tokenizer, or a model of the Hugging Face hub as 'ORG/NAME'."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=_MODEL_FILES))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{field}={text}: it is no folder here, and the Hugging Face hub did not give it: {reason} Where there is "
            f"no network, fetch it elsewhere (`tune download {text} --output-dir FOLDER`) and name the folder. A model "
            "behind a licence needs HF_TOKEN."
        ) from error


def _check_folder(folder: Path, field: str) -> None:
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise UserError(
            f"{field}={folder}: holds an adapter alone. Name a folder of whole weights: a run's are in "
            "OUTPUT_DIR/model/epoch_N, with the adapter merged."
        )
    if not (folder / "config.json").exists():
        raise UserError(f"{field}={folder}: has no config.json. Name the folder of a Hugging Face model.")
