"""Calls as `<function=NAME><parameter=NAME>VALUE</parameter></function>`, bare or between other markers."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from torchtune_agent.data.tagging.alike import Alike
from torchtune_agent.data.tagging.turn import ARG_NAME, ARG_VALUE, CALL_NAME, Turn
from torchtune_agent.data.token_class import TokenClass
from torchtune_agent.errors import UserError

FUNCTION = b"<function="
FUNCTION_END = b"</function>"
_PARAMETER = b"<parameter="
_PARAMETER_END = b"</parameter>"
_WORD_AT_AN_END = re.compile(rb"\A[A-Za-z0-9_]|[A-Za-z0-9_]\Z")


@dataclass(frozen=True)
class CallMarkers:
    """The text that opens and closes a tool-call block."""

    start: str = "<function="
    end: str = "</function>"

    def __post_init__(self) -> None:
        if not self.start or not self.end or self.start == self.end:
            raise UserError(
                f"tool_call_start_token='{self.start}', tool_call_end_token='{self.end}': "
                "give two different texts that open and close a call, for example '<function=' and '</function>'."
            )


@dataclass(frozen=True)
class CallStyle:
    """How calls are written. `find(turn, position)` is where the next one may open, or -1; `tag(turn, start)` tags it
    and returns its end, or -1 where neither it nor anything after it is a call. With `at_head`, calls open only where
    nothing but white space and thinking stands before them. With `in_words`, a word may be part of a marker."""

    find: Callable[[Turn, int], int]
    tag: Callable[[Turn, int], int]
    at_head: bool = False
    in_words: bool = False


def between_markers(markers: CallMarkers, tag_inside: Callable[[Turn, int, int], None] | None = None) -> CallStyle:
    """Blocks from a start token to the first end token after it. `tag_inside(turn, start, stop)` tags what stands
    between the two; without it, the block (its opening included) is read as XML."""
    opening, closing = markers.start.encode(), markers.end.encode()

    def find(turn: Turn, position: int) -> int:
        while (start := turn.text.find(opening, position)) >= 0:
            position = start + len(opening)
            if opening != FUNCTION or turn.text[position : position + 1] != b">":  # a function needs a name
                return start
        return -1

    def tag(turn: Turn, start: int) -> int:
        stop = turn.text.find(closing, start + len(opening))
        if stop < 0 and not turn.truncated:
            return -1
        end = stop + len(closing) if stop >= 0 else len(turn.text)
        stop = stop if stop >= 0 else end
        turn.begin_block(start)
        if tag_inside is None:
            tag_xml(turn, start, stop)
        else:
            tag_inside(turn, start + len(opening), stop)
        return turn.end_block(end)

    in_words = any(_WORD_AT_AN_END.search(marker) for marker in (opening, closing))
    return CallStyle(find, tag, in_words=in_words)


def tag_xml(turn: Turn, start: int, stop: int) -> None:
    """Mark the function name, and every parameter's name and value, of the block text[start:stop]."""
    text, position, alike = turn.text, start, Alike(turn, stop)
    opening = text.find(FUNCTION, start, stop)
    if opening >= 0:
        position = _tag_name(turn, opening + len(FUNCTION), stop, CALL_NAME)
    while (opening := text.find(_PARAMETER, position, stop)) >= 0:
        value = _tag_name(turn, opening + len(_PARAMETER), stop, ARG_NAME)
        closing = text.find(_PARAMETER_END, value, stop)
        if closing < 0:  # the value runs to the end of its function, or else of its block
            if text[value : value + 1] == b"\n" and value < stop:
                value += 1
            closing = text.rfind(FUNCTION_END, value, stop)
            turn.mark(value, closing if closing >= 0 else stop, ARG_VALUE)
            return
        position = closing
        if text[value : value + 1] == b"\n":
            value += 1
        if closing > value and text[closing - 1 : closing] == b"\n":
            closing -= 1
        turn.mark(value, max(value, closing), ARG_VALUE)
        position = alike.skip(position)


def tag_functions(turn: Turn, start: int, stop: int) -> None:
    """Like `tag_xml` for a block that may hold several functions: each is a call of its own."""
    text, alike = turn.text, Alike(turn, stop)
    opening = text.find(FUNCTION, start, stop)
    while opening >= 0:
        closing = text.find(FUNCTION_END, opening, stop)
        following = text.find(FUNCTION, closing, stop) if closing >= 0 else -1
        tag_xml(turn, opening, closing if following >= 0 else stop)
        if following >= 0:
            turn.begin_call(following)
            following = alike.skip(following)
        opening = following


def _tag_name(turn: Turn, start: int, stop: int, kind: TokenClass) -> int:
    """Mark the name in `<tag=NAME>`; returns where the text after it begins."""
    end = turn.text.find(b">", start, stop)
    end = end if end >= 0 else stop
    turn.mark(start, end, kind)
    return min(end + 1, stop)
