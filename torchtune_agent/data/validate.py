"""Whether a conversation makes sense to train on. Formats read shapes; this looks at what they say.

Calls may be structured (`tool_calls`) or text in the content, in any style. Only structured ones can be matched with
their results; after a text that could hold a call, any number of results is accepted, as is a user turn instead.
"""

import math
from json import JSONDecodeError

from torchtune_agent.data import json_text
from torchtune_agent.data.conversation import Conversation, Message, Role, ToolCall
from torchtune_agent.data.reasons import BadRecord

# Every way to write a call as text has one of these: tags, JSON, code fences, f(a=1), ReAct.
_CALL_SIGNS = ("<", "{", "[", "(", "```", "Action")


def check(conversation: Conversation) -> None:
    """Raise BadRecord where there is a reason not to train on the conversation."""
    messages = conversation.messages
    if not isinstance(messages, list) or not messages:
        raise BadRecord("wrong_type", "messages: must be a non-empty list")
    for i, message in enumerate(messages):
        _check_types(message, f"messages[{i}]")
        _check_texts(message, f"messages[{i}]")
        _check_not_empty(message, f"messages[{i}]")
    _check_results(messages)
    if not any(m.role is Role.ASSISTANT and m.train is not False and m.weight > 0 for m in messages):
        raise BadRecord("nothing_to_train", "no assistant message that is to be trained")
    if not isinstance(conversation.tools, list) or not all(isinstance(tool, dict) for tool in conversation.tools):
        raise BadRecord("wrong_type", "tools: must be a list of objects")
    json_text.check_depth(conversation.tools, "tools")
    json_text.check_texts(conversation.tools, "tools")


def _check_types(message: Message, where: str) -> None:
    """Built-in formats always pass; a user's own may not."""
    if not isinstance(message, Message):
        raise BadRecord("wrong_type", f"{where}: expected a Message, found {type(message).__name__}")
    if not isinstance(message.role, Role):
        raise BadRecord("unknown_role", f"{where}: {message.role!r} is not a Role")
    if not isinstance(message.content, str):
        raise BadRecord("wrong_type", f"{where}.content: expected text, found {type(message.content).__name__}")
    for name in ("reasoning", "tool_call_id", "name"):
        value = getattr(message, name)
        if value is not None and not isinstance(value, str):
            raise BadRecord("wrong_type", f"{where}.{name}: expected text, found {type(value).__name__}")
    if message.train is not None and not isinstance(message.train, bool):
        raise BadRecord("wrong_type", f"{where}.train: must be True, False or None")
    if not isinstance(message.weight, int | float) or not (math.isfinite(message.weight) and message.weight >= 0):
        raise BadRecord("wrong_type", f"{where}.weight: must be a number, 0 or more")
    if message.tool_calls and message.role is not Role.ASSISTANT:
        raise BadRecord("wrong_type", f"{where}: only an assistant message can have tool calls")
    for i, call in enumerate(message.tool_calls):
        if not isinstance(call, ToolCall) or not isinstance(call.name, str) or not isinstance(call.arguments, str):
            raise BadRecord(
                "wrong_type", f"{where}.tool_calls[{i}]: expected a ToolCall with name and arguments as text"
            )
        if not call.name.strip():
            raise BadRecord("bad_tool_call", f"{where}.tool_calls[{i}]: no function name")


def _check_texts(message: Message, where: str) -> None:
    for name in ("content", "reasoning", "tool_call_id", "name"):
        json_text.check_text(getattr(message, name) or "", f"{where}.{name}")
    for i, call in enumerate(message.tool_calls):
        for name in ("name", "arguments", "id"):
            json_text.check_text(getattr(call, name) or "", f"{where}.tool_calls[{i}].{name}")
        _check_arguments(call.arguments, f"{where}.tool_calls[{i}].arguments")


def _check_arguments(text: str, where: str) -> None:
    """Arguments need not be JSON (code is passed as it is), but templates parse those that are."""
    if text.count("{") + text.count("[") > json_text.MAX_DEPTH or "\\u" in text:
        try:
            value = json_text.loads(text)
        except JSONDecodeError:
            return
        except RecursionError as error:
            raise BadRecord("too_deep", f"{where}: its JSON nests too deep") from error
        json_text.check_depth(value, where)
        json_text.check_texts(value, where)


def _check_not_empty(message: Message, where: str) -> None:
    """A system prompt may be empty, and so may the answer of a tool."""
    said = message.content.strip() or message.tool_calls or (message.reasoning or "").strip()
    if message.role in (Role.USER, Role.ASSISTANT) and not said:
        raise BadRecord("empty_turn", f"{where}: a turn of the {message.role.value} that says nothing")


def _check_results(messages: list[Message]) -> None:
    """Every structured call is answered before anyone else speaks, and every result answers a call.

    The calls of the last turn may be unanswered: that is where a run stops. Where neither calls nor results have ids,
    one result may answer all calls of its turn: some files join the results of parallel calls.
    """
    waiting: list[ToolCall] = []
    text_call = joined = False
    for i, message in enumerate(messages):
        if message.role is Role.TOOL:
            joined = joined or (bool(waiting) and not _has_id(waiting, message))
            if not text_call:
                _answer(waiting, message, f"messages[{i}]")
            continue
        if waiting and not joined:
            raise BadRecord("missing_tool_result", f"messages[{i}]: the call of {waiting[0].name!r} has no result yet")
        waiting, joined = list(message.tool_calls), False
        text_call = message.role is Role.ASSISTANT and not waiting and _may_call(message)


def _may_call(message: Message) -> bool:
    return any(sign in message.content for sign in _CALL_SIGNS)


def _has_id(waiting: list[ToolCall], result: Message) -> bool:
    return result.tool_call_id is not None and any(call.id is not None for call in waiting)


def _answer(waiting: list[ToolCall], result: Message, where: str) -> None:
    """Take the call that `result` answers out of `waiting`: the one with its id, or else the next one."""
    by_id = _has_id(waiting, result)
    match = next((call for call in waiting if not by_id or call.id == result.tool_call_id), None)
    if match is None:
        named = f" with id {result.tool_call_id!r}" if result.tool_call_id is not None else ""
        raise BadRecord("orphan_tool_result", f"{where}: no call{named} waits for this result")
    waiting.remove(match)
