"""Calls written as plain lines: ReAct actions, and commands in a fence.

ReAct: a line `Action: NAME` followed by a line `Action Input: ...`, or a line `Action: NAME[INPUT]`. The input ends
before the next line that begins with Observation:, Thought:, Action: or Final Answer:. An input that is one JSON object
is read as arguments; any other is one value, without the white space around it. A line with neither form is text.

Fences: a line of three backticks and a shell's name or nothing opens, the next line that begins with three backticks
closes. The lines between are one value: the command. Fences of other languages are text, and so is what is in them.
"""

import re
from functools import partial

from torchtune_agent.data.tagging.alike import Alike
from torchtune_agent.data.tagging.json_calls import tag_arguments
from torchtune_agent.data.tagging.json_scan import Broken, Cut
from torchtune_agent.data.tagging.turn import ARG_VALUE, CALL_NAME, Turn
from torchtune_agent.data.tagging.xml import CallStyle

_ACTION = b"Action:"
_INPUT = b"Action Input:"
_NEXT_LABEL = re.compile(rb"\n(?:Observation|Thought|Action|Final Answer):")
_FENCE = b"```"
_SHELLS = frozenset({b"bash", b"sh", b"shell", b"mswea_bash_command"})


def find_line(text: bytes, label: bytes, position: int) -> int:
    """The next line at or after `position` that begins with `label`, or -1."""
    if (position == 0 or text[position - 1] == 10) and text.startswith(label, position):
        return position
    found = text.find(b"\n" + label, position)
    return found + 1 if found >= 0 else -1


def _find_action(turn: Turn, position: int) -> int:
    text, alike = turn.text, Alike(turn, len(turn.text))
    while (start := find_line(text, _ACTION, alike.skip(position))) >= 0:
        position = start + len(_ACTION)
        end = text.find(b"\n", position)
        line = text[position : end if end >= 0 else len(text)].strip()
        if not line:
            if turn.truncated and end < 0:
                return start
            continue
        if line.endswith(b"]") and line.find(b"[") > 0:
            return start
        if end < 0:
            if turn.truncated:
                return start
        elif text.startswith(_INPUT, end + 1) or (turn.truncated and _INPUT.startswith(text[end + 1 : end + 14])):
            return start
    return -1


def _tag_action(turn: Turn, start: int) -> int:
    text = turn.text
    turn.begin_block(start)
    line_end = text.find(b"\n", start)
    line_end = line_end if line_end >= 0 else len(text)
    name, name_end = _stripped(text, start + len(_ACTION), line_end)
    has_input = text.startswith(_INPUT, line_end + 1)
    bracket = text.find(b"[", name, name_end)
    if bracket > name and not has_input:
        closed = text[name_end - 1 : name_end] == b"]"
        turn.mark(name, name + len(text[name:bracket].rstrip()), CALL_NAME)
        turn.mark(bracket + 1, name_end - closed, ARG_VALUE)
        return turn.end_block(name_end if closed else len(text))
    turn.mark(name, name_end, CALL_NAME)
    if not has_input:  # cut before the input
        return turn.end_block(len(text))
    position = line_end + 1 + len(_INPUT)
    label = _NEXT_LABEL.search(text, position)
    value, value_end = _stripped(text, position, label.start() if label else len(text))
    is_cut = turn.truncated and label is None
    _tag_input(turn, value, value_end, is_cut)
    return turn.end_block(len(text) if is_cut else value_end)


def _tag_input(turn: Turn, start: int, stop: int, is_cut: bool) -> None:
    state = turn.state()
    if turn.text.startswith(b"{", start):
        try:
            if tag_arguments(turn, start, stop) == stop:
                return
        except Cut:
            if is_cut:
                return
        except Broken:
            pass
        turn.restore(state)
    turn.mark(start, stop, ARG_VALUE)


def _stripped(text: bytes, start: int, stop: int) -> tuple[int, int]:
    """text[start:stop] without the white space around it."""
    part = text[start:stop]
    first = stop - len(part.lstrip())
    return first, max(first, start + len(part.rstrip()))


def _find_fence(turn: Turn, position: int, shells: frozenset[bytes]) -> int:
    text, alike = turn.text, Alike(turn, len(turn.text))
    while (start := find_line(text, _FENCE, alike.skip(position))) >= 0:
        line_end = text.find(b"\n", start)
        info = text[start + len(_FENCE) : line_end if line_end >= 0 else len(text)].strip()
        if info in shells and (line_end >= 0 or turn.truncated):
            return start
        position = start + len(_FENCE)
        if b"`" not in info and line_end >= 0:  # another language's: skip to its end
            closing = text.find(b"\n" + _FENCE, line_end)
            if closing < 0:
                return -1
            position = closing + 1 + len(_FENCE)
    return -1


def _tag_fence(turn: Turn, start: int) -> int:
    text = turn.text
    line_end = text.find(b"\n", start)
    closing = text.find(b"\n" + _FENCE, line_end) if line_end >= 0 else -1
    if closing < 0 and not turn.truncated:
        return -1
    turn.begin_block(start)
    if line_end < 0:
        return turn.end_block(len(text))
    value_end = closing if closing >= 0 else len(text)
    turn.mark(min(line_end + 1, value_end), value_end, ARG_VALUE)
    return turn.end_block(closing + 1 + len(_FENCE) if closing >= 0 else len(text))


REACT = CallStyle(_find_action, _tag_action)
FENCED = CallStyle(partial(_find_fence, shells=_SHELLS | {b""}), _tag_fence)
NAMED_FENCED = CallStyle(partial(_find_fence, shells=_SHELLS), _tag_fence)
