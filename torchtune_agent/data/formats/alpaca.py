"""Alpaca form: `instruction`, `input` and `output`, with `system` and earlier turns in `history`."""

from collections.abc import Mapping
from typing import Any

from torchtune_agent.data.conversation import Conversation, Message, Role
from torchtune_agent.data.formats.fields import (
    items,
    optional_text,
    read_metadata,
    read_tools,
    text,
    with_system,
    wrong_type,
)

_USED = ("instruction", "input", "output", "system", "history", "tools", "functions", "metadata")


def alpaca(record: Mapping[str, Any]) -> Conversation:
    """The user's turn is the instruction, and the input on the lines after it."""
    messages: list[Message] = []
    for i, turn in enumerate(items(record.get("history") or [], "history")):
        where = f"history[{i}]"
        pair = items(turn, where)
        if len(pair) != 2:
            raise wrong_type(where, "a pair of texts", turn)
        messages.append(Message(Role.USER, text(pair[0], where)))
        messages.append(Message(Role.ASSISTANT, text(pair[1], where)))
    asked = [optional_text(record.get(name), name) for name in ("instruction", "input")]
    messages.append(Message(Role.USER, "\n".join(part for part in asked if part)))
    messages.append(Message(Role.ASSISTANT, text(record.get("output"), "output")))
    return Conversation(with_system(record, messages), read_tools(record), read_metadata(record, _USED))
