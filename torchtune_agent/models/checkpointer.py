"""A checkpointer for Hugging Face folders: reads them lazily, and writes ones that `transformers` and servers load."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torchtune import training

from torchtune_agent.errors import UserError
from torchtune_agent.models.architecture import Architecture
from torchtune_agent.models.conversion import Conversion
from torchtune_agent.models.weights import INDEX, SINGLE, HFWeights

# What a folder needs beside its weights to be loaded, spoken to and shared
_OF_MODEL = ("generation_config.json", "LICENSE*")
_OF_TOKENIZER = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
)


class HFCheckpointer:
    """Starts from the checkpoint in `model_dir` and writes one such folder per epoch.

    Args:
        model_dir: a folder with `config.json`, safetensors and tokenizer files.
        output_dir: where `epoch_N` folders go.
        max_shard_gb: the largest safetensors file to write.
    """

    def __init__(self, model_dir: str, output_dir: str, max_shard_gb: float = 5.0) -> None:
        self.model_dir = Path(model_dir)
        self.architecture = Architecture.from_folder(model_dir)
        self._output_dir = Path(output_dir)
        self._max_shard_bytes = int(max_shard_gb * 1e9)

    def load_checkpoint(self) -> dict[str, Any]:
        """The base model's weights, read when they are asked for."""
        return {training.MODEL_KEY: HFWeights(self.model_dir, Conversion(self.architecture))}

    def save_checkpoint(
        self, state_dict: dict[str, Any], epoch: int, intermediate_checkpoint: bool = False, adapter_only: bool = False
    ) -> None:
        """Write `epoch_N`. The other arguments are those of torchtune's checkpointers, and ask for nothing here."""
        self.save_folder(state_dict[training.MODEL_KEY], f"epoch_{epoch}")

    def save_folder(
        self, weights: Mapping[str, torch.Tensor], name: str, *, tokenizer_dir: Path | None = None, card: str = ""
    ) -> Path:
        """Write `weights` as `output_dir/NAME` (see `save_hf_folder`), and return that."""
        folder, max_bytes = self._output_dir / name, self._max_shard_bytes
        save_hf_folder(
            weights, folder, self.model_dir, max_shard_bytes=max_bytes, tokenizer_dir=tokenizer_dir, card=card
        )
        return folder


def save_hf_folder(
    weights: Mapping[str, torch.Tensor],
    folder: Path,
    model_dir: Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    tokenizer_dir: Path | None = None,
    card: str = "",
) -> None:
    """Write `weights` (in our names) as a checkpoint like the one in `model_dir`, in `folder`.

    Tensors are converted and written one file at a time. The folder appears under its name when it is complete. The
    tokenizer is that of `tokenizer_dir`, or of the model; `card` is its README.md.
    """
    if folder.resolve() == model_dir.resolve():
        raise UserError(f"{folder}: this is the base model, which is not overwritten. Name another output_dir.")
    conversion = Conversion(Architecture.from_folder(model_dir))
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    _write_weights(weights, conversion, unfinished, max_shard_bytes)
    _write_config(weights, unfinished, model_dir)
    copy_model_files(model_dir, unfinished)
    copy_tokenizer_files(tokenizer_dir or model_dir, unfinished)
    if card:
        (unfinished / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)


def copy_model_files(model_dir: Path, folder: Path) -> None:
    """What belongs to a model beside its weights, `config.json` and tokenizer."""
    _copy(_OF_MODEL, model_dir, folder)


def copy_tokenizer_files(tokenizer_dir: Path, folder: Path) -> None:
    _copy(_OF_TOKENIZER, tokenizer_dir, folder)


def _copy(patterns: Iterable[str], source: Path, target: Path) -> None:
    for path in (found for pattern in patterns for found in source.glob(pattern)):
        if path.is_file():
            copied = target / path.relative_to(source)
            copied.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copied)


def _write_weights(
    weights: Mapping[str, torch.Tensor], conversion: Conversion, folder: Path, max_shard_bytes: int
) -> None:
    places: dict[str, int] = {}
    total_size = num_parameters = num_files = 0
    for number, shard in enumerate(_shards(weights, conversion, max_shard_bytes), 1):
        save_file(shard, folder / f"shard-{number}", metadata={"format": "pt"})
        places |= dict.fromkeys(shard, number)
        total_size += sum(tensor.nbytes for tensor in shard.values())
        num_parameters += sum(tensor.numel() for tensor in shard.values())
        num_files = number
    if num_files == 1:
        os.replace(folder / "shard-1", folder / SINGLE)
        return
    names = {n: f"model-{n:05d}-of-{num_files:05d}.safetensors" for n in range(1, num_files + 1)}
    for number, name in names.items():
        os.replace(folder / f"shard-{number}", folder / name)
    index = {
        "metadata": {"total_parameters": num_parameters, "total_size": total_size},
        "weight_map": {name: names[number] for name, number in sorted(places.items())},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(
    weights: Mapping[str, torch.Tensor], conversion: Conversion, max_bytes: int
) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name in weights:
        for theirs, tensor in conversion.to_hf(name, weights[name].detach().cpu()):
            if shard and size + tensor.nbytes > max_bytes:
                yield shard
                shard, size = {}, 0
            shard[theirs] = tensor.contiguous()
            size += tensor.nbytes
    yield shard


def _write_config(weights: Mapping[str, torch.Tensor], folder: Path, model_dir: Path) -> None:
    """The model's `config.json`, with the type its weights now have."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    dtype = str(weights[next(iter(weights))].dtype).removeprefix("torch.")
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
