"""Encoding in which only the template can write a control token.

Control tokens are the special and added tokens of the tokenizer, except those of white space alone. The text is encoded
whole, as a server does it, and the control tokens that come out are compared with those the template wrote. Where data
spells one, the text is cut at the template's tokens, and a copy of the tokenizer that knows none encodes the rest.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer

from torchtune_agent.data.chat_template import RenderError
from torchtune_agent.data.tracing import PLANES, Marks

Spelled = Literal["text", "refuse"]
Span = tuple[int, int]


class EncodedText:
    """Tokens of a text, and which of them a stretch of its characters holds."""

    def __init__(self, tokens: list[int], offsets: Encoding | Sequence[Span]) -> None:
        self.tokens = tokens
        self._offsets = offsets

    def touching(self, start: int, stop: int) -> Span:
        """The tokens that have a character in [start, stop)."""
        if not isinstance(self._offsets, Encoding):
            starts, ends = np.array(self._offsets, np.int64).reshape(-1, 2).T
            return int(np.searchsorted(ends, start, "right")), int(np.searchsorted(starts, stop, "left"))
        # A normalizer may drop a character, which then has no token.
        firsts = (self._offsets.char_to_token(c) for c in range(start, stop))
        first = next((t for t in firsts if t is not None), 0)
        lasts = (self._offsets.char_to_token(c) for c in range(stop - 1, start - 1, -1))
        after = next((t for t in lasts if t is not None), 0)
        while after < len(self.tokens) and self._chars(after)[0] < stop:  # several tokens may share a character
            after += 1
        return first, after

    def within(self, start: int, stop: int) -> Span:
        """The tokens all of whose characters lie in [start, stop): one that reaches over an end is left out."""
        if start >= stop:
            return 0, 0
        first, after = self.touching(start, stop)
        while first < after and self._chars(first)[0] < start:
            first += 1
        while first < after and self._chars(after - 1)[1] > stop:
            after -= 1
        return first, after

    def _chars(self, token: int) -> Span:
        chars = self._offsets.token_to_chars(token) if isinstance(self._offsets, Encoding) else self._offsets[token]
        assert chars is not None
        return chars


class ControlTokens:
    """The control tokens of one tokenizer, and its encoding of marked text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = {i: token for i, token in tokenizer.get_added_tokens_decoder().items() if token.content.strip()}
        self._added = list(added.values())
        self._ids = {token.content.strip(): i for i, token in added.items()}
        self._is_control = np.zeros(max(added, default=0) + 1, bool)
        self._is_control[list(added)] = True
        self._spelled = _any_of(self._added, None)
        self._marked = {plane: _any_of(self._added, Marks(plane)) for plane in PLANES}
        special = sorted((token.content for token in self._added if token.special), key=len, reverse=True)
        self._special = {None: special} | {p: [Marks(p).mark(text) for text in special] for p in PLANES}

    def specials(self, marks: Marks | None) -> list[str]:
        """The special tokens, marked as the template writes them, the longest first."""
        return self._special[marks.plane if marks else None]

    def encode(self, text: str, marks: Marks | None, data: Sequence[str], spelled: Spelled = "text") -> EncodedText:
        """Encode a rendered text; without `marks`, data that spells a control token is always refused.

        Args:
            text: as rendered, marked where `marks` is given.
            marks: which marks.
            data: every string the template was given.
            spelled: what to do where data spells a control token.
        """
        plain, written = marks.split(text) if marks else (text, np.zeros(len(text), bool))
        encoding = _encode(self._tokenizer, plain)
        found = self._controls_among(encoding.ids)
        if marks and found == self._ids_of(marks.plain(m[0]) for m in self._marked[marks.plane].finditer(text)):
            return EncodedText(encoding.ids, encoding)
        places = [m.span() for m in self._spelled.finditer(plain)]
        in_data = lru_cache(maxsize=None)(lambda part: any(part in text for text in data))
        real = [place for place in places if _is_the_templates(place, plain, written, in_data)]
        if real == places and found == self._ids_of(plain[a:b] for a, b in real):
            return EncodedText(encoding.ids, encoding)
        if spelled == "refuse" or marks is None:
            forged = sorted({plain[a:b] for a, b in set(places) - set(real)})
            raise RenderError("control_token", f"the text spells control tokens: {', '.join(forged)}")
        return self._encode_in_pieces(plain, real)

    def _encode_in_pieces(self, plain: str, real: Sequence[Span]) -> EncodedText:
        """Encode with the control tokens at `real`, and none elsewhere."""
        tokens: list[int] = []
        offsets: list[Span] = []
        for (_, start), (stop, after) in pairwise([(0, 0), *real, (len(plain), len(plain))]):
            encoding = _encode(self._without_controls, plain[start:stop])
            if self._controls_among(encoding.ids):
                raise RenderError("control_token", "the tokenizer makes a control token of plain text.")
            tokens += encoding.ids
            offsets += [(a + start, b + start) for a, b in encoding.offsets]
            if after > stop:
                tokens += self._ids_of([plain[stop:after]])
                offsets.append((stop, after))
        return EncodedText(tokens, offsets)

    @cached_property
    def _without_controls(self) -> Tokenizer:
        state = json.loads(self._tokenizer.to_str())
        state["added_tokens"] = [t for t in state["added_tokens"] if t["content"].strip() not in self._ids]
        return Tokenizer.from_str(json.dumps(state))

    def _ids_of(self, spellings: Iterable[str]) -> list[int]:
        return [self._ids[text.strip()] for text in spellings]

    def _controls_among(self, tokens: list[int]) -> list[int]:
        ids = np.array(tokens, np.int64)
        ids = ids[ids < len(self._is_control)]
        return ids[self._is_control[ids]].tolist()


def _any_of(added: Sequence[AddedToken], marks: Marks | None) -> re.Pattern[str]:
    """Matches as tokenizers does: the leftmost, there the longest, with the white space that some tokens swallow."""
    parts = [
        r"\s*" * token.lstrip + re.escape(marks.mark(token.content) if marks else token.content) + r"\s*" * token.rstrip
        for token in sorted(added, key=lambda token: -len(token.content))
    ]
    return re.compile("|".join(parts) or "(?!)")


def _is_the_templates(place: Span, plain: str, written: np.ndarray, in_data: Callable[[str], bool]) -> bool:
    """Whether the template spelled what stands at `place`: it wrote every character, or no data holds the ones it is
    not known to have written (a literal that it took from a list, say)."""
    start, stop = place
    edges = np.flatnonzero(np.diff(written[start:stop], prepend=True, append=True)) + start
    unknown = (plain[a:b].strip() for a, b in zip(edges[::2], edges[1::2], strict=True))
    return not any(part and in_data(part) for part in unknown)


def _encode(tokenizer: Tokenizer, text: str) -> Encoding:
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except (UnicodeEncodeError, TypeError) as error:  # what tokenizers makes of lone surrogates
        raise RenderError("surrogate", "the text holds a lone surrogate, which no encoding has.") from error
