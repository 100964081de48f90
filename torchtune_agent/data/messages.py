"""A conversation as messages for torchtune's own tokenizers, which know text and four roles.

What their templates have no place for is written out: calls as `<function=...>` blocks, reasoning in <think> tags,
tools in the system message, and a tool's answer as a user turn in <tool_response> tags, one turn for all answers in a
row, as the Qwen chat templates write it. Llama 3 has a role for the latter. Who wrote which part of a message stays
known as long as it matters to the control tokens it spells.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torchtune.data import Message
from torchtune.models.llama3 import Llama3Tokenizer

from torchtune_agent.data import json_text
from torchtune_agent.data.conversation import Conversation, Role, ToolCall
from torchtune_agent.data.conversation import Message as ConversationMessage
from torchtune_agent.data.reasons import BadRecord
from torchtune_agent.data.spelled import Piece

_TOOLS = "You can call these tools:\n{}\nTo call one, write:\n{}"
_HOW = "<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>"


def to_torchtune(
    conversation: Conversation,
    tokenizer: Any,
    trained: Collection[int],
    joined: Callable[[Sequence[Piece]], str],
) -> tuple[list[Message], list[float]]:
    """torchtune messages, unmasked where the message's index is in `trained`, and each message's weight. `joined` makes
    a message's text of its pieces."""
    messages: list[Message] = []
    weights: list[float] = []

    def add(role: Any, pieces: Sequence[Piece], weight: float = 1.0, masked: bool = True) -> None:
        messages.append(Message(role=role, content=joined(pieces), masked=masked))
        weights.append(weight)

    system = _system_text(conversation)
    if system:
        add("system", system)
    has_tool_role = isinstance(tokenizer, Llama3Tokenizer)
    answers: list[Piece] = []
    for index, message in enumerate(conversation.messages):
        if message.role is Role.TOOL and not has_tool_role:
            start = "\n<tool_response>\n" if answers else "<tool_response>\n"
            answers.extend([(start, "ours"), (message.content, "data"), ("\n</tool_response>", "ours")])
            continue
        if answers:
            add("user", answers)
            answers = []
        if message.role is Role.ASSISTANT:
            add("assistant", _assistant_text(message), message.weight, masked=index not in trained)
        elif message.role is Role.TOOL:
            add("ipython", [(message.content, "data")])
        elif not (message.role is Role.SYSTEM and index == 0):
            add(message.role.value, [(message.content, "data")])
    if answers:
        add("user", answers)
    return messages, weights


def _system_text(conversation: Conversation) -> list[Piece]:
    """The first system message, with the tools where there are any."""
    first = conversation.messages[0] if conversation.messages else None
    text = first.content if first is not None and first.role is Role.SYSTEM else ""
    if conversation.tools:
        tools = _TOOLS.format("\n".join(json_text.dumps(tool) for tool in conversation.tools), _HOW)
        text = f"{text}\n\n{tools}" if text else tools
    return [(text, "data")] if text else []


def _assistant_text(message: ConversationMessage) -> list[Piece]:
    """Reasoning, content and calls as one text."""
    parts: list[list[Piece]] = []
    if message.reasoning:
        parts.append([("<think>\n", "ours"), (message.reasoning, "assistant"), ("\n</think>\n", "ours")])
    if message.content:
        parts.append([(message.content, "assistant")])
    parts.extend([(call_text(call), "data")] for call in message.tool_calls)
    return [piece for i, part in enumerate(parts) for piece in ([("\n", "ours"), *part] if i else part)]


def call_text(call: ToolCall) -> str:
    """A call as a `<function=...>` block; text values as they are, other values as JSON."""
    try:
        arguments = json_text.loads(call.arguments) if call.arguments.strip() else {}
    except ValueError as error:
        raise BadRecord("bad_tool_call", f"arguments of {call.name} are not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise BadRecord("bad_tool_call", f"arguments of {call.name} are not an object")
    lines = [f"<function={call.name}>"]
    for key, value in arguments.items():
        lines += [f"<parameter={key}>", value if isinstance(value, str) else json_text.dumps(value), "</parameter>"]
    return "\n".join([*lines, "</function>"])
