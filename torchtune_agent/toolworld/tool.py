"""What a tool is: a typed function that really runs, and what a task needs to know to talk about it.

A `Tool` is what a model sees (name, description, JSON schema) plus the function behind it. Its `Usage` is never shown:
it says how to draw valid arguments, how a user asks for it, and how its result is put into words. Tasks are built from
these parts alone, so adding a family of tools needs no change anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

# A model may send anything; these bounds keep every tool fast and every number printable.
MAX_NUMBER = 10**12
MAX_RESULT = 10**15
MAX_STRING = 4_000
MAX_ITEMS = 200


class ToolError(Exception):
    """A tool could not do what it was asked; the message is what the model reads."""


class State:
    """The mutable things one task's tools work on: named tables, filled on first use from the task's seed.

    Filling lazily keeps a fresh environment free of cost, whatever the number of tools in the world.
    """

    def __init__(self, seed: str) -> None:
        self.seed = seed
        self._tables: dict[str, dict[str, Any]] = {}
        self._makers: dict[str, Callable[[Random], dict[str, Any]]] = {}

    def table(self, name: str, make: Callable[[Random], dict[str, Any]]) -> dict[str, Any]:
        if name not in self._tables:
            self._makers[name] = make
            self._tables[name] = self._initial(name)
        return self._tables[name]

    def changes(self) -> dict[str, dict[str, Any]]:
        """The tables that are no longer as they started."""
        return {name: table for name, table in self._tables.items() if table != self._initial(name)}

    def _initial(self, name: str) -> dict[str, Any]:
        return self._makers[name](Random(f"{self.seed}/{name}"))


@dataclass(frozen=True)
class Pipe:
    """How a tool is asked for when one argument is an earlier call's result ("... then cancel it")."""

    parameter: str
    takes: str
    asks: tuple[str, str, str, str]


@dataclass(frozen=True)
class Lookup:
    """A parameter that must name something that exists, and the tool that lists what exists."""

    parameter: str
    tool: str


@dataclass(frozen=True)
class Usage:
    """How tasks use a tool. Texts are `str.format` templates over the arguments and `result`.

    `asks` are imperative clauses: two for train, one for validation, one for test. `goal` continues "I need ...".
    `gives` names the kind of value a call results in ("number", "date", "bakery/order"), which pipes may take.
    """

    sample: Callable[[Random, State], dict[str, Any]]
    asks: tuple[str, str, str, str]
    goal: str
    reply: str
    gives: str = ""
    pipe: Pipe | None = None
    lookup: Lookup | None = None


@dataclass(frozen=True)
class Tool:
    """`group` holds the tools about one thing (a shop, a quantity); `topic` says in words what that thing is."""

    name: str
    description: str
    parameters: dict[str, Any]
    family: str
    group: str
    topic: str
    run: Callable[[State, dict[str, Any]], Any]
    usage: Usage

    def spec(self) -> str:
        """The one compact line a system prompt shows."""
        required = self.parameters["required"]
        shown = [
            f"{name}{'' if name in required else '?'}: {_type_name(schema)}"
            for name, schema in self.parameters["properties"].items()
        ]
        return f"{self.name}({', '.join(shown)}) - {self.description}"


def parameters(optional: tuple[str, ...] = (), /, **types: str) -> dict[str, Any]:
    """A JSON schema from short type names: "string", "integer", "number", "boolean", "object", "number[]", "a|b"."""
    return {
        "type": "object",
        "properties": {name: _property(text) for name, text in types.items()},
        "required": [name for name in types if name not in optional],
    }


def check_arguments(tool: Tool, arguments: Mapping[str, Any]) -> None:
    """Raise the `ToolError` a real tool server would answer with when the arguments do not fit the schema."""
    properties = tool.parameters["properties"]
    for name in tool.parameters["required"]:
        if name not in arguments:
            raise ToolError(f"missing argument '{name}' for {tool.name}")
    for name, value in arguments.items():
        if name not in properties:
            raise ToolError(f"{tool.name} has no argument '{name}'")
        _check_value(name, value, properties[name])


def tidy(value: float) -> float:
    """A result as tools report it: whole numbers without a decimal point, others to about four digits."""
    if not abs(value) <= MAX_RESULT:
        raise ToolError("the result is out of range")
    if isinstance(value, int):
        return value
    rounded = round(value, 4) if abs(value) >= 1 else float(f"{value:.4g}")
    return int(rounded) if rounded.is_integer() else rounded


def _property(text: str) -> dict[str, Any]:
    if text.endswith("[]"):
        return {"type": "array", "items": {"type": text[:-2]}}
    if "|" in text:
        return {"type": "string", "enum": text.split("|")}
    if text == "object":
        return {"type": "object", "additionalProperties": {"type": "integer"}}
    return {"type": text}


def _type_name(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return "|".join(schema["enum"])
    return f"{schema['items']['type']}[]" if schema["type"] == "array" else schema["type"]


def _check_value(name: str, value: Any, schema: Mapping[str, Any]) -> None:
    kind = schema["type"]
    if not _has_type(value, kind):
        article = "an" if kind[0] in "aio" else "a"
        raise ToolError(f"argument '{name}' must be {article} {kind}")
    if "enum" in schema and value not in schema["enum"]:
        raise ToolError(f"argument '{name}' must be one of {', '.join(schema['enum'])}")
    if isinstance(value, str) and len(value) > MAX_STRING:
        raise ToolError(f"argument '{name}' is too long")
    # Written so that NaN, for which every comparison is false, is out of range too.
    if isinstance(value, int | float) and not abs(value) <= MAX_NUMBER:
        raise ToolError(f"argument '{name}' is out of range")
    if isinstance(value, list | dict):
        if len(value) > MAX_ITEMS:
            raise ToolError(f"argument '{name}' has too many items")
        item_schema = schema["items"] if kind == "array" else schema["additionalProperties"]
        for item in value.values() if isinstance(value, dict) else value:
            _check_value(name, item, item_schema)


def _has_type(value: Any, kind: str) -> bool:
    if kind in ("integer", "number"):
        # bool is an int in Python but not in JSON; 3.0 is an integer in JSON schema.
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (kind == "number" or isinstance(value, int) or value.is_integer())
    return isinstance(value, {"string": str, "boolean": bool, "array": list, "object": dict}[kind])
