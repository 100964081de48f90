"""The files of a Hugging Face tokenizer folder: tokenizer.json, tokenizer_config.json and its chat templates."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from torchtune_agent.errors import UserError


class TokenizerFolder:
    """What a folder says: the tokenizer, its named tokens (`eos_token`, ...) and chat templates by name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        settings = _read_json(path / "tokenizer_config.json")
        self.tokenizer = _load_tokenizer(path / "tokenizer.json")
        named = {key: _content(value) for key, value in settings.items() if key.endswith("_token")}
        self.special_tokens: dict[str, str] = {key: text for key, text in named.items() if text is not None}
        self.chat_templates = _chat_templates(path, settings)

    def id_of(self, key: str) -> int:
        text = self.special_tokens.get(key)
        number = self.tokenizer.token_to_id(text) if text else None
        if number is None:
            raise UserError(
                f"{self._path / 'tokenizer_config.json'}: {key} is {text!r}, which tokenizer.json does not know."
            )
        return number


def _content(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    return _parse(_read_text(path), path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"tokenizer: cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"tokenizer: {path} is not UTF-8 text: {error}") from error


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"tokenizer: {path} is not JSON: {error}") from error


def _load_tokenizer(path: Path) -> Tokenizer:
    text = _read_text(path)
    state = _parse(text, path)
    if "ByteLevel" not in json.dumps([state.get("pre_tokenizer"), state.get("decoder")]):
        raise UserError(f"tokenizer: {path} is not a byte-level BPE tokenizer, the only kind this version reads.")
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name: `default` is chat_template.jinja, further ones are files in additional_chat_templates; older
    folders have one text, or a list of named ones, in tokenizer_config.json."""
    separate = folder / "chat_template.jinja"
    found = {path.stem: _read_text(path) for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if separate.exists():
        found["default"] = _read_text(separate)
    given = settings.get("chat_template")
    if not found and isinstance(given, str):
        found = {"default": given}
    elif not found and isinstance(given, list):
        found = {entry["name"]: entry["template"] for entry in given}
    if not found:
        raise UserError(f"tokenizer: no chat template in {folder} (chat_template.jinja or tokenizer_config.json).")
    return found


@lru_cache(maxsize=1)
def byte_of_char() -> dict[str, int]:
    """The byte for each printable character that byte-level BPE writes instead of it."""
    keep = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in keep]
    alphabet = {chr(byte): byte for byte in keep} | {chr(256 + i): byte for i, byte in enumerate(rest)}
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    return alphabet
