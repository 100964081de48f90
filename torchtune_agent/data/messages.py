"""From a record to the messages a torchtune tokenizer renders.

First version: `messages` in OpenAI form whose assistant text carries its calls as `<function=...>` blocks.
Anything else is refused by name, so that nothing is trained that was not meant.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torchtune.data import Message
from torchtune.models.llama3 import Llama3Tokenizer

from torchtune_agent.data.templates import ChatTemplateTokenizer
from torchtune_agent.errors import UserError

_ROLES = ("system", "user", "assistant", "tool")


def read_messages(record: Mapping[str, Any], *, column: str = "messages") -> list[Mapping[str, str]]:
    """Check a record's messages: a non-empty list of {role, content} with at least one assistant turn."""
    messages = record.get(column)
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f"'{column}' must be a non-empty list of messages, found {type(messages).__name__}")
    for number, message in enumerate(messages):
        _check_message(number, message)
    if all(message["role"] != "assistant" for message in messages):
        raise UserError(f"'{column}' has no assistant message, so there is nothing to train")
    return list(messages)


def _check_message(number: int, message: Any) -> None:
    if not isinstance(message, Mapping):
        raise UserError(f"message {number} is a {type(message).__name__}, not an object with role and content")
    if message.get("role") not in _ROLES:
        raise UserError(f"message {number}: role {message.get('role')!r} is not one of {', '.join(_ROLES)}")
    if message.get("tool_calls") or message.get("function_call"):
        raise UserError(
            f"message {number}: structured tool_calls are not read by this version; "
            "write each call into the content as <function=NAME><parameter=KEY>VALUE</parameter></function>"
        )
    content = message.get("content")
    if not isinstance(content, str):
        raise UserError(f"message {number} ({message['role']}): content must be text, found {type(content).__name__}")
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise UserError(f"message {number} ({message['role']}): content has half a surrogate pair, which is no text")
    if message["role"] == "assistant" and not content.strip():
        raise UserError(f"message {number}: the assistant's content is empty")


def to_torchtune(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> list[Message]:
    """torchtune messages in which only the assistant's are trained.

    A chat template and Llama 3 have a role for a tool answer. In torchtune templates without, it becomes a user turn
    in <tool_response> tags, one turn for all answers in a row, as the Qwen chat templates write it.
    """
    has_tool_role = isinstance(tokenizer, (Llama3Tokenizer, ChatTemplateTokenizer))
    result: list[Message] = []
    answers: list[str] = []
    for message in [*messages, None]:
        if message is not None and message["role"] == "tool" and not has_tool_role:
            answers.append(f"<tool_response>\n{message['content']}\n</tool_response>")
            continue
        if answers:
            result.append(Message(role="user", content="\n".join(answers), masked=True))
            answers = []
        if message is not None:
            role = "ipython" if message["role"] == "tool" else message["role"]
            result.append(Message(role=role, content=message["content"], masked=role != "assistant"))  # pyright: ignore
    return result
