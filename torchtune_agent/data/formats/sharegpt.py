"""ShareGPT form: `conversations` of {from, value}, under any of the role names in use.

`function_call` turns hold the JSON of one or more calls; `tools` is a JSON string or a list.
"""

from collections.abc import Mapping
from typing import Any

from torchtune_agent.data.conversation import Conversation
from torchtune_agent.data.formats.fields import items, mapping, read_metadata, read_tools, with_system
from torchtune_agent.data.formats.openai import read_messages
from torchtune_agent.data.reasons import BadRecord

COLUMNS = ("conversations", "conversation", "messages")


def sharegpt(record: Mapping[str, Any]) -> Conversation:
    if record.get("chosen") is not None and record.get("rejected") is not None:
        raise BadRecord("unknown_format", "a preference pair (chosen, rejected), which is no single conversation")
    column = next((name for name in COLUMNS if record.get(name) is not None), COLUMNS[0])
    turns = [mapping(turn, f"{column}[{i}]") for i, turn in enumerate(items(record.get(column), column))]
    messages = read_messages([_as_message(turn) for turn in turns], column)
    used = (*COLUMNS, "tools", "functions", "system", "metadata")
    return Conversation(with_system(record, messages), read_tools(record), read_metadata(record, used))


def _as_message(turn: Mapping[str, Any]) -> dict[str, Any]:
    names = {"from": "role", "value": "content"}
    return {names.get(key, key): value for key, value in turn.items() if key not in names or names[key] not in turn}
