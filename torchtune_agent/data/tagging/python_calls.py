"""Calls written as Python: `f(a=1)`, alone or in a list.

The name and the keywords are names; a value is everything up to the comma or bracket that ends it, trailing white
space not included. Of a value that is nothing but one string, the quotes are syntax. Quotes of all four kinds and
brackets of all kinds nest as in Python; that they match is not checked.
"""

import re

import numpy as np

from torchtune_agent.data.tagging.alike import Alike
from torchtune_agent.data.tagging.json_scan import Broken, Cut, next_byte
from torchtune_agent.data.tagging.turn import ARG_NAME, ARG_VALUE, CALL_NAME, Turn

_NAME = re.compile(rb"[A-Za-z_\x80-\xff][A-Za-z0-9_.\x80-\xff]*")
# A run of empty strings in triple quotes counts as one string, or six quotes would be the dearest text there is.
_STRUCTURE = re.compile(rb"""(?:\"{6})+|(?:'{6})+|\"\"\"|'''|"[^"]*"|'[^']*'|["'\[\](){},]""")
_OPENING = frozenset({b"(", b"[", b"{"})
_ENDING = frozenset({b")", b"]", b"}", b","})
_TRIPLE_QUOTES = frozenset({b'"""', b"'''"})
_PATIENCE = 200  # brackets and strings looked at one by one before whole windows are
_WINDOW = 1 << 18
_DEPTH_OF_BYTE = bytes({40: 1, 91: 1, 123: 1, 41: 255, 93: 255, 125: 255, 44: 2}.get(byte, 0) for byte in range(256))
_OPEN_PAREN, _CLOSE_PAREN, _OPEN_BRACKET, _CLOSE_BRACKET, _COMMA, _EQUALS = b"()[],="


def tag_python_calls(turn: Turn, position: int, stop: int) -> int:
    """Tag the list of calls that opens at `position`; returns its end. The block's first call is already open."""
    plain, first, alike = turn.plain, True, Alike(turn, stop)
    if plain[position] != _OPEN_BRACKET:
        raise Broken
    position = next_byte(plain, position + 1, stop)
    while first or plain[position] != _CLOSE_BRACKET:  # an empty list is no call
        if not first:
            turn.begin_call(position)
        position = next_byte(plain, tag_python_call(turn, position, stop), stop)
        first = False
        if plain[position] == _COMMA:
            position = alike.skip(next_byte(plain, position + 1, stop))
        elif plain[position] != _CLOSE_BRACKET:
            raise Broken
    return position + 1


def tag_python_call(turn: Turn, position: int, stop: int, suffix: bytes = b"") -> int:
    """Tag `name(...)` at `position`; returns its end. The name must end with `suffix`, which is syntax."""
    plain = turn.plain
    name = _NAME.match(plain, position, stop)
    if name is None or not name.group().endswith(suffix):
        raise Broken
    turn.mark(position, name.end() - len(suffix), CALL_NAME)
    position = next_byte(plain, name.end(), stop)
    if plain[position] != _OPEN_PAREN:
        raise Broken
    position, alike = next_byte(plain, position + 1, stop), Alike(turn, stop)
    while plain[position] != _CLOSE_PAREN:
        position = next_byte(plain, _tag_argument(turn, position, stop), stop)
        if plain[position] == _COMMA:
            position = alike.skip(next_byte(plain, position + 1, stop))
        elif plain[position] != _CLOSE_PAREN:
            raise Broken
    return position + 1


def _tag_argument(turn: Turn, position: int, stop: int) -> int:
    plain = turn.plain
    keyword = _NAME.match(plain, position, stop)
    if keyword is not None:
        try:
            equals = next_byte(plain, keyword.end(), stop)
        except Cut:
            turn.mark(position, keyword.end(), ARG_NAME)
            raise
        if plain[equals] == _EQUALS and plain[equals + 1 : equals + 2] != b"=":
            turn.mark(position, keyword.end(), ARG_NAME)
            position = next_byte(plain, equals + 1, stop)
    if plain[position] in b"\"'":
        size, end = _string(plain, position, stop)
        if end < 0:
            turn.mark(min(position + size, stop), stop, ARG_VALUE)
            raise Cut
        following = end + size
        while following < stop and plain[following] <= 32:
            following += 1
        if following >= stop or plain[following] in b",)":
            turn.mark(position + size, end, ARG_VALUE)
            return following
    return _tag_expression(turn, position, stop)


def _tag_expression(turn: Turn, start: int, stop: int) -> int:
    """Mark text[start:...] up to the comma or bracket that ends it, which is returned."""
    end = _expression_end(turn.plain, start, stop)
    if end == start:
        raise Broken
    if end < 0:
        turn.mark(start, stop, ARG_VALUE)
        raise Cut
    turn.mark(start, start + len(turn.text[start:end].rstrip()), ARG_VALUE)
    return end


def _expression_end(plain: bytes, position: int, stop: int) -> int:
    """The comma or closing bracket outside of the brackets and strings that open from `position` on, or -1."""
    depth, patience = 0, _PATIENCE
    while position < stop:
        for match in _STRUCTURE.finditer(plain, position, stop):
            token = match.group()
            if token in _OPENING:
                depth += 1
            elif token in _ENDING:
                if depth == 0:
                    return match.start()
                depth -= token != b","
            elif len(token) == 1:
                return -1  # a quote without its like
            elif token in _TRIPLE_QUOTES:
                position = plain.find(token, match.end(), stop) + 3
                if position == 2:
                    return -1
                break  # go on after the string
            patience -= 1
            if patience == 0:
                end, position, depth = _expression_end_in_windows(plain, match.end(), stop, depth)
                if end >= 0:
                    return end
                patience = _PATIENCE
                break
        else:
            return -1
    return -1


def _expression_end_in_windows(plain: bytes, position: int, stop: int, depth: int) -> tuple[int, int, int]:
    """`_expression_end` up to the next quote; returns that end or -1, how far it came, and the depth there."""
    limit = min((found for q in b"\"'" if (found := plain.find(q, position, position + _WINDOW)) >= 0), default=stop)
    limit = min(limit, position + _WINDOW, stop)
    if limit - position < _PATIENCE:
        return -1, position, depth
    window = np.frombuffer(plain[position:limit].translate(_DEPTH_OF_BYTE), np.int8)
    depths = np.cumsum(window == 1, dtype=np.int32)
    depths -= np.cumsum(window == -1, dtype=np.int32)
    depths += depth
    ends = (depths < 0) | ((window == 2) & (depths == 0))
    first = int(np.argmax(ends))
    return (position + first if ends[first] else -1), limit, int(depths[-1])


def _string(plain: bytes, position: int, stop: int) -> tuple[int, int]:
    """The length of the quotes of the string that opens at `position`, and where the closing ones stand, or -1."""
    quote = plain[position : position + 1]
    if plain.startswith(quote * 3, position, stop):
        return 3, plain.find(quote * 3, position + 3, stop)
    return 1, plain.find(quote, position + 1, stop)
