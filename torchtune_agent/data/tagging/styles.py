"""The call styles by name, and the styles that read JSON or Python between or after markers."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TypeAlias

from torchtune_agent.config import component
from torchtune_agent.data.tagging.json_calls import tag_arguments, tag_json_calls
from torchtune_agent.data.tagging.json_scan import Broken, Cut, skip_space
from torchtune_agent.data.tagging.python_calls import tag_python_call, tag_python_calls
from torchtune_agent.data.tagging.text_calls import FENCED, NAMED_FENCED, REACT
from torchtune_agent.data.tagging.turn import ARG_VALUE, CALL_NAME, Turn
from torchtune_agent.data.tagging.xml import FUNCTION, CallMarkers, CallStyle, between_markers, tag_functions
from torchtune_agent.data.token_class import TokenClass
from torchtune_agent.errors import UserError

Span: TypeAlias = tuple[int, int, TokenClass, int]  # first byte, end, class, number of the call in this turn or -1
UserStyle: TypeAlias = Callable[[bytes, bool], Sequence[Span]]

_PYTHON_TAG = b"<|python_tag|>"
_TOOL_CALLS = b"[TOOL_CALLS]"
_ARGS = b"[ARGS]"
_CALL_ID = b"[CALL_ID]"


def _tag_content(turn: Turn, start: int, stop: int, *, otherwise: TokenClass) -> None:
    """Tag what stands between two markers, by how it begins: XML functions, JSON calls, or else one whole."""
    first = skip_space(turn.plain, start, stop)
    if turn.text.startswith(FUNCTION, first, stop):
        return tag_functions(turn, first, stop)
    if first < stop and turn.text[first] in b"[{":
        try:
            tag_json_calls(turn, first, stop)
        except (Cut, Broken):
            pass  # what was marked stands, the rest of the block is syntax
        return
    turn.mark(first, max(first, start + len(turn.text[start:stop].rstrip())), otherwise)


def _tag_bare(turn: Turn, start: int, tag_calls: Callable[[Turn, int, int], int]) -> int:
    """Tag calls that no marker announces: they are calls only if all of their text follows the grammar."""
    state, stop = turn.state(), len(turn.text)
    turn.begin_block(start)
    try:
        return turn.end_block(tag_calls(turn, start, stop))
    except Cut:
        if turn.truncated:
            return turn.end_block(stop)
    except Broken:
        pass
    turn.restore(state)
    return -1


def _tag_after_python_tag(turn: Turn, start: int) -> int:
    text, stop = turn.text, len(turn.text)
    turn.begin_block(start)
    first = skip_space(turn.plain, start + len(_PYTHON_TAG), stop)
    state = turn.state()
    try:
        if first < stop and text[first] in b"[{":
            return turn.end_block(tag_json_calls(turn, first, stop))
        return turn.end_block(tag_python_call(turn, first, stop, suffix=b".call"))
    except Cut:
        return turn.end_block(stop)
    except Broken:
        turn.restore(state)  # code: one value
    turn.mark(first, max(first, len(text.rstrip())), ARG_VALUE)
    return turn.end_block(stop)


def _tag_mistral(turn: Turn, start: int) -> int:
    text, stop = turn.text, len(turn.text)
    turn.begin_block(start)
    first = skip_space(turn.plain, start + len(_TOOL_CALLS), stop)
    try:
        if first < stop and text[first] in b"[{" and not text.startswith((_ARGS, _CALL_ID), first):
            return turn.end_block(tag_json_calls(turn, first, stop))
        return turn.end_block(_tag_named_arguments(turn, first))
    except (Cut, Broken):
        return turn.end_block(stop)


def _tag_named_arguments(turn: Turn, start: int) -> int:
    """Tag `NAME{...}`, `NAME[ARGS]{...}` or `NAME[CALL_ID]id[ARGS]{...}`."""
    text, stop = turn.text, len(turn.text)
    brace = text.find(b"{", start)
    brace = brace if brace >= 0 else stop
    name_end = text.find(b"[", start, brace)
    name_end = name_end if name_end >= 0 else brace
    turn.mark(start, max(start, start + len(text[start:name_end].rstrip())), CALL_NAME)
    if brace == stop:
        raise Cut
    return tag_arguments(turn, brace, stop)


def _literal(marker: bytes, tag: Callable[[Turn, int], int]) -> CallStyle:
    return CallStyle(lambda turn, position: turn.text.find(marker, position), tag)


def _at_head(first_bytes: bytes, tag: Callable[[Turn, int], int]) -> CallStyle:
    def find(turn: Turn, position: int) -> int:
        first = skip_space(turn.text, position, len(turn.text))
        return first if turn.text[first : first + 1] in first_bytes and first < len(turn.text) else -1

    return CallStyle(find, tag, at_head=True)


_XML = between_markers(CallMarkers())
_TOOL_CALL = between_markers(
    CallMarkers("<tool_call>", "</tool_call>"), partial(_tag_content, otherwise=TokenClass.CALL_SYNTAX)
)
_PYTHON_TAGGED = _literal(_PYTHON_TAG, _tag_after_python_tag)
_BARE_JSON = _at_head(b"{[", partial(_tag_bare, tag_calls=partial(tag_json_calls, strict=True)))
_MISTRAL = _literal(_TOOL_CALLS, _tag_mistral)
_PYTHONIC = _at_head(b"[", partial(_tag_bare, tag_calls=tag_python_calls))

# Each name stands for styles that are asked together; the earliest opening wins, at one byte the first of the row.
STYLES: dict[str, tuple[CallStyle, ...]] = {
    "xml": (_XML,),
    "tool_call": (_TOOL_CALL,),
    "hermes": (_TOOL_CALL,),
    "llama3": (_PYTHON_TAGGED, _BARE_JSON),
    "mistral": (_MISTRAL,),
    "pythonic": (_PYTHONIC,),
    "react": (REACT,),
    "fenced": (FENCED,),
    "auto": (_TOOL_CALL, _XML, _PYTHON_TAGGED, _MISTRAL, _BARE_JSON, _PYTHONIC, REACT, NAMED_FENCED),
}


@lru_cache
def call_styles(style: str, markers: CallMarkers | None) -> tuple[CallStyle, ...] | UserStyle:
    """The styles a name stands for, or the user's own function at a dotted path."""
    if style == "custom":
        if markers is None:
            raise UserError("style='custom': give the texts that open and close a call as markers.")
        return (between_markers(markers, partial(_tag_content, otherwise=ARG_VALUE)),)
    if style == "xml" and markers is not None:
        return (between_markers(markers),)
    if markers is not None:
        raise UserError(f"style='{style}': markers go with the styles 'xml' and 'custom' only.")
    if style in STYLES:
        return STYLES[style]
    if "." not in style:
        raise UserError(
            f"style='{style}': choose one of {', '.join(STYLES)}, custom, or give the dotted path of a function."
        )
    return component(style, "dataset.call_style")
