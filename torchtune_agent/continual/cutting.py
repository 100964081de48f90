"""One data set as a stream of phases: cut by time, which is its order, or by tool."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from torchtune_agent.data.joined import JoinedDataset
from torchtune_agent.errors import UserError

Parts = list[list[int]]  # of every phase, its samples by number


class Cut(BaseModel):
    """The section `stream` where it is no list of names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cut_by: Literal["time", "tool"]
    num_phases: int

    @property
    def names(self) -> list[str]:
        return [f"phase_{number + 1}" for number in range(self.num_phases)]

    def parts(self, train: JoinedDataset, held_out: JoinedDataset, say: Callable[[str], None]) -> tuple[Parts, Parts]:
        """Of both data sets. Phases have equally many samples by time, and equally many tools by tool."""
        if self.cut_by == "time":
            found = tuple(_in_order(range(len(dataset)), self.num_phases) for dataset in (train, held_out))
        else:
            phase_of = _phases_of_tools(train, self.num_phases)
            found = tuple(_by_tool(dataset, phase_of, self.num_phases) for dataset in (train, held_out))
            unknown = len(held_out) - sum(map(len, found[1]))
            if unknown:
                say(
                    f"stream        {unknown} samples of dataset_val call tools that dataset does not, and are left out"
                )
        for key, parts in zip(("dataset", "dataset_val"), found, strict=True):
            empty = [name for name, part in zip(self.names, parts, strict=True) if not part]
            if empty:
                raise UserError(
                    f"stream.num_phases={self.num_phases}: {key} has no samples for {', '.join(empty)}. Make "
                    "fewer phases."
                )
        return found[0], found[1]


def _in_order(samples: Sequence[int], num_phases: int) -> Parts:
    return [part.tolist() for part in np.array_split(np.array(samples, np.int64), num_phases)]


def _tool_of(dataset: JoinedDataset, sample: int) -> str:
    """The one it calls first; "" without a call."""
    return next(iter(dataset.info(sample).tools), "")


def _phases_of_tools(dataset: JoinedDataset, num_phases: int) -> dict[str, int]:
    """Tools in the order in which they come first, cut into equal parts."""
    tools = list(dict.fromkeys(_tool_of(dataset, sample) for sample in range(len(dataset))))
    return {tools[i]: phase for phase, part in enumerate(_in_order(range(len(tools)), num_phases)) for i in part}


def _by_tool(dataset: JoinedDataset, phase_of: dict[str, int], num_phases: int) -> Parts:
    parts: Parts = [[] for _ in range(num_phases)]
    for sample in range(len(dataset)):
        phase = phase_of.get(_tool_of(dataset, sample))
        if phase is not None:
            parts[phase].append(sample)
    return parts
