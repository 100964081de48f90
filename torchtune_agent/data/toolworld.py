"""ToolWorld as training data: the data set and tokenizer that need no download."""

from importlib.resources import files
from typing import Any

from torchtune_agent.data.dataset import AgentSFTDataset
from torchtune_agent.data.templates import ChatTemplateTokenizer
from torchtune_agent.errors import UserError


def toolworld_tokenizer(max_seq_len: int | None = None) -> ChatTemplateTokenizer:
    """The 2,048-token byte-level BPE with a ChatML template that ships with the package."""
    return ChatTemplateTokenizer(str(files("torchtune_agent.toolworld") / "tokenizer"), max_seq_len=max_seq_len)


def toolworld_dataset(
    tokenizer: Any,
    *,
    split: str = "train",
    num_tasks: int = 1000,
    num_tools: int = 200,
    seed: int = 0,
    first_tool: int = 0,
    packed: bool = False,
    enable_token_classification: bool = True,
    train_on_tool_calls_only: bool = False,
    train_on_reasoning_only: bool = False,
) -> AgentSFTDataset:
    """Gold conversations of `num_tasks` ToolWorld tasks.

    Args:
        tokenizer: as for AgentSFTDataset.
        split: "train", "validation" or "test"; they share neither tasks nor wordings.
        num_tasks: how many conversations.
        num_tools: how many tools the world has.
        seed: of the world.
        first_tool: the number of its first tool: worlds of the same seed share no tool where their numbers do not meet.
        packed: see AgentSFTDataset, like the arguments after it.
    """
    from torchtune_agent.toolworld import ToolWorld

    if split not in ("train", "validation", "test"):
        raise UserError(f"dataset.split={split}: must be 'train', 'validation' or 'test'.")
    return AgentSFTDataset(
        tokenizer,
        source=ToolWorld(num_tools=num_tools, seed=seed, first_tool=first_tool).conversations(split, num_tasks),
        packed=packed,
        enable_token_classification=enable_token_classification,
        train_on_tool_calls_only=train_on_tool_calls_only,
        train_on_reasoning_only=train_on_reasoning_only,
    )
