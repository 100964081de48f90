"""ReAct runs: Thought, Action, Action Input and Observation as lines of text.

An observation is never the model's own. Where it stands in an assistant's text, the text is split there: what follows
an "Observation:" up to the next Thought, Action or Final Answer becomes a user turn, as files that hold the turns apart
have it. Only the line break at each seam is taken out, so the turns joined by line breaks are the text again. A reward
at the end of the last observation goes to the metadata.
"""

import re
from collections.abc import Mapping
from typing import Any

from torchtune_agent.data.conversation import Conversation, Message, Role
from torchtune_agent.data.formats.fields import read_metadata, read_tools, with_system
from torchtune_agent.data.formats.openai import read_messages
from torchtune_agent.data.formats.sharegpt import COLUMNS, sharegpt
from torchtune_agent.data.reasons import BadRecord

_FIRST_LINES = {
    "assistant": re.compile(r"\s*(?:Thought|Action)(?: \d+)?:"),
    "user": re.compile(r"Observation(?: \d+)?:"),
}
_OWN_LINE = re.compile(r"^(?:Thought|Action|Final Answer)(?: \d+)?:", re.MULTILINE)
_ANY_LINE = re.compile(r"^(?:(Observation)|Thought|Action|Final Answer)(?: \d+)?:", re.MULTILINE)
_REWARD = re.compile(r"reward = (True|False|-?\d{1,18}(?:\.\d{1,18})?)\s*$")
_ALPACA = re.compile(r"\A(.*?)### Instruction:\n(.*?)\n+### Response:\n", re.DOTALL)


def react(record: Mapping[str, Any]) -> Conversation:
    if isinstance(record.get("traj"), str):
        messages = _from_text(record["traj"])
    elif record.get("traj") is not None:
        messages = read_messages(record["traj"], "traj")
    else:
        messages = sharegpt({name: record[name] for name in COLUMNS if name in record}).messages
    messages = [part for message in messages for part in _split(message)]
    metadata = read_metadata(record, ("traj", "prompt", "tools", "functions", "system", "metadata", *COLUMNS))
    reward = _reward(messages)
    if reward is not None:
        metadata.setdefault("reward", reward)
    return Conversation(with_system(record, messages), read_tools(record), metadata)


def looks_like_react(turn: Mapping[str, Any]) -> bool:
    """A turn that starts with the word that only a ReAct run starts it with; prose may have such a line further on."""
    first_line = _FIRST_LINES.get(str(turn.get("role")))
    return first_line is not None and first_line.match(str(turn.get("content"))) is not None


def _from_text(text: str) -> list[Message]:
    """One text for the whole run: the prompt up to the first Thought or Action, then the run."""
    prompt = _ALPACA.match(text)
    if prompt:
        system, asked, run = prompt[1].strip(), prompt[2], text[prompt.end() :]
    else:
        start = _OWN_LINE.search(text)
        if not start:
            raise BadRecord("nothing_to_train", "traj: no line that starts with Thought: or Action:")
        system, asked, run = "", text[: start.start()].strip(), text[start.start() :]
    messages = [Message(Role.SYSTEM, system)] if system else []
    return [*messages, Message(Role.USER, asked), Message(Role.ASSISTANT, run)]


def _split(message: Message) -> list[Message]:
    if message.role is not Role.ASSISTANT:
        return [message]
    parts: list[tuple[Role, int]] = [(Role.ASSISTANT, 0)]
    for line in _ANY_LINE.finditer(message.content):
        role = Role.USER if line[1] else Role.ASSISTANT
        if line.start() == 0:
            parts = [(role, 0)]
        elif role is not parts[-1][0]:
            parts.append((role, line.start()))
    if parts == [(Role.ASSISTANT, 0)]:
        return [message]
    if message.tool_calls:
        raise BadRecord("unsupported_content", "an observation in the text of a message that has tool calls")
    ends = [start - 1 for _, start in parts[1:]] + [len(message.content)]
    return [_part(message, role, start, end) for (role, start), end in zip(parts, ends, strict=True)]


def _part(message: Message, role: Role, start: int, end: int) -> Message:
    text = message.content[start:end]
    if role is Role.USER:
        return Message(role, text)
    reasoning = message.reasoning if start == 0 else None
    return Message(role, text, reasoning, train=message.train, weight=message.weight)


def _reward(messages: list[Message]) -> float | None:
    found = _REWARD.search(messages[-1].content) if messages and messages[-1].role is Role.USER else None
    return {"True": 1.0, "False": 0.0}.get(found[1]) if found and found[1][0] in "TF" else found and float(found[1])
