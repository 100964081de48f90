"""ToolWorld: tools that really run, tasks over them and gold conversations, with nothing downloaded."""

from pathlib import Path

from torchtune_agent.toolworld.calls import Call, parse_calls, render_call, strip_calls
from torchtune_agent.toolworld.checking import CheckResult
from torchtune_agent.toolworld.environment import Environment
from torchtune_agent.toolworld.tasks import KINDS, Task, Turn
from torchtune_agent.toolworld.tool import Tool
from torchtune_agent.toolworld.world import ToolWorld

# The tiny byte-level tokenizer that goes with it, in Hugging Face's format.
TOKENIZER_DIR = Path(__file__).parent / "tokenizer"

__all__ = [
    "KINDS",
    "TOKENIZER_DIR",
    "Call",
    "CheckResult",
    "Environment",
    "Task",
    "Tool",
    "ToolWorld",
    "Turn",
    "parse_calls",
    "render_call",
    "strip_calls",
]
