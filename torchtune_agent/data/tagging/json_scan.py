"""A forward scanner for JSON that may be cut, or broken: where strings, values and members stand, in bytes.

It never looks back and never builds a value. Two things can stop it: the end of the text (`Cut`) and a byte that JSON
does not allow there (`Broken`); the caller decides what each means. Text is scanned with its escapes blanked
(`Turn.plain`), so the next quote is always the end of a string.
"""

import re

import numpy as np

_SPACE = re.compile(rb"[ \t\r\n]*")
_SCALAR = re.compile(rb'[^\s,:"\[\]{}]*')
_NESTING = re.compile(rb'"[^"]*"|["\[\]{}]')
_PATIENCE = 200  # brackets and strings looked at one by one before whole windows are
_WINDOW = 1 << 14
_DEPTH_OF_BYTE = bytes({91: 1, 123: 1, 93: 255, 125: 255}.get(byte, 0) for byte in range(256))


class Cut(Exception):
    """The text ends inside a value."""


class Broken(Exception):
    """The text does not follow the grammar from here on."""


def skip_space(plain: bytes, position: int, stop: int) -> int:
    """The first byte from `position` on that is not white space."""
    if position < stop and plain[position] > 32:
        return position
    return _end(_SPACE, plain, position, stop)


def next_byte(plain: bytes, position: int, stop: int) -> int:
    """Like `skip_space`, where something must follow."""
    if position < stop:
        if plain[position] > 32:
            return position
        if plain[position] == 32 and position + 1 < stop and plain[position + 1] > 32:
            return position + 1
    position = _end(_SPACE, plain, position, stop)
    if position >= stop:
        raise Cut
    return position


def string_end(plain: bytes, position: int, stop: int) -> int:
    """The closing quote of the string whose content begins at `position`, or -1."""
    return plain.find(b'"', position, stop)


def scalar_end(plain: bytes, position: int, stop: int) -> int:
    """The end of a number, true, false, null or anything else without structure."""
    end = _end(_SCALAR, plain, position, stop)
    if end == position:
        raise Broken
    return end


def nested_end(plain: bytes, position: int, stop: int) -> int:
    """The end of the object or list that opens at `position`, or -1. Braces and brackets count alike."""
    depth = 0
    for count, match in enumerate(_NESTING.finditer(plain, position, stop)):
        byte = plain[match.start()]
        if byte == 34:
            if match.end() == match.start() + 1:
                return -1
        elif byte in b"[{":
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                return match.end()
        if count == _PATIENCE:
            return _nested_end_in_windows(plain, match.end(), stop, depth)
    return -1


def _nested_end_in_windows(plain: bytes, position: int, stop: int, depth: int) -> int:
    """`nested_end` from the middle on, for `depth` open brackets and no open string."""
    size, in_string = _WINDOW, False
    while position < stop:
        window = plain[position : min(position + size, stop)]
        inside = np.logical_xor.accumulate(np.frombuffer(window, np.uint8) == 34) ^ in_string
        steps = np.frombuffer(window.translate(_DEPTH_OF_BYTE), np.int8) * ~inside
        depths = np.cumsum(steps, dtype=np.int32)
        depths += depth
        closed = int(np.argmin(depths > 0))
        if depths[closed] <= 0:
            return position + closed + 1
        depth, in_string = int(depths[-1]), bool(inside[-1])
        position += len(window)
        size = min(size * 4, 1 << 20)
    return -1


def next_member(plain: bytes, position: int, stop: int, first: bool) -> tuple[int, int, int] | None:
    """The key and the start of the value of the next member of an object: where the key's content begins and ends,
    and the value's first byte. None at the closing brace. `position` is after the opening brace or a value."""
    position = next_byte(plain, position, stop)
    if plain[position] == 125:
        return None
    if not first:
        if plain[position] != 44:
            raise Broken
        position = next_byte(plain, position + 1, stop)
    if plain[position] != 34:
        raise Broken
    key = position + 1
    end = plain.find(b'"', key, stop)
    if end < 0:
        raise Cut
    position = next_byte(plain, end + 1, stop)
    if plain[position] != 58:
        raise Broken
    return key, end, next_byte(plain, position + 1, stop)


def _end(pattern: re.Pattern[bytes], plain: bytes, position: int, stop: int) -> int:
    match = pattern.match(plain, position, stop)
    return match.end() if match is not None else position
