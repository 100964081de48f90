"""Items that are written alike, such as a million calls `f(a=1), ` in a row, tagged many at a time.

Reading one call takes microseconds, so a text that is nothing but tiny calls would take many seconds. Once a loop has
read some hundred items one by one, the last few become a pattern: the same bytes, but another word wherever a name or
a value was one word. A word is letters, digits and underscores, which no grammar here looks into, so wherever the
pattern matches the marks are the same. A pattern that does not get far costs more than it saves: the next waits longer.
"""

import re
from dataclasses import dataclass

import numpy as np

from torchtune_agent.data.tagging.turn import ARG_NAME, ARG_VALUE, CALL_NAME, State, Turn

_NUM_IN_UNIT = 12  # items in one, so that two, three, four or six may take turns
_LONGEST_UNIT = 2000
_MOST_AT_ONCE = 1000
_WORTHWHILE = 30  # units that a pattern must match
_WORD = re.compile(rb"[A-Za-z_][A-Za-z0-9_]*|[0-9][A-Za-z0-9_]*")
_LIKE_WORD, _LIKE_NUMBER = b"[A-Za-z_][A-Za-z0-9_]*", b"[0-9][A-Za-z0-9_]*"
_IS_WORD = np.array([bytes([byte]).isalnum() or byte == 95 for byte in range(256)])
_WORDS = frozenset({CALL_NAME, ARG_NAME, ARG_VALUE})


class Alike:
    """Watches one loop over items of text[...:stop]: `skip` is told where every item ends."""

    patience = 256  # items read one by one before a pattern is made of the last ones
    _left = patience - _NUM_IN_UNIT
    _began: tuple[int, State] | None = None  # where the items of the pattern begin

    def __init__(self, turn: Turn, stop: int) -> None:
        self._turn, self._stop = turn, stop

    def skip(self, position: int) -> int:
        """Where to read on: `position`, or the end of the items after it that have been tagged here."""
        self._left -= 1
        return position if self._left > 0 else self._look(position)

    def _look(self, position: int) -> int:
        if self._began is None:
            self._began, self._left = (position, self._turn.state()), _NUM_IN_UNIT
            return position
        unit = _unit(self._turn, *self._began, position)
        end, num_units = unit.repeat(self._turn, position, self._stop) if unit else (position, 0)
        if num_units < _WORTHWHILE:
            self.patience *= 2
        self._began, self._left = None, self.patience - _NUM_IN_UNIT
        return end


@dataclass(frozen=True)
class _Unit:
    """Some items in a row and what was found in them, counted from their beginning."""

    size: int
    edges: np.ndarray  # where its words begin and end
    pattern: re.Pattern[bytes]
    positions: np.ndarray
    kinds: bytearray
    call_positions: np.ndarray
    call_numbers: np.ndarray
    num_calls: int

    def repeat(self, turn: Turn, position: int, stop: int) -> tuple[int, int]:
        """Mark every unit from `position` on but the last, as the item after a unit may decide what it is; returns
        their end and number."""
        num_units = 0
        while (match := self.pattern.match(turn.text, position, stop)) is not None:
            anchors = self._anchors(turn.text, position, match.end())
            numbers = np.arange(num_units + 1, num_units + len(anchors), dtype=np.int32)[:, None]
            calls = np.where(self.call_numbers >= 0, self.call_numbers + self.num_calls * numbers, np.int32(-1))
            turn.positions.frombytes(self._moved(self.positions, anchors[:-1]).tobytes())
            turn.kinds += self.kinds * len(numbers)
            turn.call_positions.frombytes(self._moved(self.call_positions, anchors[:-1]).tobytes())
            turn.call_numbers.frombytes(calls.tobytes())
            turn.next_call += self.num_calls * len(numbers)
            position, num_units = int(anchors[-1, 0]), num_units + len(numbers)
        return position, num_units

    def _anchors(self, text: bytes, start: int, stop: int) -> np.ndarray:
        """Where every unit of text[start:stop] and its words begin and end [units, 1 + edges]."""
        if not len(self.edges):
            return np.arange(start, stop, self.size)[:, None]
        edges = (_edges(text, start, stop) + start).reshape(-1, len(self.edges))
        return np.column_stack((edges[:, 0] - self.edges[0], edges))

    def _moved(self, positions: np.ndarray, anchors: np.ndarray) -> np.ndarray:
        """`positions` of this unit in the units with these anchors."""
        own = np.concatenate(([0], self.edges))
        nearest = np.searchsorted(own, positions, "right") - 1
        return anchors[:, nearest] + (positions - own[nearest])


def _unit(turn: Turn, start: int, state: State, stop: int) -> _Unit | None:
    """text[start:stop], tagged since `state`, or None where it is not fit to be a pattern."""
    text = turn.text[start:stop]
    if len(text) > _LONGEST_UNIT or b"\\" in text:
        return None
    if turn.text[start - 1 : start] != text[-1:]:  # what a line begins with may depend on the byte before it
        return None
    edges = _edges(text, 0, len(text))
    if len(edges) and edges[0] == 0 and edges[-1] == len(text):  # words of two units would be one
        return None
    num_changes, num_call_changes, next_call = state
    positions, kinds = np.array(turn.positions[num_changes:]) - start, turn.kinds[num_changes:]
    pattern = _pattern(text, positions.tolist(), kinds, set(edges.tolist()))
    return _Unit(
        len(text),
        edges,
        re.compile(b"(?:%b){2,%d}" % (pattern, _MOST_AT_ONCE)),
        positions,
        kinds,
        np.array(turn.call_positions[num_call_changes:]) - start,
        np.array(turn.call_numbers[num_call_changes:]),
        turn.next_call - next_call,
    )


def _pattern(unit: bytes, positions: list[int], kinds: bytearray, edges: set[int]) -> bytes:
    """A regular expression for the unit with other words for those that are a whole name or value."""
    parts, done = [], 0
    for start, stop, kind in zip(positions, positions[1:], kinds, strict=False):
        if kind in _WORDS and start in edges and stop in edges and _WORD.fullmatch(unit, start, stop):
            parts += (re.escape(unit[done:start]), _LIKE_NUMBER if unit[start : start + 1].isdigit() else _LIKE_WORD)
            done = stop
    return b"".join([*parts, re.escape(unit[done:])])


def _edges(text: bytes, start: int, stop: int) -> np.ndarray:
    """Where the words of text[start:stop] begin and end, in turns, counted from `start`."""
    is_word = np.zeros(stop - start + 2, bool)
    is_word[1:-1] = _IS_WORD[np.frombuffer(text, np.uint8, stop - start, start)]
    return np.flatnonzero(is_word[1:] != is_word[:-1])
