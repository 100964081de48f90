"""Conversations whose calls stand in the text of the messages: `<function=...>` blocks, and our own ToolWorld records.

The text is kept to the byte; what in it is a call is found later, when tokens get their classes.
"""

from collections.abc import Mapping
from typing import Any

from torchtune_agent.data.conversation import Conversation
from torchtune_agent.data.formats.fields import items, read_metadata, text
from torchtune_agent.data.formats.openai import openai, read_messages
from torchtune_agent.data.reasons import BadRecord


def xml(record: Mapping[str, Any]) -> Conversation:
    conversation = openai(record)
    for i, message in enumerate(conversation.messages):
        if message.tool_calls:
            raise BadRecord("wrong_type", f"messages[{i}]: has tool_calls; format xml has its calls in the text")
    return conversation


def toolworld(record: Mapping[str, Any]) -> Conversation:
    """`tools` only names them: the system message describes them."""
    metadata = read_metadata(record, ("messages", "tools", "metadata"))
    tools = [text(name, f"tools[{i}]") for i, name in enumerate(items(record.get("tools") or [], "tools"))]
    named = {"source": "toolworld", "task": metadata.get("kind"), "tool_names": tools}
    return Conversation(read_messages(record.get("messages")), [], {**named, **metadata})
