"""The world behind one task: executes what a model calls and answers with text, errors included.

It never raises: a wrong name, a missing or wrong-typed argument, or an unknown id gives the error text that a real tool
server would send back, because reading errors and recovering from them is part of what an agent learns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchtune_agent.toolworld.calls import Call, to_json
from torchtune_agent.toolworld.tool import State, Tool, ToolError, check_arguments


class Environment:
    """Fresh state for one task, over the tools that task offers."""

    def __init__(self, tools: Mapping[str, Tool], seed: str) -> None:
        self.tools = tools
        self.state = State(seed)

    def execute(self, name: str, arguments: Mapping[str, Any]) -> str:
        try:
            return result_text(self.value(Call(name, dict(arguments))))
        except ToolError as error:
            return f"Error: {error}"

    def execute_call(self, call: Call) -> str:
        """Like `execute`, for a parsed call, whose own syntax error is then the answer."""
        return f"Error: {call.error}" if call.error else self.execute(call.name, call.arguments)

    def value(self, call: Call) -> Any:
        """The result before it becomes text; raises `ToolError`."""
        tool = self.tools.get(call.name)
        if tool is None:
            raise ToolError(f"there is no tool '{call.name}'")
        check_arguments(tool, call.arguments)
        return tool.run(self.state, _whole_numbers(tool, call.arguments))


def result_text(value: Any) -> str:
    """Strings stand as they are, everything else as JSON."""
    return value if isinstance(value, str) else to_json(value)


def _whole_numbers(tool: Tool, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """3.0 is a valid integer in JSON schema; the tools themselves only ever see 3."""
    properties = tool.parameters["properties"]
    return {name: int(value) if properties[name]["type"] == "integer" else value for name, value in arguments.items()}
