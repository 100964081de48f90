"""Trajectories of SWE-agent, SWE-smith and mini-swe-agent (`.traj`): what the model saw and said, from their run files.

`history` holds the whole conversation; where it is missing, the steps of `trajectory` give it; mini-swe-agent writes
`messages`. An assistant's `content` is the model's answer; `thought` and `action` repeat it in pieces and are not read.
Demonstrations are shown to the model, not learned.
"""

from collections.abc import Mapping
from typing import Any

from torchtune_agent.data.conversation import Conversation, Message, Role
from torchtune_agent.data.formats.fields import items, mapping, read_metadata, read_tools, text
from torchtune_agent.data.formats.openai import read_messages
from torchtune_agent.data.reasons import BadRecord

_USED = ("history", "trajectory", "messages", "info", "tools", "functions", "metadata", "replay_config")
_OF_THE_RUN = ("exit_status", "resolved", "reward", "instance_id", "model_name")


def swe_agent(record: Mapping[str, Any]) -> Conversation:
    if record.get("history"):
        messages = _history(record["history"], "history")
    elif record.get("messages"):
        messages = _history(record["messages"], "messages")
    else:
        messages = _steps(record.get("trajectory"))
    info = record.get("info")
    run = {key: info[key] for key in _OF_THE_RUN if key in info} if isinstance(info, Mapping) else {}
    metadata = {"source": "swe_agent", **read_metadata(run, ()), **read_metadata(record, _USED)}
    return Conversation(messages, read_tools(record), metadata)


def _history(value: Any, column: str) -> list[Message]:
    turns = [dict(mapping(turn, f"{column}[{i}]")) for i, turn in enumerate(items(value, column))]
    agents = {turn.get("agent") if isinstance(turn.get("agent"), str) else None for turn in turns}
    if len(agents) > 1:
        raise BadRecord("unsupported_content", f"{column}: mixes the messages of several agents")
    for i, turn in enumerate(turns):
        if turn.get("is_demo") is True:
            turn["train"] = False
        if turn.get("thinking_blocks"):
            turn["thinking"] = items(turn["thinking_blocks"], f"{column}[{i}].thinking_blocks")
    return read_messages(turns, column)


def _steps(value: Any) -> list[Message]:
    """Each step is the model's `response` and the `observation` it got; the first says what was asked."""
    steps = [mapping(step, f"trajectory[{i}]") for i, step in enumerate(items(value, "trajectory"))]
    messages: list[Message] = []
    for i, step in enumerate(steps):
        where = f"trajectory[{i}]"
        asked = step.get("query") or step.get("messages")
        if asked:
            seen = _history(asked, f"{where}.query")
            if any(message.tool_calls for message in seen):
                raise BadRecord("unsupported_content", f"{where}: calls of a trajectory stand only in its history")
            messages = messages or seen
        messages.append(Message(Role.ASSISTANT, text(step.get("response"), f"{where}.response")))
        if step.get("observation"):
            messages.append(Message(Role.USER, text(step["observation"], f"{where}.observation")))
    return messages
