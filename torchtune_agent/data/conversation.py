"""The one form every record takes before it is rendered: OpenAI-shaped messages, tools, and where they came from."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Role(str, Enum):
    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass
class ToolCall:
    """`arguments` is the JSON text as the record spelled it: order, spacing and number formats are kept."""

    name: str
    arguments: str
    id: str | None = None


@dataclass
class Message:
    """One message. `content` may hold calls as text (then `tool_calls` is empty), and is "" where there is none.

    `train` overrides what the config says for this message; `weight` scales its loss.
    """

    role: Role
    content: str = ""
    reasoning: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)
    tool_call_id: str | None = None
    name: str | None = None
    train: bool | None = None
    weight: float = 1.0


@dataclass
class Conversation:
    """One record. `tools` are JSON-schema function descriptions as given; `metadata` holds what is not rendered
    (`id`, `task`, `source`, `reward`, ...)."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
