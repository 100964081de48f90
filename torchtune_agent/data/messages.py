"""A conversation as messages for torchtune's own tokenizers, which know text and four roles.

What their templates have no place for is written out: calls as `<function=...>` blocks, reasoning in <think> tags,
tools in the system message, and a tool's answer as a user turn in <tool_response> tags, one turn for all answers in a
row, as the Qwen chat templates write it. Llama 3 has a role for the latter.
"""

from collections.abc import Collection
from typing import Any

from torchtune.data import Message
from torchtune.models.llama3 import Llama3Tokenizer

from torchtune_agent.data import json_text
from torchtune_agent.data.conversation import Conversation, Role, ToolCall
from torchtune_agent.data.conversation import Message as ConversationMessage
from torchtune_agent.data.reasons import BadRecord

_TOOLS = "You can call these tools:\n{}\nTo call one, write:\n{}"
_HOW = "<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>"


def to_torchtune(
    conversation: Conversation, tokenizer: Any, trained: Collection[int]
) -> tuple[list[Message], list[float]]:
    """torchtune messages, unmasked where the message's index is in `trained`, and each message's weight."""
    messages: list[Message] = []
    weights: list[float] = []

    def add(role: Any, text: str, weight: float = 1.0, masked: bool = True) -> None:
        messages.append(Message(role=role, content=text, masked=masked))
        weights.append(weight)

    system = _system_text(conversation)
    if system:
        add("system", system)
    has_tool_role = isinstance(tokenizer, Llama3Tokenizer)
    answers: list[str] = []
    for index, message in enumerate(conversation.messages):
        if message.role is Role.TOOL and not has_tool_role:
            answers.append(f"<tool_response>\n{message.content}\n</tool_response>")
            continue
        if answers:
            add("user", "\n".join(answers))
            answers = []
        if message.role is Role.ASSISTANT:
            add("assistant", assistant_text(message), message.weight, masked=index not in trained)
        elif message.role is Role.TOOL:
            add("ipython", message.content)
        elif not (message.role is Role.SYSTEM and index == 0):
            add(message.role.value, message.content)
    if answers:
        add("user", "\n".join(answers))
    return messages, weights


def _system_text(conversation: Conversation) -> str:
    """The first system message, with the tools where there are any."""
    first = conversation.messages[0] if conversation.messages else None
    text = first.content if first is not None and first.role is Role.SYSTEM else ""
    if not conversation.tools:
        return text
    tools = _TOOLS.format("\n".join(json_text.dumps(tool) for tool in conversation.tools), _HOW)
    return f"{text}\n\n{tools}" if text else tools


def assistant_text(message: ConversationMessage) -> str:
    """Reasoning, content and calls as one text."""
    parts = [f"<think>\n{message.reasoning}\n</think>\n"] if message.reasoning else []
    parts += [message.content] if message.content else []
    return "\n".join([*parts, *(call_text(call) for call in message.tool_calls)])


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
