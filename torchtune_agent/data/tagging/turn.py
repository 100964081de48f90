"""One assistant turn while it is being tagged, and the tags that come out.

A call style walks forward through the bytes and says where the class changes; nothing is written per byte until the
end, when the changes are spread over the text in one go. That keeps a short turn cheap and a long one linear.
"""

from array import array
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import numpy as np

from torchtune_agent.data.token_class import TokenClass

THINK, THINK_END = b"<think>", b"</think>"
# Names of their own, because looking up a member takes longer than marking a span.
CALL_NAME, ARG_NAME, ARG_VALUE = TokenClass.CALL_NAME, TokenClass.ARG_NAME, TokenClass.ARG_VALUE
_REASONING, _THINK, _SYNTAX = TokenClass.REASONING, TokenClass.THINK, TokenClass.CALL_SYNTAX
_ZERO, _PLAIN, _NO_CALL = array("q", (0,)), bytearray((_REASONING,)), array("i", (-1,))

State: TypeAlias = tuple[int, int, int]  # how many changes, how many changes of the call, the number of the next call


@dataclass
class Tags:
    """One entry per byte of the text: its class, and the call it is in (-1: none)."""

    classes: np.ndarray  # uint8 [bytes]
    calls: np.ndarray  # int32 [bytes]


@dataclass
class Turn:
    """The text and the changes found so far, both in order: from `positions[i]` on, bytes are of `kinds[i]`; from
    `call_positions[i]` on, they are in call `call_numbers[i]`."""

    text: bytes
    truncated: bool
    next_call: int
    head: int = 0  # nothing but white space and thinking stands before it; -1 behind the first of anything else
    positions: "array[int]" = field(default_factory=_ZERO.__copy__)
    kinds: bytearray = field(default_factory=_PLAIN.copy)
    call_positions: "array[int]" = field(default_factory=_ZERO.__copy__)
    call_numbers: "array[int]" = field(default_factory=_NO_CALL.__copy__)

    @cached_property
    def plain(self) -> bytes:
        """The text with every backslash and what it escapes blanked, so that a quote in it ends a string."""
        if b"\\" not in self.text:
            return self.text
        # Pairs first: what is left of a run of backslashes is at most one, and that one escapes what follows.
        return self.text.replace(b"\\\\", b"__").replace(b'\\"', b"__").replace(b"\\'", b"__")

    def begin_block(self, position: int) -> None:
        self.positions.append(position)
        self.kinds.append(_SYNTAX)
        self.begin_call(position)

    def begin_call(self, position: int) -> None:
        self.call_positions.append(position)
        self.call_numbers.append(self.next_call)
        self.next_call += 1

    def mark(self, start: int, stop: int, kind: TokenClass) -> None:
        """text[start:stop], inside a block, is of `kind`; what follows is syntax until told otherwise."""
        self.positions.append(start)
        self.positions.append(stop)
        self.kinds.append(kind)
        self.kinds.append(_SYNTAX)

    def end_block(self, position: int) -> int:
        self.positions.append(position)
        self.kinds.append(_REASONING)
        self.call_positions.append(position)
        self.call_numbers.append(-1)
        return position

    def think(self, start: int, stop: int) -> None:
        self.positions.append(start)
        self.positions.append(stop)
        self.kinds.append(_THINK)
        self.kinds.append(_REASONING)

    def state(self) -> State:
        return len(self.positions), len(self.call_positions), self.next_call

    def restore(self, state: State) -> None:
        """Forget what was found since `state` was taken: it was no call after all."""
        num_changes, num_call_changes, self.next_call = state
        del self.positions[num_changes:], self.kinds[num_changes:]
        del self.call_positions[num_call_changes:], self.call_numbers[num_call_changes:]

    def tags(self) -> Tags:
        size = len(self.text)
        if len(self.positions) == 1:
            return Tags(np.full(size, TokenClass.REASONING, np.uint8), np.full(size, -1, np.int32))
        kinds = np.frombuffer(bytes(self.kinds), np.uint8)
        numbers = np.frombuffer(self.call_numbers, np.int32)
        return Tags(_spread(kinds, self.positions, size), _spread(numbers, self.call_positions, size))


def _spread(values: np.ndarray, positions: "array[int]", size: int) -> np.ndarray:
    edges = np.frombuffer(positions + array("q", (size,)), np.int64)
    return np.repeat(values, edges[1:] - edges[:-1])


def tags_per_token(tags: Tags, starts: np.ndarray) -> Tags:
    """Fold byte tags into token tags, given the byte at which every token starts (strictly increasing)."""
    if len(starts) == 0:
        return Tags(np.zeros(0, np.uint8), np.zeros(0, np.int32))
    return Tags(np.maximum.reduceat(tags.classes, starts), np.maximum.reduceat(tags.calls, starts))
