"""The text form of tool calls: `render_call` writes one, `parse_calls` reads them all back.

The form is the `<function=NAME><parameter=KEY>` block of SWE-agent style runs: strings stand verbatim, other values as
JSON, so a value is never escaped and its bytes are exactly what the tool receives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchtune_agent.toolworld.tool import Tool

_FUNCTION = re.compile(r"<function=([^>\n]*)>\n?")
_PARAMETER = re.compile(r"<parameter=([^>\n]*)>\n")
_PARAMETER_END = "\n</parameter>"
_FUNCTION_END = "</function>"


@dataclass(frozen=True)
class Call:
    """One tool call. `error` is set when the text of the call was malformed, and says how."""

    name: str
    arguments: dict[str, Any]
    error: str = ""

    def key(self) -> str:
        """The same text for calls that mean the same: argument order and 3 against 3.0 do not matter."""
        return f"{self.name} {json.dumps(_canonical(self.arguments), sort_keys=True, ensure_ascii=False)}"


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def render_call(name: str, arguments: Mapping[str, Any]) -> str:
    lines = [f"<function={name}>"]
    for key, value in arguments.items():
        text = value if isinstance(value, str) else to_json(value)
        if _PARAMETER_END in f"\n{text}":
            raise ValueError(
                f"argument '{key}' of {name} has a line that starts with </parameter>: it cannot be a value"
            )
        lines += [f"<parameter={key}>", text, "</parameter>"]
    return "\n".join([*lines, _FUNCTION_END])


def parse_calls(text: str, tools: Mapping[str, Tool]) -> list[Call]:
    """Every call in `text`, typed by the schemas of `tools`.

    Nothing is raised and nothing dropped: a malformed block becomes a `Call` with `error`; a value that does not fit
    its type, and every value of an unknown tool or argument, stays a string, for the environment to refuse.
    """
    calls = []
    start = _FUNCTION.search(text)
    while start:
        call, end = _parse_call(text, start, tools)
        calls.append(call)
        start = _FUNCTION.search(text, end)
    return calls


def strip_calls(text: str) -> str:
    """The prose of an assistant turn: what stands before its first call."""
    start = _FUNCTION.search(text)
    return (text[: start.start()] if start else text).strip()


def _parse_call(text: str, start: re.Match[str], tools: Mapping[str, Tool]) -> tuple[Call, int]:
    name, position = start.group(1).strip(), start.end()
    properties = tools[name].parameters["properties"] if name in tools else {}
    arguments: dict[str, Any] = {}
    error = ""
    while not text.startswith(_FUNCTION_END, position):
        parameter = _PARAMETER.match(text, position)
        if not parameter:
            error = error or f"the call of {name} is not closed by </function>"
            return Call(name, arguments, error), position
        key = parameter.group(1).strip()
        # From the line break before the value on, so that an empty value is found too.
        end = text.find(_PARAMETER_END, parameter.end() - 1)
        if end < 0:
            return Call(name, arguments, f"parameter '{key}' of {name} is not closed by </parameter>"), len(text)
        if key in arguments:
            error = f"parameter '{key}' of {name} is given twice"
        arguments[key] = _typed(text[parameter.end() : max(end, parameter.end())], properties.get(key, {}))
        position = end + len(_PARAMETER_END)
        position += text.startswith("\n", position)
    return Call(name, arguments, error), position + len(_FUNCTION_END)


def _typed(text: str, schema: Mapping[str, Any]) -> Any:
    if schema.get("type", "string") == "string":
        return text
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return text


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _canonical(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    return [_canonical(item) for item in value] if isinstance(value, list) else value
