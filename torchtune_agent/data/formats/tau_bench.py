"""tau-bench results: `traj` in OpenAI form with the reward of the run; several trials share one task."""

from collections.abc import Mapping
from typing import Any

from torchtune_agent.data.conversation import Conversation
from torchtune_agent.data.formats.fields import read_metadata, read_tools
from torchtune_agent.data.formats.openai import read_messages


def tau_bench(record: Mapping[str, Any]) -> Conversation:
    messages = read_messages(record.get("traj"), "traj")
    metadata = read_metadata(record, ("traj", "tools", "functions", "metadata"))
    return Conversation(
        messages, read_tools(record), {"source": "tau_bench", "task": record.get("task_id"), **metadata}
    )
