"""Conversations in OpenAI form, which most other formats are read as once their columns are renamed.

Reads `messages` with `tool_calls` (arguments as text or object, nested or flat), the older `function_call` and role
`function`, content that is null, text or parts, reasoning beside the content, `tools` or `functions` as a list or a
JSON string, and `train` and `weight` of a message. Records that log a request end with the message of their `response`.
"""

import math
from collections.abc import Mapping
from typing import Any

from torchtune_agent.data.conversation import Conversation, Message, Role, ToolCall
from torchtune_agent.data.formats.content import (
    Content,
    parse_calls,
    read_call,
    read_calls,
    read_content,
    read_reasoning,
    result_text,
)
from torchtune_agent.data.formats.fields import (
    CALL_ROLES,
    ROLES,
    items,
    mapping,
    optional_id,
    optional_text,
    read_metadata,
    read_tools,
    role_name,
    with_system,
    wrong_type,
)
from torchtune_agent.data.reasons import BadRecord

_USED = ("messages", "tools", "functions", "system", "metadata", "response")


def openai(record: Mapping[str, Any]) -> Conversation:
    messages = read_messages(record.get("messages"))
    if isinstance(record.get("response"), Mapping):
        messages += _response(record["response"])
    return Conversation(with_system(record, messages), read_tools(record), read_metadata(record, _USED))


def _response(response: Mapping[str, Any]) -> list[Message]:
    """The answer a logged request got, which is not among the messages that were sent."""
    choices = items(response.get("choices") or [], "response.choices")
    if len(choices) != 1:
        raise BadRecord("unsupported_content", f"response: {len(choices)} choices, not one")
    message = mapping(choices[0], "response.choices[0]").get("message")
    return read_message(mapping(message, "response.choices[0].message"), "response.choices[0].message")


def read_messages(value: Any, column: str = "messages") -> list[Message]:
    """All messages of a list.

    Calls that stand in turns of their own, one after the other or after the assistant's text, become one turn with it:
    the model that made them had not ended its turn.
    """
    result: list[Message] = []
    for i, item in enumerate(items(value, column)):
        where = f"{column}[{i}]"
        item = mapping(item, where)
        if role_name(item.get("role"), f"{where}.role") in CALL_ROLES:
            _add_call_turn(result, item, where)
        else:
            result += read_message(item, where)
    return result


def read_message(item: Mapping[str, Any], where: str) -> list[Message]:
    """One item of `messages`; more than one message where a user turn holds the results of calls."""
    role = ROLES.get(role_name(item.get("role"), f"{where}.role"))
    if role is None:
        result: list[Message] = []
        _add_call_turn(result, item, where)
        return result
    if role is Role.TOOL:
        content = Content(result_text(item.get("content"), f"{where}.content"))
    else:
        content = read_content(item.get("content"), f"{where}.content")
    reasoning = _one(read_reasoning(item, where), content.reasoning, f"{where}: reasoning")
    calls = _one(_calls(item, where), content.calls, f"{where}: tool_calls") or []
    if role is not Role.ASSISTANT and (reasoning or calls):
        raise BadRecord("wrong_type", f"{where}: only an assistant message can have reasoning or tool calls")
    if content.results and role is not Role.USER:
        raise BadRecord("unsupported_content", f"{where}: results of tools in a message of role {role.value}")
    if content.results and not content.text:
        return content.results
    if "content" not in item and not calls and reasoning is None:
        keys = ", ".join(str(key)[:40] for key in list(item)[:10])
        raise BadRecord("wrong_type", f"{where}: no content, only {keys}")
    message = Message(role, content.text, reasoning, calls, _result_id(item, where), _name(item, where))
    message.train, message.weight = _train(item, where), _weight(item, where)
    return [*content.results, message]


def _one(beside: Any, inside: Any, where: str) -> Any:
    """A message says a thing beside its content or inside it."""
    if beside and inside:
        raise BadRecord("wrong_type", f"{where} is given beside the content and inside it")
    return inside or beside


def _calls(item: Mapping[str, Any], where: str) -> list[ToolCall]:
    calls = read_calls(item.get("tool_calls"), f"{where}.tool_calls")
    legacy = item.get("function_call")
    if legacy and calls:
        raise BadRecord("wrong_type", f"{where}: has tool_calls and function_call")
    return [read_call(legacy, f"{where}.function_call")] if legacy else calls


def _add_call_turn(messages: list[Message], item: Mapping[str, Any], where: str) -> None:
    calls = parse_calls(item.get("content"), f"{where}.content")
    turn = Message(Role.ASSISTANT, reasoning=read_reasoning(item, where), tool_calls=calls)
    turn.train, turn.weight = _train(item, where), _weight(item, where)
    before = messages[-1] if messages else None
    if (
        before is not None
        and before.role is Role.ASSISTANT
        and (before.train, before.weight) == (turn.train, turn.weight)
        and not turn.reasoning
    ):
        before.tool_calls.extend(calls)
    else:
        messages.append(turn)


def _result_id(item: Mapping[str, Any], where: str) -> str | None:
    """`tool_call_ids` is SWE-agent's: a list of one."""
    ids = item.get("tool_call_ids")
    if ids is None:
        return optional_id(item.get("tool_call_id"), f"{where}.tool_call_id")
    ids = items(ids, f"{where}.tool_call_ids")
    if len(ids) > 1:
        raise BadRecord("unsupported_content", f"{where}.tool_call_ids: one message answers {len(ids)} calls")
    return optional_id(ids[0], f"{where}.tool_call_ids") if ids else None


def _name(item: Mapping[str, Any], where: str) -> str | None:
    return optional_text(item.get("name"), f"{where}.name")


def _train(item: Mapping[str, Any], where: str) -> bool | None:
    """`train`; and `metadata: {masked: true}`, Functionary's way to say that a message is not to be learned."""
    train, metadata = item.get("train"), item.get("metadata")
    if train is None and isinstance(metadata, Mapping) and metadata.get("masked") is True:
        return False
    if train is not None and not isinstance(train, bool):
        raise wrong_type(f"{where}.train", "true, false or null", train)
    return train


def _weight(item: Mapping[str, Any], where: str) -> float:
    weight = item.get("weight")
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise wrong_type(f"{where}.weight", "a number", weight)
    if not 0 <= weight < 1e9 or not math.isfinite(weight):
        raise BadRecord("wrong_type", f"{where}.weight: must be 0 or more")
    return float(weight)
