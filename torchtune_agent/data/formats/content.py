"""What one message says: its text, reasoning, calls and results, however the file spells them.

Text is taken as it stands, parts of text are joined with nothing between them, as chat templates do. What a
conversation cannot hold (an image, a text after a call) is refused, never left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchtune_agent.data import json_text
from torchtune_agent.data.conversation import Message, Role, ToolCall
from torchtune_agent.data.formats.fields import items, mapping, optional_id, optional_text, parsed, text, wrong_type
from torchtune_agent.data.reasons import BadRecord

_TEXT_TYPES = ("text", "input_text", "output_text")
_RESULT_TYPES = (*_TEXT_TYPES, "image", "image_url", "input_image")
_REASONING_TYPES = ("reasoning", "thinking")
_CALL_TYPES = ("tool_call", "tool_use", "function_call", "function")
_ARGUMENT_KEYS = ("arguments", "parameters", "input", "args")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


@dataclass
class Content:
    text: str = ""
    reasoning: str | None = None
    calls: list[ToolCall] = field(default_factory=list)
    results: list[Message] = field(default_factory=list)  # Anthropic's user turns hold the results of calls


def read_content(value: Any, where: str) -> Content:
    """Null, text, or a list of parts."""
    if value is None:
        return Content()
    if isinstance(value, str):
        return Content(value)
    if not isinstance(value, list | tuple):
        raise wrong_type(where, "text or a list of parts", value)
    content, latest = Content(), 0
    for i, part in enumerate(value):
        rank = _add_part(content, part, f"{where}[{i}]")
        if rank and rank < latest:
            raise BadRecord("unsupported_content", f"{where}[{i}]: stands after what a message can only end with")
        latest = max(rank, latest)
    return content


def _add_part(content: Content, part: Any, where: str) -> int:
    """Adds one part; returns its place in a message: reasoning 1, text 2, call 3 (0: nothing that has one)."""
    if isinstance(part, str):
        content.text += part
        return 2 if part else 0
    part = mapping(part, where)
    kind = part.get("type", "text")
    if kind in _TEXT_TYPES:
        said = text(_first(part, ("text", "value", "content")), where)
        content.text += said
        return 2 if said else 0
    if kind in _REASONING_TYPES:
        thought = text(_first(part, ("thinking", "reasoning", "text", "value")), where)
        content.reasoning = (content.reasoning or "") + thought
        return 1
    if kind in _CALL_TYPES:
        value = part.get("value")
        content.calls += parse_calls(value, where) if isinstance(value, str) else [read_call(part, where)]
        return 3
    if kind == "tool_result":
        call_id = optional_id(part.get("tool_use_id"), f"{where}.tool_use_id")
        content.results.append(Message(Role.TOOL, result_text(part.get("content"), where), tool_call_id=call_id))
        return 1
    raise BadRecord("unsupported_content", f"{where}: a part of type {str(kind)[:60]!r}")


def _first(values: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((values[key] for key in keys if values.get(key) is not None), None)


def result_text(value: Any, where: str) -> str:
    """What a tool answered. Values other than text are written as JSON, as chat templates do."""
    parts = isinstance(value, list | tuple) and all(
        isinstance(part, Mapping) and part.get("type") in _RESULT_TYPES for part in value
    )
    if value is None or isinstance(value, str) or parts:
        return read_content(value, where).text
    return written(value, where)


def written(value: Any, where: str) -> str:
    """A value as JSON text."""
    try:
        json_text.check_depth(value, where)
        return json_text.dumps(value)
    except (TypeError, ValueError) as error:
        if isinstance(error, BadRecord):
            raise
        raise BadRecord("wrong_type", f"{where}: {error}") from error


def read_call(value: Any, where: str) -> ToolCall:
    """A call with its function inside, or flat. Arguments given as text are kept to the byte."""
    outer = mapping(value, where)
    call = outer["function"] if isinstance(outer.get("function"), Mapping) else outer
    name = call.get("name")
    if not isinstance(name, str) or not name.strip():
        raise BadRecord("bad_tool_call", f"{where}: no function name")
    arguments = _first(call, _ARGUMENT_KEYS)
    if arguments is None:
        arguments = "{}"
    elif isinstance(arguments, Mapping | list | tuple):
        arguments = written(arguments, f"{where}.arguments")
    elif not isinstance(arguments, str):
        raise wrong_type(f"{where}.arguments", "an object or text", arguments)
    return ToolCall(name, arguments, optional_id(outer.get("id"), f"{where}.id"))


def read_calls(value: Any, where: str) -> list[ToolCall]:
    if value is None:
        return []
    return [read_call(item, f"{where}[{i}]") for i, item in enumerate(items(value, where))]


def parse_calls(value: Any, where: str) -> list[ToolCall]:
    """The calls of a turn that is nothing but calls: one object or a list, often as a string of JSON."""
    try:
        found = parsed(value, where) if isinstance(value, str) else value
    except BadRecord as error:
        if error.code != "wrong_type":
            raise
        raise BadRecord("bad_tool_call", error.detail) from error
    calls = [read_call(found, where)] if isinstance(found, Mapping) else read_calls(found, where)
    if not calls:
        raise BadRecord("bad_tool_call", f"{where}: a turn of calls without a call")
    return calls


def read_reasoning(message: Mapping[str, Any], where: str) -> str | None:
    """Reasoning beside the content, under any of its names; some servers give it under two."""
    found = {key: _reasoning_text(message[key], f"{where}.{key}") for key in _REASONING_KEYS if key in message}
    texts = list(dict.fromkeys(value for value in found.values() if value is not None))
    if len(texts) > 1:
        raise BadRecord("wrong_type", f"{where}: {' and '.join(found)} differ")
    return texts[0] if texts else None


def _reasoning_text(value: Any, where: str) -> str | None:
    if not isinstance(value, list | tuple):
        return optional_text(value, where)
    content = read_content(value, where)
    if content.calls or content.results:
        raise BadRecord("unsupported_content", f"{where}: holds more than text")
    return (content.reasoning or "") + content.text
