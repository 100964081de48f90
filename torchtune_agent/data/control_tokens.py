"""Encoding in which only the template can write a control token.

Control tokens are the special and added tokens of the tokenizer, except those of white space alone. A tokenizer cuts a
text at its control tokens and encodes each piece by itself. So does this, but only at those that the template wrote:
where data spells one, a copy of the tokenizer that knows none encodes the piece. Pieces are remembered, as system
prompts repeat from record to record, and all of a conversation from sample to sample.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache, cached_property
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer

from torchtune_agent.data.chat_template import RenderError
from torchtune_agent.data.tracing import MARKS, Marks
from torchtune_agent.data.word_memory import word_memory

Spelled = Literal["text", "refuse"]
Span = tuple[int, int]

_MAX_REMEMBERED = 1_000_000  # characters; their encodings take some 40 MB


class _Piece(NamedTuple):
    """A piece of text; `offsets` are the characters of every token, None where each byte of a token is one."""

    tokens: list[int]
    offsets: list[Span] | None


class EncodedText:
    """A text, its tokens, and which of them a stretch of its characters holds."""

    def __init__(self, text: str, num_bytes: "_NumBytes") -> None:
        self.text = text
        self.tokens: list[int] = []
        self._num_bytes = num_bytes
        self._pieces: list[_Piece | None] = []  # None for a control token
        self._first_chars: list[int] = []
        self._first_tokens: list[int] = []

    def add(self, start: int, tokens: Sequence[int], piece: _Piece | None) -> None:
        """The next piece of the text, which begins at character `start`."""
        self._first_chars.append(start)
        self._first_tokens.append(len(self.tokens))
        self._pieces.append(piece)
        self.tokens += tokens

    def end(self) -> "EncodedText":
        self.add(len(self.text), (), None)
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
        piece, first = self._pieces[number], self._first_tokens[number]
        if not inside or piece is None:
            return first
        return first + next((i for i, (_, end) in enumerate(self._spans(piece)) if end > inside), len(piece.tokens))

    def _num_begun(self, char: int) -> int:
        """How many tokens begin before a character."""
        number, inside = self._piece_at(char)
        piece, first = self._pieces[number], self._first_tokens[number]
        if not inside:
            return first
        if piece is None:
            return first + 1
        return first + next(
            (i for i, (start, _) in enumerate(self._spans(piece)) if start >= inside), len(piece.tokens)
        )

    def _spans(self, piece: _Piece) -> Iterable[Span]:
        """The characters of every token of a piece."""
        if piece.offsets is not None:
            return piece.offsets
        return pairwise(accumulate(map(self._num_bytes.__getitem__, piece.tokens), initial=0))

    def _piece_at(self, char: int) -> Span:
        """The piece that a character stands in, and where in it."""
        number = max(0, bisect_right(self._first_chars, char) - 1)
        return number, char - self._first_chars[number]


class _NumBytes(dict[int, int]):
    """How many bytes a token of a byte-level tokenizer stands for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> int:
        self[token] = len(self._tokenizer.id_to_token(token) or "")
        return self[token]


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
        self._words = word_memory(tokenizer)
        self._num_bytes = _NumBytes(tokenizer)
        self._remembered: dict[str, _Piece] = {}
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
        encoded = EncodedText(plain, self._num_bytes)
        if self._asks:
            encoding = _encode(self._tokenizer, plain)
            if [i for i in encoding.ids if i in self._controls] == [self._id_of(plain[a:b]) for a, b in real]:
                encoded.add(0, encoding.ids, _Piece(encoding.ids, encoding.offsets))
                return encoded.end()
        forged = sorted(set(places) - set(real)) if len(real) < len(places) else []
        if forged and (spelled == "refuse" or marks is None):
            names = ", ".join(sorted({plain[a:b] for a, b in forged}))
            raise RenderError("control_token", f"the text spells control tokens: {names}")
        position = 0
        for start, stop in [*real, (len(plain), len(plain))]:
            if position < start:
                is_forged = bisect_left(forged, (position, 0)) < bisect_left(forged, (start, 0)) if forged else False
                for part in self._parts(plain[position:start]):
                    piece = self._piece(part, is_forged)
                    encoded.add(position, piece.tokens, piece)
                    position += len(part)
            if start < stop:
                encoded.add(start, (self._id_of(plain[start:stop]),), None)
            position = stop
        return encoded.end()

    def _parts(self, text: str) -> Sequence[str]:
        return (text,) if self._words is None else self._words.parts(text)

    def _piece(self, text: str, forged: bool) -> _Piece:
        """The tokens of a text without a control token; `forged` where it spells one."""
        known = self._remembered.get(text)
        if known is not None:
            return known
        tokens = self._words.tokens(text) if self._words is not None else None
        piece = _Piece(tokens, None) if tokens is not None else self._encoded_piece(text, forged)
        if not self._controls.isdisjoint(piece.tokens):
            raise RenderError("control_token", "the tokenizer makes a control token of plain text.")
        if self._num_remembered > _MAX_REMEMBERED:
            self._remembered.clear()
            self._num_remembered = 0
        self._num_remembered += len(text)
        self._remembered[text] = piece
        return piece

    def forget(self, *, words: bool = False) -> None:
        """The texts that are remembered, and the `words`: what comes next takes longer and is the same."""
        self._remembered.clear()
        self._num_remembered = 0
        if words and self._words is not None:
            self._words.forget()

    def _encoded_piece(self, text: str, forged: bool) -> _Piece:
        encoding = _encode(self._without_controls if forged else self._tokenizer, text)
        if not self._controls.isdisjoint(encoding.ids) and not forged:
            encoding = _encode(self._without_controls, text)
        return _Piece(encoding.ids, encoding.offsets)

    @cached_property
    def _without_controls(self) -> Tokenizer:
        state = json.loads(self._tokenizer.to_str())
        state["added_tokens"] = [t for t in state["added_tokens"] if t["content"].strip() not in self._ids]
        return Tokenizer.from_str(json.dumps(state))

    def _id_of(self, spelling: str) -> int:
        known = self._ids.get(spelling)
        return self._ids[spelling.strip()] if known is None else known


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
        if marked.find(b"\1", start, stop) < 0:  # the same as below, of one part
            part = plain[start:stop].strip()
            return not (part and in_data(part))
        edges = np.flatnonzero(np.diff(written[start:stop], prepend=True, append=True)) + start
        unknown = (plain[a:b].strip() for a, b in zip(edges[::2], edges[1::2], strict=True))
        return not any(part and in_data(part) for part in unknown)

    return [place for place in places if is_its_own(*place)]


def _encode(tokenizer: Tokenizer, text: str) -> Encoding:
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except (UnicodeEncodeError, TypeError) as error:  # what tokenizers makes of lone surrogates
        raise RenderError("surrogate", "the text holds a lone surrogate, which no encoding has.") from error
