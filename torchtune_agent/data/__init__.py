"""From records to batches: formats, templates, token classes, packing, order."""

from torchtune_agent.data.collate import Batch, Collator
from torchtune_agent.data.dataset import IGNORE_INDEX, AgentSFTDataset, AgentSFTTransform
from torchtune_agent.data.loader import BatchSource, SampleLoader, StepPlan
from torchtune_agent.data.quarantine import DataReport
from torchtune_agent.data.templates import ChatTemplateTokenizer, chat_template_tokenizer
from torchtune_agent.data.token_class import GROUPS, TokenClass
from torchtune_agent.data.toolworld import toolworld_dataset, toolworld_tokenizer

__all__ = [
    "GROUPS",
    "IGNORE_INDEX",
    "AgentSFTDataset",
    "AgentSFTTransform",
    "Batch",
    "BatchSource",
    "ChatTemplateTokenizer",
    "Collator",
    "DataReport",
    "SampleLoader",
    "StepPlan",
    "TokenClass",
    "chat_template_tokenizer",
    "toolworld_dataset",
    "toolworld_tokenizer",
]
