"""The conversations of a configured dataset, read a second time: for what tokens do not tell any more."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from torchtune_agent.config import component
from torchtune_agent.data.conversation import Conversation
from torchtune_agent.data.dataset import AgentSFTDataset
from torchtune_agent.data.formats import FORMATS, convert
from torchtune_agent.data.reasons import BadRecord
from torchtune_agent.data.sources import Record, read_records
from torchtune_agent.data.toolworld import toolworld_dataset, toolworld_records
from torchtune_agent.data.validate import check

_NUM_WITHOUT_SOURCE = 1000  # conversations after which data is taken to name none


@dataclass(frozen=True)
class Reread:
    """A conversation and where its record stands."""

    where: str
    conversation: Conversation


def reread(section: DictConfig, key: str) -> Iterator[Reread]:
    """The sound conversations of the dataset that `section` describes; none of datasets that are not ours, or that
    read their records with a message transform."""
    options: dict[str, Any] = OmegaConf.to_container(section, resolve=True)  # pyright: ignore[reportAssignmentType]
    format = options.get("format", "auto")
    if format != "auto" and format not in FORMATS:
        format = component(format, f"{key}.format")
    for record in _records(options, key):
        if record.problem is None:
            try:
                conversation = convert(record.data, format, options.get("column_map"))
                check(conversation)
            except BadRecord:
                continue
            yield Reread(record.where, conversation)


def _records(options: dict[str, Any], key: str) -> Iterator[Record]:
    made = component(options["_component_"], key)
    if made is toolworld_dataset:
        own = {name: options[name] for name in ("split", "num_tasks", "num_tools", "seed") if name in options}
        yield from read_records(toolworld_records(**own))
    elif made is AgentSFTDataset and options.get("message_transform") is None:
        yield from read_records(
            options.get("source", "json"),
            options.get("data_files"),
            options.get("split", "train"),
            options.get("load_dataset_kwargs"),
        )


def count_sources(conversations: Iterable[Reread], left_out: Collection[str]) -> Counter[str]:
    """Conversations of every `source` that metadata names, without those whose place is among `left_out`."""
    sources: Counter[str] = Counter()
    for number, item in enumerate(conversations, start=1):
        if item.where not in left_out:
            sources[str(item.conversation.metadata.get("source", ""))] += 1
        if number == _NUM_WITHOUT_SOURCE and set(sources) == {""}:
            break
    return Counter() if set(sources) <= {""} else sources
