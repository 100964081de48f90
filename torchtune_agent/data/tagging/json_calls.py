"""Calls written as JSON objects: where their names, argument names and argument values stand.

The same in every style. The string value of "name" (or "function", "tool", "tool_name", "action") is the call's name;
an object in its place ({"function": {"name": ...}}) is read as the call itself. The members of "arguments" (or
"parameters", "args", "action_input") are the arguments. Quotes, braces, colons, commas, white space and all other
members are syntax. The content of a string is a value without its quotes, escapes as they are spelled; an object or a
list is a value as a whole, brackets included. Arguments that are no object (a JSON text in a string) are one value.
"""

from torchtune_agent.data.tagging.alike import Alike
from torchtune_agent.data.tagging.json_scan import (
    Broken,
    Cut,
    nested_end,
    next_byte,
    next_member,
    scalar_end,
    skip_space,
)
from torchtune_agent.data.tagging.turn import ARG_NAME, ARG_VALUE, CALL_NAME, Turn
from torchtune_agent.data.token_class import TokenClass

_NAME_KEYS = frozenset({b"name", b"function", b"tool", b"tool_name", b"action"})
_ARGUMENTS_KEYS = frozenset({b"arguments", b"parameters", b"args", b"action_input"})
_QUOTE, _OPEN_BRACE, _OPEN_BRACKET, _CLOSE_BRACKET, _COMMA = b'"{[],'


def tag_json_calls(turn: Turn, position: int, stop: int, *, strict: bool = False) -> int:
    """Tag a list of calls, or calls one after the other (with or without `,` or `;` between them), from `position`.

    The block's first call is already open; every further one is opened here. Returns the end of the last one. Raises
    `Cut` where the text ends first, `Broken` at the first thing that is no call; with `strict`, an object
    without both a name and arguments is none, otherwise one without a name.
    """
    plain = turn.plain
    position = next_byte(plain, position, stop)
    if plain[position] == _OPEN_BRACKET:
        return _tag_list(turn, position + 1, stop, strict)
    position, alike = tag_call(turn, position, stop, strict), Alike(turn, stop)
    while True:
        following = skip_space(plain, position, stop)
        if following < stop and plain[following] in b",;":
            following = skip_space(plain, following + 1, stop)
        if following >= stop or plain[following] != _OPEN_BRACE:
            return position
        turn.begin_call(following)
        position = alike.skip(tag_call(turn, following, stop, strict))


def _tag_list(turn: Turn, position: int, stop: int, strict: bool) -> int:
    plain, first, alike = turn.plain, True, Alike(turn, stop)
    while True:
        position = next_byte(plain, position, stop)
        if plain[position] == _CLOSE_BRACKET:
            if first and strict:
                raise Broken
            return position + 1
        if not first:
            if plain[position] != _COMMA:
                raise Broken
            position = next_byte(plain, position + 1, stop)
            turn.begin_call(position)
        position, first = alike.skip(tag_call(turn, position, stop, strict)), False


def tag_call(turn: Turn, position: int, stop: int, strict: bool = False) -> int:
    """Tag the call that opens at `position`; returns its end."""
    if turn.plain[position] != _OPEN_BRACE:
        raise Broken
    position, has_name, has_arguments = _tag_members(turn, position + 1, stop, outermost=True)
    if not has_name or (strict and not has_arguments):
        raise Broken
    return position


def _tag_members(turn: Turn, position: int, stop: int, outermost: bool) -> tuple[int, bool, bool]:
    plain, alike, first, has_name, has_arguments = turn.plain, Alike(turn, stop), True, False, False
    while (member := next_member(plain, position, stop, first)) is not None:
        start, end, value = member
        key, first = turn.text[start:end], False
        if key in _NAME_KEYS and plain[value] == _QUOTE:
            position, has_name = tag_value(turn, value, stop, CALL_NAME), True
        elif key in _NAME_KEYS and plain[value] == _OPEN_BRACE and outermost:
            position, named, given = _tag_members(turn, value + 1, stop, outermost=False)
            has_name, has_arguments = has_name or named, has_arguments or given
        elif key in _ARGUMENTS_KEYS:
            has_arguments = True
            if plain[value] == _OPEN_BRACE:
                position = tag_arguments(turn, value, stop)
            else:
                position = tag_value(turn, value, stop, ARG_VALUE)
        else:
            position = tag_value(turn, value, stop, TokenClass.CALL_SYNTAX)
        position = alike.skip(position)
    return next_byte(plain, position, stop) + 1, has_name, has_arguments


def tag_arguments(turn: Turn, position: int, stop: int) -> int:
    """Tag the object of arguments that opens at `position`; returns its end."""
    plain, position, first, alike = turn.plain, position + 1, True, Alike(turn, stop)
    while (member := next_member(plain, position, stop, first)) is not None:
        start, end, value = member
        turn.mark(start, end, ARG_NAME)
        position, first = alike.skip(tag_value(turn, value, stop, ARG_VALUE)), False
    return next_byte(plain, position, stop) + 1


def tag_value(turn: Turn, position: int, stop: int, kind: TokenClass) -> int:
    """Mark the value at `position` as `kind`; returns its end. A cut one is marked to the end of the text."""
    plain = turn.plain
    byte = plain[position]
    if byte == _QUOTE:
        start = position + 1
        end = plain.find(b'"', start, stop)
        after = end + 1
    elif byte == _OPEN_BRACE or byte == _OPEN_BRACKET:
        start = position
        after = end = nested_end(plain, position, stop)
    else:
        start = position
        after = end = scalar_end(plain, position, stop)
    turn.mark(start, end if end >= 0 else stop, kind)
    if end < 0:
        raise Cut
    return after
