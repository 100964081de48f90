"""Numbers per tool, per data source and per sample: what the means of a class hide.

They need names, which only the host knows. So a micro-batch leaves small tables on the device; they are fetched where
a step is logged anyway, and added up by name when they are asked for.
"""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pyarrow
import torch
from pyarrow import parquet

from torchtune_agent.data.collate import Batch
from torchtune_agent.data.joined import SampleInfo
from torchtune_agent.data.token_class import GROUPS, TokenClass
from torchtune_agent.metrics.calls import call_table
from torchtune_agent.metrics.table import COLUMNS, NUM_CLASSES

By = Literal["tool", "source"]
LEDGER = "sample_losses"  # the folder of logs with a line for every sample, class and step
_NLL = COLUMNS.index("nll")
_ROWS_PER_FILE = 1_000_000
_SCHEMA = pyarrow.schema(
    [
        ("sample", pyarrow.string()),
        ("step", pyarrow.int64()),
        ("token_class", pyarrow.string()),
        ("tokens", pyarrow.int64()),
        ("loss", pyarrow.float64()),
    ]
)


@dataclass
class Group:
    """Sums of one tool (its calls) or of one source (everything but end-of-turn tokens)."""

    tokens: float = 0
    nll: float = 0
    calls: float = 0
    exact_calls: float = 0
    exact_names: float = 0

    def add(self, other: "Group") -> None:
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))

    def row(self) -> dict[str, float]:
        """Means; of calls only where there are some."""
        calls = (
            {"exact": self.exact_calls / self.calls, "name_exact": self.exact_names / self.calls} if self.calls else {}
        )
        return {"tokens": self.tokens, "loss": self.nll / self.tokens, "calls": self.calls, **calls}


Groups = dict[tuple[By, str], Group]


@dataclass
class _MicroBatch:
    step: int
    samples: list[SampleInfo]
    first_calls: list[int]
    of_calls: torch.Tensor  # [calls, CALL_COLUMNS]
    of_samples: torch.Tensor  # [samples, classes, (tokens, nll)]


class Detail:
    """Collects one rank's numbers.

    Args:
        by: what to tell apart.
        ledger: a folder for a line per sample, class and step, as Parquet files; None: none are kept.
        rank: names this rank's files.
    """

    def __init__(self, by: Sequence[By] = (), ledger: Path | None = None, rank: int = 0) -> None:
        self._by, self._ledger, self._rank = tuple(by), ledger, rank
        self._waiting: list[_MicroBatch] = []
        self._groups: Groups = {}
        self._lines: list[tuple[str, int, str, int, float]] = []

    def __bool__(self) -> bool:
        return bool(self._by) or self._ledger is not None

    @torch.no_grad()
    def add(self, tokens: torch.Tensor, batch: Batch, step: int) -> None:
        """Add a measured micro-batch: `tokens` [supervised tokens, COLUMNS]."""
        assert batch.info is not None, "the data source names its samples"
        place = batch.sample_index.flatten()[batch.supervised].long() * NUM_CLASSES
        place += batch.token_class.flatten()[batch.supervised].long()
        nll = tokens[:, _NLL].double()
        num_samples = len(batch.first_calls) - 1
        of_samples = nll.new_zeros(num_samples * NUM_CLASSES, 2)
        of_samples.index_add_(0, place, torch.stack([torch.ones_like(nll), nll], 1))
        of_samples = of_samples.view(num_samples, NUM_CLASSES, 2)
        self._waiting.append(_MicroBatch(step, batch.info(), batch.first_calls, call_table(tokens, batch), of_samples))

    def fetch(self) -> None:
        """Bring what was added to the host: once for all micro-batches since the last time."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        sizes = [part.numel() for one in waiting for part in (one.of_calls, one.of_samples)]
        flat = torch.cat([part.flatten() for one in waiting for part in (one.of_calls, one.of_samples)]).cpu()
        parts = iter(flat.split(sizes))
        for one in waiting:
            one.of_calls = next(parts).view_as(one.of_calls)
            one.of_samples = next(parts).view_as(one.of_samples)
            self._group(one)
            if self._ledger is not None:
                self._lines += _lines(one)
        if len(self._lines) >= _ROWS_PER_FILE:
            self.write()

    def _group(self, batch: _MicroBatch) -> None:
        calls = [
            Group(t, nll, 1, wrong == 0, name_wrong == 0) for t, nll, wrong, _, name_wrong in batch.of_calls.tolist()
        ]
        of_metrics = batch.of_samples[:, list(GROUPS["overall"])].sum(1).tolist()
        for number, sample in enumerate(batch.samples):
            own = calls[batch.first_calls[number] : batch.first_calls[number + 1]]
            trained = [(name, call) for name, call in zip(sample.tools, own, strict=False) if call.tokens]
            if "tool" in self._by:
                for name, call in trained:
                    self._groups.setdefault(("tool", name), Group()).add(call)
            if "source" in self._by:
                group = self._groups.setdefault(("source", sample.source), Group())
                group.add(Group(*of_metrics[number]))
                for _, call in trained:
                    group.add(Group(0, 0, *astuple(call)[2:]))

    def state_dict(self) -> dict[str, Any]:
        """The sums that are not taken yet; everything that was added must be fetched and written."""
        assert not self._waiting and not self._lines
        return {"groups": [[*key, *astuple(group)] for key, group in self._groups.items()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with these sums too."""
        for by, name, *sums in state_dict["groups"]:
            self._groups.setdefault((by, name), Group()).add(Group(*sums))

    def take(self) -> Groups:
        """What was fetched, by name; it begins anew from here."""
        groups, self._groups = self._groups, {}
        return groups

    def write(self) -> None:
        """Write the ledger's lines to a file of their own."""
        lines, self._lines = self._lines, []
        if self._ledger is None or not lines:
            return
        self._ledger.mkdir(parents=True, exist_ok=True)
        columns = [list(column) for column in zip(*lines, strict=True)]
        table = pyarrow.table(dict(zip(_SCHEMA.names, columns, strict=True)), schema=_SCHEMA)
        parquet.write_table(table, self._ledger / f"steps_{lines[0][1]:08}_rank_{self._rank}.parquet")


def _lines(batch: _MicroBatch) -> list[tuple[str, int, str, int, float]]:
    return [
        (sample.where, batch.step, TokenClass(kind).name.lower(), int(tokens), nll / tokens)
        for sample, classes in zip(batch.samples, batch.of_samples.tolist(), strict=True)
        for kind, (tokens, nll) in enumerate(classes)
        if tokens
    ]


def merged(of_ranks: Iterable[Groups]) -> Groups:
    total: Groups = {}
    for groups in of_ranks:
        for key, group in groups.items():
            total.setdefault(key, Group()).add(group)
    return total


def most_frequent(groups: Groups, by: By, number: int) -> dict[str, dict[str, Any]]:
    """The rows of the tools with the most calls, or of the sources with the most tokens, by name."""
    chosen = [(name, group) for (kind, name), group in groups.items() if kind == by and group.tokens]
    chosen.sort(key=lambda item: (-(item[1].calls if by == "tool" else item[1].tokens), item[0]))
    return {name: group.row() for name, group in chosen[:number]}
