"""Control tokens spelled in data, with torchtune's own tokenizers.

Those of Llama, Mistral and Phi never make a control token of text. Qwen's cut every text at the tokens it spells, so
they are given texts that say which of these are meant, and encode the others as plain text; so does Gemma's, to which
the marks of turns are words of its vocabulary.
"""

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias
from unicodedata import normalize

from torchtune.data import Message
from torchtune.models.gemma import GemmaTokenizer
from torchtune.models.qwen2 import Qwen2Tokenizer

from torchtune_agent.data.control_tokens import Span, Spelled
from torchtune_agent.data.reasons import BadRecord
from torchtune_agent.data.token_text import Vocabulary

# Who wrote a piece of a message: this package, the assistant whose message it is, or somebody else.
Writer: TypeAlias = Literal["ours", "assistant", "data"]
Piece: TypeAlias = tuple[str, Writer]

# What an assistant's own text may spell as tokens, of tokenizers that have them.
_ITS_OWN = frozenset(("<tool_call>", "</tool_call>", "<think>", "</think>"))
_GEMMA_TURNS = ("<start_of_turn>", "<end_of_turn>")


class MeantText(str):
    """A text that spells control tokens; `meant` are the places of those that are to become one."""

    meant: tuple[Span, ...]

    def __new__(cls, text: str, meant: Sequence[Span]) -> "MeantText":
        made = super().__new__(cls, text)
        made.meant = tuple(meant)
        return made

    def rstrip(self, chars: str | None = None, /) -> "MeantText":
        """As some tokenizers do before they encode; no token ends in a space."""
        return MeantText(super().rstrip(chars), self.meant)


class SpelledTokens:
    """Finds the control tokens of a tokenizer in what is written for it."""

    def __init__(self, tokenizer: Any, vocabulary: Vocabulary, spelled: Spelled = "text") -> None:
        texts = {vocabulary.text_of(i).decode("utf-8", "replace") for i in vocabulary.special_ids}
        texts |= {*_GEMMA_TURNS} if isinstance(tokenizer, GemmaTokenizer) else set()
        longest_first = sorted(filter(str.strip, texts), key=lambda text: (-len(text), text))
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._its_own = _ITS_OWN if isinstance(tokenizer, Qwen2Tokenizer) else frozenset()
        self._refuse = spelled == "refuse"

    def joined(self, pieces: Sequence[Piece]) -> str:
        """The text of the pieces, a `MeantText` where data spells a control token in it."""
        text = "".join(piece for piece, _ in pieces)
        places = [match.span() for match in self._pattern.finditer(text)]
        meant = [place for place in places if self._is_meant(place, text, pieces)] if places else []
        if len(meant) == len(places):
            return text
        if self._refuse:
            names = ", ".join(sorted({text[a:b] for a, b in set(places) - set(meant)}))
            raise BadRecord("unsupported_content", f"the text spells control tokens: {names}")
        return MeantText(text, meant)

    def _is_meant(self, place: Span, text: str, pieces: Sequence[Piece]) -> bool:
        start = 0
        for piece, writer in pieces:
            stop = start + len(piece)
            if start <= place[0] < stop:  # one that reaches over the piece's end is nobody's
                its_own = writer == "assistant" and text[slice(*place)] in self._its_own
                return place[1] <= stop and (writer == "ours" or its_own)
            start = stop
        return False

    def in_message(self, message: Message) -> Message:
        """A message as somebody else made it, whose text is all data."""
        writer: Writer = "assistant" if message.role == "assistant" else "data"
        made = copy.copy(message)
        made.content = [
            {**item, "content": self.joined([(item["content"], writer)])} if item["type"] == "text" else item
            for item in message.content
        ]
        return made


def heeding(tokenizer: Any) -> Any:
    """A copy of a torchtune tokenizer that makes control tokens only of what is meant in a `MeantText`."""
    made = copy.copy(tokenizer)
    if isinstance(tokenizer, Qwen2Tokenizer):
        made.encode = _encode_qwen(tokenizer)
    elif isinstance(tokenizer, GemmaTokenizer):
        made.encode = _encode_gemma(tokenizer)
    return made


def _encode_qwen(tokenizer: Qwen2Tokenizer) -> Callable[..., list[int]]:
    def plain(text: str) -> list[int]:
        return [tokenizer._convert_token_to_id(token) for token in tokenizer._tokenize(normalize("NFC", text))]

    def encode(text: str, **options: bool) -> list[int]:
        if not isinstance(text, MeantText):
            return tokenizer.encode(text, **options)
        tokens: list[int] = []
        position = 0
        for start, stop in text.meant:
            tokens += plain(text[position:start])
            tokens.append(tokenizer.special_tokens[text[start:stop]])
            position = stop
        return tokens + plain(text[position:])

    return encode


def _encode_gemma(tokenizer: GemmaTokenizer) -> Callable[..., list[int]]:
    cut = re.compile(f"(?<=<)(?={'|'.join(turn[1:] for turn in _GEMMA_TURNS)})")

    def encode(text: str, **options: bool) -> list[int]:
        if not isinstance(text, MeantText):
            return tokenizer.encode(text, **options)
        first, *rest = cut.split(text)
        tokens = tokenizer.encode(first, **options)
        options = {**options, "trim_leading_whitespace": True}
        return tokens + [token for part in rest for token in tokenizer.encode(part, **options)]

    return encode
