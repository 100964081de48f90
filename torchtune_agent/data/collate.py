"""Samples to a Batch: padding or packing, and the one place where labels are shifted.

Class and call travel with the label they describe: entry t of every [batch, sequence] tensor speaks of the
token predicted *at* t, that is, of token t + 1. The last position of every conversation predicts nothing.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from torchtune_agent.data.dataset import IGNORE_INDEX
from torchtune_agent.data.joined import SampleInfo
from torchtune_agent.data.token_class import TokenClass


@dataclass
class Batch:
    """One micro-batch. Counts and indices are made on the host, so that a step need not ask the device."""

    tokens: torch.Tensor  # int64 [batch, sequence]
    labels: torch.Tensor  # int64 [batch, sequence], already shifted, IGNORE_INDEX where nothing is trained
    token_class: torch.Tensor  # uint8 [batch, sequence], class of the label
    call_index: torch.Tensor  # int32 [batch, sequence], call of the label, unique within the batch, -1: none
    sample_index: torch.Tensor  # int32 [batch, sequence], number of the sample in the batch, 0 in padding
    weights: torch.Tensor  # float32 [batch, sequence], weight of the label in the loss, 0 where nothing is trained
    supervised: torch.Tensor  # int64 [num_supervised], flat positions with a label
    num_tokens: int  # without padding
    num_supervised: int
    num_samples: int
    first_calls: list[int]  # of every sample in `call_index`, and one more: how many calls there are
    total_weight: float  # the sum of `weights`
    input_pos: torch.Tensor | None = None  # int64 [batch, sequence], where packed
    seq_lens: list[torch.Tensor] | None = None  # lengths of the documents in every row, where packed
    info: Callable[[], list[SampleInfo]] | None = None  # who the samples are, where the data knows

    def to(self, device: torch.device) -> "Batch":
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Collator:
    """Turns rows into a Batch. A row is a list of samples: one, or those that share a packed sequence.

    `special_ids` are left out of the metrics of samples that come without token classes.
    """

    pad_id: int
    pack_to: int | None = None
    special_ids: frozenset[int] = frozenset()

    def __call__(self, rows: Sequence[Sequence[Mapping[str, Any]]]) -> Batch:
        """`rows` may be empty: then the batch is one padding token that trains nothing, for a rank that has run
        out of samples but must still take part in the step's communication."""
        lengths = [sum(len(sample["tokens"]) for sample in row) for row in rows]
        width = self.pack_to or max(lengths, default=1)
        shape = (max(1, len(rows)), width)
        tokens = np.full(shape, self.pad_id, np.int64)
        labels = np.full(shape, IGNORE_INDEX, np.int64)
        classes = np.zeros(shape, np.uint8)
        calls = np.full(shape, -1, np.int32)
        weights = np.zeros(shape, np.float32)
        positions = np.zeros(shape, np.int64)
        numbers = np.zeros(shape, np.int32)
        first_calls = [0]
        for r, row in enumerate(rows):
            at = 0
            for sample in row:
                size = len(sample["tokens"])
                tokens[r, at : at + size] = sample["tokens"]
                positions[r, at : at + size] = np.arange(size)
                shifted = slice(at, at + size - 1)
                labels[r, shifted] = np.asarray(sample["labels"])[1:]
                classes[r, shifted] = classes_of(sample, self.special_ids)[1:]
                weights[r, shifted] = sample["weights"][1:] if "weights" in sample else 1.0
                numbers[r, shifted] = len(first_calls) - 1
                first_calls.append(_place_calls(calls[r, shifted], sample, first_calls[-1]))
                at += size
        weights[labels == IGNORE_INDEX] = 0.0
        flat = torch.from_numpy(labels).flatten()
        supervised = (flat != IGNORE_INDEX).nonzero().squeeze(1)
        return Batch(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            token_class=torch.from_numpy(classes),
            call_index=torch.from_numpy(calls),
            sample_index=torch.from_numpy(numbers),
            weights=torch.from_numpy(weights),
            supervised=supervised,
            num_tokens=sum(lengths),
            num_supervised=len(supervised),
            num_samples=sum(len(row) for row in rows),
            first_calls=first_calls,
            total_weight=float(weights.sum(dtype=np.float64)),
            input_pos=torch.from_numpy(positions) if self.pack_to else None,
            seq_lens=[_seq_lens(row, width) for row in rows or [[]]] if self.pack_to else None,
        )


def classes_of(sample: Mapping[str, Any], special_ids: Collection[int]) -> np.ndarray:
    """The class of every token; where a sample has none, what its labels tell."""
    if "token_class" in sample:
        return np.asarray(sample["token_class"])
    labels = np.asarray(sample["labels"])
    classes = np.where(labels == IGNORE_INDEX, TokenClass.IGNORED, TokenClass.REASONING)
    return np.where(np.isin(labels, list(special_ids)), TokenClass.SPECIAL, classes)


def _place_calls(out: np.ndarray, sample: Mapping[str, Any], next_call: int) -> int:
    """Write a sample's call numbers, renumbered from `next_call`; returns the next free number."""
    if "call_index" not in sample:
        return next_call
    own = np.asarray(sample["call_index"])
    out[:] = np.where(own[1:] < 0, -1, own[1:] + next_call)
    return next_call + int(own.max(initial=-1)) + 1


def _seq_lens(row: Sequence[Mapping[str, Any]], width: int) -> torch.Tensor:
    """Document lengths that fill the row; the padding is a document of its own."""
    lengths = [len(sample["tokens"]) for sample in row]
    rest = width - sum(lengths)
    return torch.tensor(lengths + [rest] if rest else lengths)
