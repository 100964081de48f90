"""Which bytes of an assistant turn are a tool call, and which part of it.

Works on bytes, so multibyte text and tags split across tokens cannot shift anything, and in linear time:
every search moves forward. One meaning for the odd cases:

- A block runs from the start token to the first end token after it; blocks do not nest.
- A start token without a name (`<function=>`) is plain text.
- A start token without an end token is plain text in a whole turn. Where the turn was cut by a length
  limit, the block was cut too, and everything to the end is a tool call.
- Inside a block, `<function=NAME>` and `<parameter=NAME>VALUE</parameter>` are told apart; one line break
  after the opening and one before the closing parameter tag belong to the syntax. A value whose closing
  tag is missing runs to the end of its block. Everything else in a block is syntax.
"""

from dataclasses import dataclass

import numpy as np

from torchtune_agent.data.token_class import TokenClass
from torchtune_agent.errors import UserError

_FUNCTION = b"<function="
_FUNCTION_END = b"</function>"
_PARAMETER = b"<parameter="
_PARAMETER_END = b"</parameter>"


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


@dataclass
class Tags:
    """One entry per byte of the text: its class, and the call it is in (-1: none)."""

    classes: np.ndarray  # uint8 [bytes]
    calls: np.ndarray  # int32 [bytes]


def tag_turn(
    text: bytes, *, truncated: bool = False, markers: CallMarkers | None = None, first_call: int = 0
) -> tuple[Tags, int]:
    """Tag one assistant turn; returns its tags and the index the next call in the conversation would have."""
    markers = markers or CallMarkers()
    tags = Tags(np.full(len(text), TokenClass.REASONING, np.uint8), np.full(len(text), -1, np.int32))
    call, position = first_call, 0
    while (block := _next_block(text, position, markers, truncated)) is not None:
        start, end = block
        tags.classes[start:end] = TokenClass.CALL_SYNTAX
        tags.calls[start:end] = call
        _tag_names_and_values(text, start, end, markers, tags.classes)
        call, position = call + 1, end
    return tags, call


def _next_block(text: bytes, position: int, markers: CallMarkers, truncated: bool) -> tuple[int, int] | None:
    opening, closing = markers.start.encode(), markers.end.encode()
    while (start := text.find(opening, position)) >= 0:
        after = start + len(opening)
        if opening == _FUNCTION and text[after : after + 1] == b">":  # a block needs a name
            position = after
            continue
        end = text.find(closing, after)
        if end >= 0:
            return start, end + len(closing)
        return (start, len(text)) if truncated else None
    return None


def _tag_names_and_values(text: bytes, start: int, end: int, markers: CallMarkers, classes: np.ndarray) -> None:
    """Mark the function name, and every parameter's name and value, of the block text[start:end]."""
    for closing_tag in (markers.end.encode(), _FUNCTION_END):
        if text.endswith(closing_tag, start, end):
            end -= len(closing_tag)  # names and values end before the tags that close the block
    position = _tag_name(text, text.find(_FUNCTION, start, end), _FUNCTION, end, TokenClass.CALL_NAME, classes)
    if position < 0:
        position = start
    while (opening := text.find(_PARAMETER, position, end)) >= 0:
        value = _tag_name(text, opening, _PARAMETER, end, TokenClass.ARG_NAME, classes)
        closing = text.find(_PARAMETER_END, value, end)
        stop = closing if closing >= 0 else end
        position = stop
        if text[value : value + 1] == b"\n":
            value += 1
        if closing >= 0 and stop > value and text[stop - 1 : stop] == b"\n":
            stop -= 1
        classes[value:stop] = TokenClass.ARG_VALUE
        if closing < 0:
            return


def _tag_name(text: bytes, opening: int, tag: bytes, end: int, name_class: TokenClass, classes: np.ndarray) -> int:
    """Mark the name in `tag NAME>`; returns where the text after it begins (-1 where there is no such tag)."""
    if opening < 0:
        return -1
    name = opening + len(tag)
    stop = text.find(b">", name, end)
    stop = stop if stop >= 0 else end
    classes[name:stop] = name_class
    return min(stop + 1, end)


def tags_per_token(tags: Tags, starts: np.ndarray) -> Tags:
    """Fold byte tags into token tags, given the byte at which every token starts (strictly increasing)."""
    if len(starts) == 0:
        return Tags(np.zeros(0, np.uint8), np.zeros(0, np.int32))
    return Tags(np.maximum.reduceat(tags.classes, starts), np.maximum.reduceat(tags.calls, starts))
