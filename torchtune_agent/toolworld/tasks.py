"""What a task is: a user's request over some offered tools, with the calls and the answer that solve it."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from torchtune_agent.toolworld.calls import Call, render_call
from torchtune_agent.toolworld.environment import Environment
from torchtune_agent.toolworld.tool import Tool

KINDS = ("single", "chain", "parallel", "recover", "no_call", "no_tool")

Message = dict[str, str]

_SYSTEM = """You are a helpful agent with these tools:
{tools}
To call a tool, write:
<function=name>
<parameter=key>
value
</parameter>
</function>"""


@dataclass(frozen=True)
class Turn:
    """One assistant turn of calls. Only `required` ones must be made: a slip and the search after it need not be."""

    thought: str
    calls: tuple[Call, ...]
    required: bool = True


@dataclass(frozen=True)
class Task:
    """`wording` is the instruction with its blanks unfilled; `facts` are what an answer must contain."""

    id: str
    split: str
    kind: str
    instruction: str
    wording: str
    tools: dict[str, Tool]
    gold: tuple[Turn, ...]
    answer: str
    facts: tuple[str, ...]
    state_seed: str

    @property
    def calls(self) -> list[Call]:
        """The reference calls in order, whatever turn they are in."""
        return [call for turn in self.gold for call in turn.calls]

    def environment(self) -> Environment:
        """Fresh state: two environments of a task never see each other's changes."""
        return Environment(self.tools, self.state_seed)

    def prompt(self) -> list[Message]:
        """The system and user messages that a model starts from."""
        tools = "\n".join(tool.spec() for tool in self.tools.values())
        return [
            {"role": "system", "content": _SYSTEM.format(tools=tools)},
            {"role": "user", "content": self.instruction},
        ]

    def conversation(self) -> dict[str, Any]:
        """The gold conversation as one record; tool messages hold what the environment really answers."""
        environment = self.environment()
        messages = self.prompt()
        for turn in self.gold:
            calls = [render_call(call.name, call.arguments) for call in turn.calls]
            messages.append({"role": "assistant", "content": "\n".join([turn.thought, *calls])})
            messages += [{"role": "tool", "content": environment.execute_call(call)} for call in turn.calls]
        messages.append({"role": "assistant", "content": self.answer})
        return {"messages": messages, "id": self.id, "kind": self.kind, "split": self.split, "tools": list(self.tools)}


def split_of(call: Call) -> str:
    """The one split whose tasks may make this call.

    A fixed partition of all calls keeps the splits apart in every world,
    with random access and nothing to remember. Only
    a listing without arguments, made to recover from an error, is free of it.
    """
    quarter = blake2b(call.key().encode(), digest_size=1).digest()[0] % 4
    return ("train", "train", "validation", "test")[quarter]
