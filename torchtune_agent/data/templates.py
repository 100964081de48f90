"""A torchtune tokenizer made from a Hugging Face folder: tokenizer.json and the model's own chat template.

Training must see the tokens the server will show, so the text comes from the template in
`tokenizer_config.json`, rendered in a sandbox, and not from rules written again in Python.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, pre_tokenizers
from torchtune.data import Message
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from torchtune_agent.errors import UserError

_ROLE_IN_TEMPLATES = {"ipython": "tool"}


class ChatTemplateTokenizer(ModelTokenizer):
    """Tokenizes conversations exactly as the folder's chat template renders them.

    `tokenize_messages` returns torchtune's mask: True where nothing is trained.
    """

    def __init__(self, path: str | Path, *, max_seq_len: int | None = None) -> None:
        folder = Path(path)
        settings = _read_json(folder / "tokenizer_config.json")
        self._tokenizer = _load_tokenizer(folder / "tokenizer.json")
        self._template = _compile(_chat_template(folder, settings), settings)
        self.max_seq_len = max_seq_len
        self.special_tokens: dict[str, int] = {
            added.content: i for i, added in self._tokenizer.get_added_tokens_decoder().items()
        }
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_id: int = self._id_of(settings, "eos_token", folder)
        self.pad_id: int = self._id_of(settings, "pad_token", folder) if settings.get("pad_token") else self.eos_id
        self.stop_tokens = [self.eos_id]
        self._byte_of = {char: byte for byte, char in _byte_level_alphabet().items()}
        self._special_text = {i: text.encode() for text, i in self.special_tokens.items()}

    def _id_of(self, settings: Mapping[str, Any], key: str, folder: Path) -> int:
        token = settings.get(key)
        text = token["content"] if isinstance(token, dict) else token
        number = self._tokenizer.token_to_id(text) if text else None
        if number is None:
            raise UserError(
                f"{folder / 'tokenizer_config.json'}: {key} is {token!r}, which tokenizer.json does not know."
            )
        return number

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as text."""
        plain = [{"role": _ROLE_IN_TEMPLATES.get(m.role, m.role), "content": m.text_content} for m in messages]
        try:
            return self._template.render(messages=plain, add_generation_prompt=add_generation_prompt, tools=None)
        except TemplateError as error:
            raise UserError(f"chat template: {error}") from error

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        tokens = self._tokenizer.encode(text, add_special_tokens=False).ids
        return tokens + [self.eos_id] if add_eos else tokens

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for."""
        if token in self._special_text:
            return self._special_text[token]
        piece = self._tokenizer.id_to_token(token)
        return bytes(self._byte_of[char] for char in piece) if piece is not None else b""

    def tokenize_messages(self, messages: list[Message], **kwargs: Any) -> tuple[list[int], list[bool]]:
        """Tokens of the whole conversation, and True for each that stands outside every unmasked message."""
        text = self.render(messages)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        open_spans = [span for i, m in enumerate(messages) if not m.masked for span in [self._span(messages, i, text)]]
        mask = [not any(start < b and a < end for start, end in open_spans) for a, b in encoding.offsets]
        tokens = encoding.ids
        return (tokens[: self.max_seq_len], mask[: self.max_seq_len]) if self.max_seq_len else (tokens, mask)

    def _span(self, messages: Sequence[Message], index: int, text: str) -> tuple[int, int]:
        """Where message `index` stands in the rendered text, without its header where it is the assistant's."""
        answers = messages[index].role == "assistant"
        before = self.render(messages[:index], add_generation_prompt=answers)
        through = self.render(messages[: index + 1])
        if not text.startswith(before) or not text.startswith(through):
            raise UserError(
                f"chat template: it rewrites what stands before message {index} once more messages follow, "
                "which this version cannot train on."
            )
        return len(before), len(through)

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        tokens, mask = self.tokenize_messages(sample["messages"])
        return {**{k: v for k, v in sample.items() if k != "messages"}, "tokens": tokens, "mask": mask}


def chat_template_tokenizer(path: str, max_seq_len: int | None = None) -> ChatTemplateTokenizer:
    """The tokenizer in folder `path` (tokenizer.json and tokenizer_config.json with its chat template)."""
    return ChatTemplateTokenizer(path, max_seq_len=max_seq_len)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"tokenizer: cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"tokenizer: {path} is not JSON: {error}") from error


def _load_tokenizer(path: Path) -> Tokenizer:
    state = _read_json(path)
    if "ByteLevel" not in json.dumps([state.get("pre_tokenizer"), state.get("decoder")]):
        raise UserError(f"tokenizer: {path} is not a byte-level BPE tokenizer, the only kind this version reads.")
    return Tokenizer.from_file(str(path))


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str:
    separate = folder / "chat_template.jinja"
    template = separate.read_text(encoding="utf-8") if separate.exists() else settings.get("chat_template")
    if not isinstance(template, str):
        raise UserError(f"tokenizer: no chat template in {folder} (chat_template.jinja or tokenizer_config.json).")
    return template


def _compile(template: str, settings: Mapping[str, Any]) -> Any:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _raise
    for name in ("bos_token", "eos_token", "pad_token"):
        token = settings.get(name)
        environment.globals[name] = (token["content"] if isinstance(token, dict) else token) or ""
    try:
        return environment.from_string(template)
    except TemplateError as error:
        raise UserError(f"chat template: {error}") from error


def _raise(message: str) -> None:
    raise TemplateError(message)


def _byte_level_alphabet() -> dict[int, str]:
    """The printable character byte-level BPE writes for every byte."""
    keep = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in keep]
    alphabet = {byte: chr(byte) for byte in keep} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
    assert set(alphabet.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    return alphabet
