"""Encoding in which only the template can write a control token.

Control tokens are the special and added tokens of the tokenizer, except those of white space alone. A tokenizer cuts a
text at its control tokens and encodes each piece by itself. So does this, but only at those that the template wrote:
where data spells one, a copy of the tokenizer that knows none encodes the piece. Pieces are remembered, as system
prompts repeat from record to record, and all of a conversation from sample to sample.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Sequence
from functools import cache, cached_property
from typing import Literal

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer

from torchtune_agent.data.chat_template import RenderError
from torchtune_agent.data.tracing import MARKS, Marks

Spelled = Literal["text", "refuse"]
Span = tuple[int, int]

_MAX_REMEMBERED = 1_000_000  # characters; their encodings take some 40 MB


class EncodedText:
    """A text, its tokens, and which of them a stretch of its characters holds."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[int] = []
        self._pieces: list[Encoding | None] = []  # None for a control token
        self._first_chars: list[int] = []
        self._first_tokens: list[int] = []

    def add(self, start: int, tokens: Sequence[int], encoding: Encoding | None) -> None:
        """The next piece of the text, which begins at character `start`."""
        self._first_chars.append(start)
        self._first_tokens.append(len(self.tokens))
        self._pieces.append(encoding)
        self.tokens += tokens

    def end(self) -> "EncodedText":
        self.add(len(self.text), [], None)
        return self

    def touching(self, start: int, stop: int) -> Span:
        """The tokens that have a character in [start, stop)."""
        return self._num_ended(start), self._num_begun(stop)

    def within(self, start: int, stop: int) -> Span:
        """The tokens all of whose characters lie in [start, stop): one that reaches over an end is left out."""
        first = self._num_begun(start)
        return first, max(first, self._num_ended(stop))

    def _num_ended(self, char: int) -> int:
        """How many tokens end before or at the beginning of a character."""
        number, inside = self._piece_at(char)
        first, encoding = self._first_tokens[number], self._pieces[number]
        if not inside or encoding is None:
            return first
        # A normalizer may drop a character, which then has no token.
        size = self._first_chars[number + 1] - self._first_chars[number]
        tokens = (encoding.char_to_token(c) for c in range(inside, size))
        return first + next((token for token in tokens if token is not None), len(encoding))

    def _num_begun(self, char: int) -> int:
        """How many tokens begin before a character."""
        number, inside = self._piece_at(char)
        encoding = self._pieces[number]
        if not inside:
            return self._first_tokens[number]
        if encoding is None:
            return self._first_tokens[number] + 1
        token = self._num_ended(char) - self._first_tokens[number]
        while token < len(encoding):  # several tokens may share a character
            chars = encoding.token_to_chars(token)
            if chars is not None and chars[0] >= inside:
                break
            token += 1
        return self._first_tokens[number] + token

    def _piece_at(self, char: int) -> Span:
        """The piece that a character stands in, and where in it."""
        number = max(0, bisect_right(self._first_chars, char) - 1)
        return number, char - self._first_chars[number]


class ControlTokens:
    """The control tokens of one tokenizer, and its encoding of marked text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = {i: token for i, token in tokenizer.get_added_tokens_decoder().items() if token.content.strip()}
        self._added = list(added.values())
        self._ids = {token.content.strip(): i for i, token in added.items()}
        self._controls = frozenset(added)
        self._spelled = _any_of(self._added)
        # Where a token is known by more than its spelling, the tokenizer is asked what it makes of the whole text.
        normalizes = repr(tokenizer.normalizer) not in ("None", "Sequence(normalizers=[])")
        self._asks = any(token.single_word or (token.normalized and normalizes) for token in self._added)
        special = sorted((token.content for token in self._added if token.special), key=len, reverse=True)
        self._special = {None: special} | {p: [marks.mark(text) for text in special] for p, marks in MARKS.items()}
        self._remembered: dict[str, tuple[list[int], Encoding]] = {}
        self._num_remembered = 0

    def specials(self, marks: Marks | None) -> list[str]:
        """The special tokens, marked as the template writes them, the longest first."""
        return self._special[marks.plane if marks else None]

    def spelled_in(self, text: str) -> list[str]:
        """The control tokens that a plain text spells."""
        return [m[0].strip() for m in self._spelled.finditer(text)]

    def not_special(self) -> frozenset[str]:
        """Those that tokenizer.json does not call special."""
        return frozenset(token.content.strip() for token in self._added if not token.special)

    def replaced(self, text: str, tokens: Collection[str], by: Callable[[str], str]) -> str:
        """A plain text with those of `tokens` that it spells replaced."""
        return self._spelled.sub(lambda m: by(m[0]) if m[0].strip() in tokens else m[0], text)

    def encode(self, text: str, marks: Marks | None, data: Sequence[str], spelled: Spelled = "text") -> EncodedText:
        """Encode a rendered text; without `marks`, data that spells a control token is always refused.

        Args:
            text: as rendered, marked where `marks` is given.
            marks: which marks.
            data: every string the template was given.
            spelled: what to do where data spells a control token.
        """
        plain, written = marks.split(text) if marks else (text, np.zeros(len(text), bool))
        places = [m.span() for m in self._spelled.finditer(plain)]
        real = _of_the_template(places, plain, written, data)
        encoded = EncodedText(plain)
        if self._asks:
            encoding = _encode(self._tokenizer, plain)
            if [i for i in encoding.ids if i in self._controls] == [self._id_of(plain[a:b]) for a, b in real]:
                encoded.add(0, encoding.ids, encoding)
                return encoded.end()
        forged = sorted(set(places) - set(real)) if len(real) < len(places) else []
        if forged and (spelled == "refuse" or marks is None):
            names = ", ".join(sorted({plain[a:b] for a, b in forged}))
            raise RenderError("control_token", f"the text spells control tokens: {names}")
        position = 0
        for start, stop in [*real, (len(plain), len(plain))]:
            if position < start:
                is_forged = bisect_left(forged, (position, 0)) < bisect_left(forged, (start, 0))
                encoded.add(position, *self._piece(plain[position:start], is_forged))
            if start < stop:
                encoded.add(start, [self._id_of(plain[start:stop])], None)
            position = stop
        return encoded.end()

    def _piece(self, text: str, forged: bool) -> tuple[list[int], Encoding]:
        """The tokens of a text without a control token; `forged` where it spells one."""
        known = self._remembered.get(text)
        if known is not None:
            return known
        encoding = _encode(self._without_controls if forged else self._tokenizer, text)
        if not self._controls.isdisjoint(encoding.ids) and not forged:
            encoding = _encode(self._without_controls, text)
        if not self._controls.isdisjoint(encoding.ids):
            raise RenderError("control_token", "the tokenizer makes a control token of plain text.")
        self._num_remembered += len(text)
        if self._num_remembered > _MAX_REMEMBERED:
            self._remembered.clear()
            self._num_remembered = len(text)
        self._remembered[text] = encoding.ids, encoding
        return self._remembered[text]

    @cached_property
    def _without_controls(self) -> Tokenizer:
        state = json.loads(self._tokenizer.to_str())
        state["added_tokens"] = [t for t in state["added_tokens"] if t["content"].strip() not in self._ids]
        return Tokenizer.from_str(json.dumps(state))

    def _id_of(self, spelling: str) -> int:
        return self._ids[spelling.strip()]


def _any_of(added: Sequence[AddedToken]) -> re.Pattern[str]:
    """Matches as tokenizers does: the leftmost, there the longest, with the white space that some tokens swallow."""
    parts = [
        r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip
        for token in sorted(added, key=lambda token: -len(token.content))
    ]
    return re.compile("|".join(parts) or "(?!)")


def _of_the_template(places: Sequence[Span], plain: str, written: np.ndarray, data: Sequence[str]) -> list[Span]:
    """Those of `places` that the template spelled: it wrote every character, or no data holds the ones it is not known
    to have written (a literal that it took from a list, say)."""
    marked = written.tobytes()
    in_data = cache(lambda part: any(part in text for text in data))

    def is_its_own(start: int, stop: int) -> bool:
        if marked.find(b"\0", start, stop) < 0:
            return True
        edges = np.flatnonzero(np.diff(written[start:stop], prepend=True, append=True)) + start
        unknown = (plain[a:b].strip() for a, b in zip(edges[::2], edges[1::2], strict=True))
        return not any(part and in_data(part) for part in unknown)

    return [place for place in places if is_its_own(*place)]


def _encode(tokenizer: Tokenizer, text: str) -> Encoding:
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except (UnicodeEncodeError, TypeError) as error:  # what tokenizers makes of lone surrogates
        raise RenderError("surrogate", "the text holds a lone surrogate, which no encoding has.") from error
