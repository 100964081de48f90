"""From a record, in any of the shapes agent data comes in, to the one form everything else works on.

One function per format, all in `FORMATS`; each takes a record and gives a Conversation or raises BadRecord, never
anything else. `detect` picks one by the record's structure. A format of one's own is a function of the same shape.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torchtune_agent.data.conversation import Conversation
from torchtune_agent.data.formats.alpaca import alpaca
from torchtune_agent.data.formats.in_text import toolworld, xml
from torchtune_agent.data.formats.openai import openai
from torchtune_agent.data.formats.react import looks_like_react, react
from torchtune_agent.data.formats.sharegpt import sharegpt
from torchtune_agent.data.formats.swe_agent import swe_agent
from torchtune_agent.data.formats.tau_bench import tau_bench
from torchtune_agent.data.reasons import BadRecord

__all__ = ["FORMATS", "Format", "convert", "detect", "rename_columns"]

Format = Callable[[Mapping[str, Any]], Conversation]

FORMATS: dict[str, Format] = {
    "openai": openai,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "react": react,
    "xml": xml,
    "swe_agent": swe_agent,
    "tau_bench": tau_bench,
    "toolworld": toolworld,
}


def rename_columns(record: Mapping[str, Any], column_map: Mapping[str, str] | None) -> Mapping[str, Any]:
    """The record with the columns a format reads, as torchtune's `column_map`: {the format's name: the file's name}."""
    if not column_map:
        return record
    taken = set(column_map.values())
    result = {name: value for name, value in record.items() if name not in taken}
    return result | {ours: record[theirs] for ours, theirs in column_map.items() if theirs in record}


def convert(
    record: Mapping[str, Any], format: str | Format = "auto", column_map: Mapping[str, str] | None = None
) -> Conversation:
    """The conversation a record holds. `format` is a name of FORMATS, "auto", or a function; not yet validated."""
    record = rename_columns(record, column_map)
    if callable(format):
        return format(record)
    return FORMATS[detect(record) if format == "auto" else format](record)


def detect(record: Mapping[str, Any]) -> str:
    """The format of a record, by the first rule that fits."""
    if record.get("chosen") is not None and record.get("rejected") is not None:
        raise BadRecord("unknown_format", "a preference pair (chosen, rejected), which is no single conversation")
    if "traj" in record:
        return "tau_bench" if "task_id" in record and not isinstance(record["traj"], str) else "react"
    if "instruction" in record and "output" in record:
        return "alpaca"
    if (
        "trajectory" in record
        or "trajectory_format" in record
        or any("role" in t for t in _turns(record.get("history")))
    ):
        return "swe_agent"
    if (
        "conversations" in record
        or "conversation" in record
        or any("from" in t for t in _turns(record.get("messages")))
    ):
        return "sharegpt"
    if "messages" in record:
        return _detect_messages(record)
    keys = ", ".join(str(key)[:40] for key in list(record)[:20])
    raise BadRecord("unknown_format", f"no format has these keys: {keys or '(none)'}")


def _turns(value: Any) -> list[Mapping[str, Any]]:
    return [turn for turn in value if isinstance(turn, Mapping)] if isinstance(value, list | tuple) else []


def _detect_messages(record: Mapping[str, Any]) -> str:
    tools, turns = record.get("tools"), _turns(record["messages"])
    if (
        "kind" in record
        and "split" in record
        and isinstance(tools, list)
        and all(isinstance(name, str) for name in tools)
    ):
        return "toolworld"
    if any(turn.get("tool_calls") or turn.get("function_call") for turn in turns):
        return "openai"
    if any(turn.get("role") == "assistant" and "<function=" in str(turn.get("content")) for turn in turns):
        return "xml"
    return "react" if any(looks_like_react(turn) for turn in turns) else "openai"
