"""Which bytes of an assistant turn are thinking, which are a tool call, and which part of it.

Works on bytes, so multibyte text and tags split across tokens cannot shift anything, and in linear time: every search
moves forward. What a token stands for is the caller's business; special and added tokens count with their text.
One meaning for the odd cases, in every style:

- The function sees one turn, so no block crosses into another. Blocks do not nest: inside one, an opening is content.
- With an end token, a block runs to the first end token after its start. A start token without one is plain text in a
  whole turn; where the turn was cut by a length limit, the block was cut too, and everything to the end is a call.
- An end token alone is plain text.
- Without an end token (after `<|python_tag|>` or `[TOOL_CALLS]`), a block ends with its last call. Where the text
  does not follow the grammar, or ends first, the block runs to the end of the turn.
- Without any token (JSON or a Python list that begins the turn, thinking aside), text is a call only if all of it up
  to the closing bracket follows the grammar; for JSON, every call must have a name and arguments. In a truncated turn
  the closing bracket may be missing.
- Where the grammar of a call is broken, the rest of the block is syntax of the call it happened in. A value that is
  cut runs to where its closing marker begins, or to the end of the turn.
- `<think>` to the first `</think>` is thinking, tags included, and nothing in it is a call; an unclosed one is
  plain text in a whole turn and runs to the end of a truncated one. Whichever opens first, a block or thinking,
  contains the other. `thinking=True` says that the prompt ended inside of `<think>`.
- XML: inside a block, `<function=NAME>` and `<parameter=NAME>VALUE</parameter>` are told apart; one line break after
  the opening and one before the closing parameter tag belong to the syntax. A value without a closing tag runs
  to the last `</function>` of its block, or to the block's end. Everything else in a block is syntax.
- Every object of a list, every function of a `<tool_call>` is a call of its own. A call begins with its first
  byte (the first one of a block, with the block); what stands between two belongs to the first.

`style="auto"` takes the style whose opening comes first, thinking aside; `styles.STYLES` has the order for one byte.
An opening that turns out to be no call sets its style aside; from the first call on the turn keeps its style. There, a
fence must name its shell, as one without a name is as likely to hold an example.

A style of your own is a function at a dotted path, `(text: bytes, truncated: bool) -> sequence of (start, stop,
TokenClass, call)`: the spans that are not plain reasoning, with calls numbered from 0 in each turn and -1 for none.
"""

from torchtune_agent.data.tagging.alike import Alike
from torchtune_agent.data.tagging.styles import STYLES, UserStyle, call_styles
from torchtune_agent.data.tagging.turn import THINK, THINK_END, Tags, Turn, tags_per_token
from torchtune_agent.data.tagging.xml import CallMarkers, CallStyle
from torchtune_agent.errors import UserError

__all__ = ["STYLES", "CallMarkers", "Tags", "call_styles", "tag_turn", "tags_per_token"]


def tag_turn(
    text: bytes,
    *,
    truncated: bool = False,
    style: str = "xml",
    markers: CallMarkers | None = None,
    first_call: int = 0,
    thinking: bool = False,
) -> tuple[Tags, int]:
    """Tag one assistant turn; returns its tags and the index the next call in the conversation would have.

    Args:
        text: the turn's own bytes, without headers and end-of-turn token.
        truncated: the turn was cut at its end.
        style: a name of `STYLES`, "custom" (with `markers`), or the dotted path of a function.
        markers: the start and end token of the styles "xml" (XML between other tokens) and "custom" (JSON, XML
            or one whole value between them).
        first_call: the index of this turn's first call.
        thinking: the prompt opened `<think>`, so the text begins inside of it.
    """
    styles = call_styles(style, markers)
    turn = Turn(text, truncated, first_call)
    if not isinstance(styles, tuple):
        return _tag_by_user(turn, styles, style)
    position = 0
    if thinking:
        stop = text.find(THINK_END)
        position = stop + len(THINK_END) if stop >= 0 else len(text)
        turn.think(0, position)
        turn.head = position
    _tag_blocks(turn, position, styles)
    return turn.tags(), turn.next_call


def _tag_blocks(turn: Turn, position: int, styles: tuple[CallStyle, ...]) -> None:
    """Tag blocks and thinking from `position` on, each where it opens first."""
    size = len(turn.text)
    alike_to = 0 if styles[0].in_words else size  # markers of the user's come alone
    alike = Alike(turn, alike_to)
    openings = [-1] * len(styles)  # where each style's next block may begin, or the end of the text
    thought: tuple[int, int] | None = (-1, -1)
    while True:
        for number, style in enumerate(styles):
            if style.at_head or openings[number] < position:
                found = style.find(turn, position) if not style.at_head or position == turn.head else -1
                openings[number] = found if found >= 0 else size
        if thought is not None and thought[0] < position:
            thought = _thought(turn, position)
        start = min(openings, default=size)
        if thought is not None and thought[0] < start:
            turn.think(*thought)
            if turn.head >= 0 and turn.text[turn.head : thought[0]].strip():
                turn.head, alike = -1, Alike(turn, alike_to)  # what follows is not read as what came before
            position = alike.skip(thought[1])
            if turn.head >= 0:
                turn.head = position
        elif start < size:
            number = openings.index(start)
            end = styles[number].tag(turn, start)
            if end >= 0:
                if len(styles) > 1:
                    styles, openings = (styles[number],), [start]
                if turn.head >= 0:
                    turn.head, alike = -1, Alike(turn, alike_to)
                position = alike.skip(end)
            else:
                styles, openings = styles[:number] + styles[number + 1 :], openings[:number] + openings[number + 1 :]
        else:
            return


def _thought(turn: Turn, position: int) -> tuple[int, int] | None:
    """Where the next thinking begins and ends."""
    start = turn.text.find(THINK, position)
    if start < 0:
        return None
    stop = turn.text.find(THINK_END, start + len(THINK))
    if stop >= 0:
        return start, stop + len(THINK_END)
    return (start, len(turn.text)) if turn.truncated else None


def _tag_by_user(turn: Turn, tag: UserStyle, style: str) -> tuple[Tags, int]:
    tags, num_calls = turn.tags(), 0
    for start, stop, kind, call in tag(turn.text, turn.truncated):
        if not 0 <= start <= stop <= len(turn.text) or call < -1:
            span = (start, stop, kind, call)
            raise UserError(f"style='{style}': it returned {span} for {len(turn.text)} bytes of text.")
        tags.classes[start:stop] = kind
        tags.calls[start:stop] = turn.next_call + call if call >= 0 else -1
        num_calls = max(num_calls, call + 1)
    return tags, turn.next_call + num_calls
