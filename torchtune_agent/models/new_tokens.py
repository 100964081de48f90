"""New tokens for a model that others made: its folder, with a longer vocabulary.

The new folder has a tokenizer and a config of its own, and one file with the matrices that have a row for each token.
All other weights are links to the files of the model it came from, so it costs little and loads like any folder.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer

from torchtune_agent.errors import UserError
from torchtune_agent.models.checkpointer import copy_model_files, copy_tokenizer_files
from torchtune_agent.models.weights import INDEX, files_by_name, open_safetensors

_FILE = "model-token-rows.safetensors"
_MATRICES = ("model.embed_tokens.weight", "lm_head.weight")
_MULTIPLE = 64  # of rows: matrices are split over ranks, and run fastest in whole blocks


def with_new_tokens(cfg: DictConfig, tokens: Sequence[str] | Mapping[str, str | None], output_dir: Path) -> DictConfig:
    """`cfg` with a model that has the new `tokens`, written in `output_dir`, wherever it named `cfg.model_dir`."""
    if not tokens:
        return cfg
    base = cfg.get("model_dir")
    if base is None:
        raise UserError(
            "tool_call_special_tokens: needs model_dir, the folder of the model. Start from the config hf/agent_sft."
        )
    folder = output_dir / "model_with_new_tokens"
    extend_folder(Path(base), tokens if isinstance(tokens, Mapping) else dict.fromkeys(tokens), folder)

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replaced(item) for key, item in value.items()}
        if isinstance(value, list):
            return [replaced(item) for item in value]
        return str(folder) if value == base else value

    return OmegaConf.create(replaced(OmegaConf.to_container(cfg, resolve=True)))


def extend_folder(model_dir: Path, tokens: Mapping[str, str | None], folder: Path) -> None:
    """Write the model of `model_dir` with the new `tokens` as `folder`.

    A token's rows start as the mean of the rows of its description's tokens, or without one of all tokens.
    """
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    num_known = tokenizer.get_vocab_size()
    descriptions = {token: _ids(tokenizer, token, text) for token, text in tokens.items()}
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    ids: dict[str, Any] = {token: tokenizer.token_to_id(token) for token in tokens}
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    copy_model_files(model_dir, unfinished)
    copy_tokenizer_files(model_dir, unfinished)
    tokenizer.save(str(unfinished / "tokenizer.json"))
    files = files_by_name(model_dir)
    matrices = {}
    for name in _MATRICES:
        if name in files:
            old = open_safetensors(model_dir / files[name]).get_tensor(name)
            matrices[name] = _extended(old, num_known, {ids[token]: known for token, known in descriptions.items()})
    save_file(matrices, unfinished / _FILE, metadata={"format": "pt"})
    links = {file: f"base-{file}" for file in files.values()}  # a model.safetensors would be taken for the whole model
    for file, link in links.items():
        (unfinished / link).symlink_to((model_dir / file).resolve())
    places = {name: links[file] for name, file in files.items()} | dict.fromkeys(matrices, _FILE)
    _write_json(unfinished / INDEX, {"metadata": {}, "weight_map": places})
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    _write_json(unfinished / "config.json", config | {"vocab_size": len(next(iter(matrices.values())))})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)


def _ids(tokenizer: Tokenizer, token: str, description: str | None) -> list[int]:
    if not token or token != token.strip():
        raise UserError(f"tool_call_special_tokens: {token!r} is empty, or begins or ends with a space.")
    if tokenizer.token_to_id(token) is not None:
        raise UserError(f"tool_call_special_tokens: {token!r} is a token of this model already. Take it out.")
    return tokenizer.encode(description, add_special_tokens=False).ids if description else []


def _extended(old: torch.Tensor, num_known: int, new: Mapping[int, list[int]]) -> torch.Tensor:
    """`old` with rows for the tokens `new`, and as many as make a round number."""
    needed = max(new) + 1
    rows = len(old) if needed <= len(old) else -(-needed // _MULTIPLE) * _MULTIPLE
    mean = old[:num_known].float().mean(0)
    made = torch.cat([old, mean.to(old.dtype).expand(rows - len(old), -1)])
    for row, known in new.items():
        made[row] = (old[known].float().mean(0) if known else mean).to(old.dtype)
    return made


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
