"""From messages to tokens with a class on every one.

A torchtune tokenizer renders a conversation its own way and says only which messages a token came from (its
mask). What it puts around a message's own text, a header and an end-of-turn, is constant for the tokenizer,
so it is measured once on short probes; what is left of a message's tokens is its text, whatever it says.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from torchtune.data import Message

from torchtune_agent.data.tagging import CallMarkers, tag_turn, tags_per_token
from torchtune_agent.data.token_class import TokenClass
from torchtune_agent.data.token_text import Vocabulary
from torchtune_agent.errors import UserError


@dataclass
class Encoded:
    """One conversation. All arrays have one entry per token; nothing is shifted yet."""

    tokens: np.ndarray  # int32
    token_class: np.ndarray  # uint8, TokenClass; IGNORED where not trained
    call_index: np.ndarray  # int32, -1 outside calls
    num_cut: int = 0  # tokens lost to the length limit


@dataclass(frozen=True)
class _Turn:
    """A trained message in the token stream: text is tokens[start:end], its end-of-turn tokens[end:stop]."""

    start: int
    end: int
    stop: int
    role: str


@dataclass
class ConversationEncoder:
    """Tokenizes, cuts to `max_seq_len`, and classes every token of every message that is not masked."""

    tokenizer: Any
    vocabulary: Vocabulary
    max_seq_len: int | None = None
    markers: CallMarkers = field(default_factory=CallMarkers)

    def __post_init__(self) -> None:
        # Its own truncation would train a stop token in mid-sentence.
        self._unlimited = copy.copy(self.tokenizer)
        self._unlimited.max_seq_len = None
        self._frame = cache(self._measure_frame)

    def encode(self, messages: Sequence[Message]) -> Encoded:
        tokens, turns = self._tokens_and_turns(messages)
        kept = len(tokens) if self.max_seq_len is None else min(len(tokens), self.max_seq_len)
        classes = np.full(kept, TokenClass.IGNORED, np.uint8)
        calls = np.full(kept, -1, np.int32)
        call = 0
        for turn in turns:
            classes[turn.end : turn.stop] = TokenClass.SPECIAL
            part = slice(turn.start, min(turn.end, kept))
            if part.start >= part.stop:
                continue
            classes[part] = TokenClass.REASONING
            if turn.role == "assistant":
                text, starts = self.vocabulary.spell(tokens[part])
                tags, call = tag_turn(text, truncated=turn.end > kept, markers=self.markers, first_call=call)
                folded = tags_per_token(tags, starts[:-1])
                classes[part], calls[part] = folded.classes, folded.calls
        return Encoded(np.asarray(tokens[:kept], np.int32), classes, calls, len(tokens) - kept)

    def _tokens_and_turns(self, messages: Sequence[Message]) -> tuple[list[int], list[_Turn]]:
        trained = [i for i, message in enumerate(messages) if not message.masked]
        # Messages in a row share one run of the mask; showing every second one at a time keeps them apart.
        regions: dict[int, tuple[int, int]] = {}
        tokens: list[int] = []
        for shown in (trained[::2], trained[1::2]):
            tokens, mask = self._tokenize(messages, set(shown))
            regions |= zip(shown, _runs(mask, len(shown)), strict=True)
        turns = [self._turn(messages, i, tokens, regions[i]) for i in trained]
        return tokens, turns

    def _turn(self, messages: Sequence[Message], i: int, tokens: list[int], region: tuple[int, int]) -> _Turn:
        before = messages[i - 1].role if i else None
        header, footer = self._frame(messages[i].role, before, i == len(messages) - 1)
        start, end = region[0] + header, region[1] - footer
        stop = end
        for position in range(end, region[1]):  # white space, then the first control token
            if tokens[position] in self.vocabulary.special_ids:
                stop = position + 1
                break
        return _Turn(start, end, stop, messages[i].role)

    def _measure_frame(self, role: Any, before: Any, is_last: bool) -> tuple[int, int]:
        """How many tokens stand before and after the text of a `role` message in this place."""
        around = [Message(role=before, content="x", masked=True)] if before else []
        after = [] if is_last else [Message(role="user", content="x", masked=True)]
        probes = []
        for text in ("", "x"):
            conversation = [*around, Message(role=role, content=text, masked=False), *after]
            tokens, mask = self._tokenize(conversation, {len(around)})
            ((start, end),) = _runs(mask, 1)
            probes.append(tokens[start:end])
        empty, filled = probes
        header = next((n for n, (a, b) in enumerate(zip(empty, filled, strict=False)) if a != b), len(empty))
        return header, len(empty) - header

    def _tokenize(self, messages: Sequence[Message], shown: set[int]) -> tuple[list[int], list[bool]]:
        masked = [copy.copy(message) for message in messages]
        for i, message in enumerate(masked):
            message.masked = i not in shown
        try:
            return self._unlimited.tokenize_messages(masked)
        except (ValueError, TypeError, RuntimeError, AssertionError) as error:
            raise UserError(f"{type(self.tokenizer).__name__} refuses it: {error}") from error


def _runs(mask: Sequence[bool], num_runs: int) -> list[tuple[int, int]]:
    """Where the mask is open, as `num_runs` half-open intervals."""
    edges = np.flatnonzero(np.diff(np.concatenate(([True], np.asarray(mask, bool), [True]))))
    runs = [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    if len(runs) != num_runs:
        if num_runs == 1 and not runs:
            return [(len(mask), len(mask))]  # an empty message without a frame
        raise UserError(
            f"the tokenizer shows {len(runs)} of {num_runs} trained messages; its mask does not tell them apart"
        )
    return runs
