"""The bytes every token stands for, for every tokenizer torchtune ships and for ours.

Decoding tokens one by one breaks multibyte text: a token may hold half a character. Bytes never lie, so
tagging works on them, and this module is where they come from.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from torchtune.models.gemma import GemmaTokenizer
from torchtune.models.llama2 import Llama2Tokenizer
from torchtune.models.llama3 import Llama3Tokenizer
from torchtune.models.mistral import MistralTokenizer
from torchtune.models.phi3 import Phi3MiniTokenizer
from torchtune.models.phi4._tokenizer import Phi4Tokenizer
from torchtune.models.qwen2 import Qwen2Tokenizer

from torchtune_agent.data.templates import ChatTemplateTokenizer
from torchtune_agent.errors import UserError

_PLACEHOLDER = b"\xff"  # for ids without text of their own; never part of UTF-8 text
_Read = tuple[Callable[[int], bytes], set[int], int]  # text of an id, special ids, largest id


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer's ids stand for. `text_of(id)` is never empty."""

    text_of: Callable[[int], bytes]
    special_ids: frozenset[int]
    size: int  # ids are below it, though not all need be in use

    def spell(self, tokens: Sequence[int]) -> tuple[bytes, np.ndarray]:
        """The bytes of `tokens` joined, and where each begins (with one more entry: the end)."""
        pieces = list(map(self.text_of, tokens))
        starts = np.fromiter(accumulate(map(len, pieces), initial=0), np.int64, len(pieces) + 1)
        return b"".join(pieces), starts


def vocabulary(tokenizer: Any) -> Vocabulary:
    """The vocabulary of a torchtune tokenizer."""
    for kind, read in _READERS.items():
        if isinstance(tokenizer, kind):
            text_of, special_ids, size = read(tokenizer)
            return Vocabulary(_never_empty(text_of), frozenset(special_ids), max(size, *special_ids, 0) + 1)
    raise UserError(
        f"tokenizer: token classes need to know the bytes of every token, and {type(tokenizer).__name__} is not among "
        f"the tokenizers this version can read ({', '.join(kind.__name__ for kind in _READERS)}). "
        "Use torchtune_agent.data.chat_template_tokenizer with the model's folder."
    )


def _never_empty(text_of: Callable[[int], bytes]) -> Callable[[int], bytes]:
    return _Texts(text_of).__getitem__


class _Texts(dict[int, bytes]):
    """The texts of tokens, read once: looking one up in a dictionary takes half the time of a cached call."""

    def __init__(self, text_of: Callable[[int], bytes]) -> None:
        self._text_of = text_of

    def __missing__(self, token: int) -> bytes:
        self[token] = self._text_of(token) or _PLACEHOLDER
        return self[token]


def _byte_level(tokenizer: Any, base: Any) -> _Read:
    """Byte-level BPE: `base` writes every byte as a printable character."""
    special = {i: text.encode() for text, i in tokenizer.special_tokens.items()}

    def text_of(token: int) -> bytes:
        if token in special:
            return special[token]
        return bytes(base.byte_decoder[c] for c in base.decoder.get(token, ""))

    return text_of, set(special), max(base.decoder)


def _llama3(tokenizer: Llama3Tokenizer) -> _Read:
    encoding = tokenizer.tt_model.tt_model
    return encoding.decode_single_token_bytes, set(tokenizer.special_tokens.values()), encoding.max_token_value


def _sentencepiece(tokenizer: Any, special_tokens: Mapping[str, int] | None = None) -> _Read:
    model = tokenizer._spm_model.spm_model
    named = {i: text.encode() for text, i in (special_tokens or {}).items()}
    control = {i for i in range(model.vocab_size()) if model.is_control(i)} | set(named)

    def text_of(token: int) -> bytes:
        if token in named or token >= model.vocab_size():
            return named.get(token, _PLACEHOLDER)
        piece = model.id_to_piece(token)
        if model.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    return text_of, control, model.vocab_size() - 1


def _chat_template(tokenizer: ChatTemplateTokenizer) -> _Read:
    return tokenizer.token_bytes, set(tokenizer.special_tokens.values()), tokenizer.vocab_size - 1


_READERS: dict[type, Callable[[Any], _Read]] = {
    ChatTemplateTokenizer: _chat_template,
    Qwen2Tokenizer: lambda tokenizer: _byte_level(tokenizer, tokenizer),
    Llama3Tokenizer: _llama3,
    Llama2Tokenizer: _sentencepiece,
    MistralTokenizer: _sentencepiece,
    GemmaTokenizer: _sentencepiece,
    Phi3MiniTokenizer: lambda tokenizer: _sentencepiece(tokenizer, tokenizer.special_tokens),
    Phi4Tokenizer: lambda tokenizer: _byte_level(tokenizer, tokenizer.tokenizer_model),
}
