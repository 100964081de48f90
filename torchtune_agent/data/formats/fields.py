"""Reading untrusted fields: every accessor gives the type it promises or a BadRecord that names the field."""

from collections.abc import Collection, Mapping
from json import JSONDecodeError
from typing import Any

from torchtune_agent.data import json_text
from torchtune_agent.data.conversation import Message, Role
from torchtune_agent.data.reasons import BadRecord

_LONGEST_METADATA = 1000  # characters; longer texts are content of some kind, not a label

ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), Role.SYSTEM),
    **dict.fromkeys(("user", "human"), Role.USER),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "model", "bing", "bard", "claude", "ai", "bot", "chatbot", "agent"),
        Role.ASSISTANT,
    ),
    **dict.fromkeys(
        ("tool", "function", "ipython", "observation", "environment", "tool_response", "tool_result", "tool_output",
         "function_response", "function_result", "function_output", "function-response", "tool-response"),
        Role.TOOL,
    ),
}  # fmt: skip

# Turns of the assistant whose whole text is the JSON of one or more calls.
CALL_ROLES = ("function_call", "tool_call", "tool_calls", "function-call", "tool-call")


def wrong_type(where: str, expected: str, value: Any) -> BadRecord:
    return BadRecord("wrong_type", f"{where}: expected {expected}, found {type(value).__name__}")


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise wrong_type(where, "an object", value)
    return value


def items(value: Any, where: str) -> list[Any]:
    """A list, also where it is written as a JSON string."""
    if isinstance(value, str):
        value = parsed(value, where)
    if not isinstance(value, list | tuple):
        raise wrong_type(where, "a list", value)
    return list(value)


def text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise wrong_type(where, "text", value)
    return value


def optional_text(value: Any, where: str) -> str | None:
    return None if value is None else text(value, where)


def optional_id(value: Any, where: str) -> str | None:
    """Ids are compared as text; some files number them."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else optional_text(value, where)


def parsed(value: str, where: str) -> Any:
    """The value that a string of JSON holds."""
    try:
        result = json_text.loads(value)
    except JSONDecodeError as error:
        raise BadRecord("wrong_type", f"{where}: a text that is not JSON ({error})") from error
    except RecursionError as error:
        raise BadRecord("too_deep", f"{where}: its JSON nests too deep") from error
    json_text.check_depth(result, where)
    return result


def role_name(value: Any, where: str) -> str:
    """A role as the file names it, in lower case; known ones only."""
    name = text(value, where).strip().lower()
    if name not in ROLES and name not in CALL_ROLES:
        raise BadRecord("unknown_role", f"{where}: {value[:60]!r} is not a known role")
    return name


def read_tools(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tools of `tools`, or of the older `functions`: a list, or the same as a JSON string.

    A bare function description is put into the {"type": "function", "function": ...} that servers pass to templates.
    """
    name = "functions" if record.get("tools") is None else "tools"
    value = record.get(name)
    if isinstance(value, str):
        value = parsed(value, name) if value.strip() else None
    if isinstance(value, Mapping):
        value = [value]
    tools = [dict(mapping(tool, f"{name}[{i}]")) for i, tool in enumerate(items(value or [], name))]
    return [{"type": "function", "function": t} if "name" in t and "function" not in t else t for t in tools]


def read_metadata(record: Mapping[str, Any], used: Collection[str]) -> dict[str, Any]:
    """The short labels of a record: scalars of its top level and of its `metadata`, other than the `used` columns."""
    inner = record.get("metadata")
    return {**(_scalars(inner, ()) if isinstance(inner, Mapping) else {}), **_scalars(record, used)}


def _scalars(values: Mapping[str, Any], used: Collection[str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, json_text.SpelledFloat):
            value = float(value)
        small = isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= _LONGEST_METADATA)
        if small and key not in used:
            result[key] = value
    return result


def with_system(record: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """`messages` after the system prompt of the `system` column, where there is one."""
    system = optional_text(record.get("system"), "system")
    if not system or (messages and messages[0].role is Role.SYSTEM and messages[0].content == system):
        return messages
    if messages and messages[0].role is Role.SYSTEM:
        raise BadRecord("wrong_type", "system: differs from the system message the conversation starts with")
    return [Message(Role.SYSTEM, system), *messages]
