"""OnlineContinualLearner: experience replay for any training loop, by three calls a step.

    learner = OnlineContinualLearner(buffer_size=2048, replay_ratio=0.25)
    for batch in data:
        train_step(learner.mix_with_replay(batch))
        learner.update_buffer(batch)

A batch is either a mapping of equally long columns (lists, arrays, or tensors with one row per sample), or a list of
samples. Samples of a list are mappings with the same keys, or any values, which make up the column "samples".
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchtune_agent.continual.buffer import ReplayBuffer
from torchtune_agent.continual.held import NUM_CLASSES
from torchtune_agent.continual.quota import Quota
from torchtune_agent.data.token_class import TokenClass
from torchtune_agent.errors import UserError

_SAMPLES = "samples"
Columns = Mapping[str, Any]


@dataclass(frozen=True)
class Mix:
    """What the last call of `mix_with_replay` made: the new samples come first, then the replayed ones."""

    num_new: int
    num_replayed: int
    weights: list[float]  # of all samples in the loss; 1 for new ones
    mean_age: float  # of the replayed: how many samples came since each was offered; 0 where there are none
    slots: np.ndarray  # of the replayed, for `set_importance`


class OnlineContinualLearner:
    """Keeps some of the samples of a stream and mixes them into its later batches.

    Args:
        buffer_size: the most samples that are kept.
        replay_ratio: the replayed samples' share of a mixed batch, in [0, 1): with 0.25, one comes with three new ones.
            It is exact over many batches, however small. While the buffer holds fewer than are due, all of them are
            replayed and the rest is not made up for later.
        selection_strategy: a name of `buffer.STRATEGIES`.
        max_bytes, spill_to, seed, threshold_ratio: see ReplayBuffer.
        beta_samples: after so many new samples the weights of `prioritized` and `ssis` correct their bias in full.
    """

    def __init__(
        self,
        buffer_size: int = 2048,
        replay_ratio: float = 0.25,
        selection_strategy: str = "reservoir",
        *,
        max_bytes: int | None = None,
        spill_to: str | Path | None = None,
        seed: int = 0,
        threshold_ratio: float = 1.0,
        beta_samples: int = 100_000,
    ) -> None:
        self.buffer = ReplayBuffer(
            buffer_size,
            strategy=selection_strategy,
            max_bytes=max_bytes,
            spill_to=spill_to,
            seed=seed,
            threshold_ratio=threshold_ratio,
        )
        if beta_samples < 1:
            raise UserError(f"beta_samples={beta_samples}: must be at least 1.")
        self._quota = Quota(replay_ratio)
        self._beta_samples = beta_samples
        self._num_draws = self._num_new = 0
        self.last_mix = Mix(0, 0, [], 0.0, np.zeros(0, np.int64))

    def mix_with_replay(self, batch: Columns | Sequence[Any]) -> dict[str, Any]:
        """The columns of the batch with those of replayed samples after them; `last_mix` tells what is in it."""
        columns, num_new = self._columns(batch)
        due = self._quota.replays(num_new)
        drawn = self._draw(due)
        self._num_new += num_new
        weights = [1.0] * num_new + drawn.weights.tolist()
        age = float(drawn.ages.mean()) if len(drawn.ages) else 0.0
        self.last_mix = Mix(num_new, len(drawn.samples), weights, age, drawn.slots)
        replayed = [self._as_mapping(sample) for sample in drawn.samples]
        for sample in replayed:
            if set(sample) != set(columns):
                raise UserError(
                    f"batch: has the columns {sorted(columns)}, and a sample of an earlier one has {sorted(sample)}. "
                    "Give every batch the same columns."
                )
        return {key: _joined(key, column, [s[key] for s in replayed]) for key, column in columns.items()}

    def update_buffer(
        self,
        batch: Columns | Sequence[Any],
        *,
        importance: Sequence[float] | None = None,
        tools: Sequence[Sequence[str]] | None = None,
    ) -> None:
        """Offer the batch's samples to the buffer.

        Args:
            batch: of new samples, as it was before it was mixed.
            importance: of every sample; `ssis` needs it.
            tools: of every sample, those it calls; `tool_balanced` needs it, or a column "tools".

        `class_loss` needs a column "token_class".
        """
        columns, size = self._columns(batch)
        for name, given in (("importance", importance), ("tools", tools)):
            if given is not None and len(given) != size:
                raise UserError(f"{name}: has {len(given)} entries, and the batch has {size} samples.")
        tools = columns.get("tools") if tools is None else tools
        classes = columns.get("token_class") if self.buffer.strategy == "class_loss" else None
        bare = set(columns) == {_SAMPLES} and not isinstance(batch, Mapping)
        for i in range(size):
            self.buffer.offer(
                columns[_SAMPLES][i] if bare else {key: column[i] for key, column in columns.items()},
                importance=None if importance is None else importance[i],
                tools=None if tools is None else tools[i],
                class_shares=None if classes is None else class_shares(classes[i]),
            )

    def get_replay_samples(self, n: int) -> list[Any]:
        """`n` samples of the buffer, fewer where it holds fewer; by the strategy's way of drawing."""
        if n < 0:
            raise UserError(f"n={n}: must be 0 or more.")
        return self._draw(n).samples

    def clear_buffer(self) -> None:
        """Give up all samples, and what is owed."""
        self.buffer.clear()
        self._quota.load([0, 1])

    def _draw(self, n: int) -> Any:
        self._num_draws += 1
        return self.buffer.draw(n, key=[self._num_draws], progress=self._num_new / self._beta_samples)

    def _columns(self, batch: Columns | Sequence[Any]) -> tuple[Columns, int]:
        """The batch as columns, and how many samples it has."""
        if isinstance(batch, Mapping):
            lengths = {key: len(column) for key, column in batch.items()}
            if len(set(lengths.values())) != 1:
                raise UserError(f"batch: its columns must be equally long, one entry per sample; they have {lengths}.")
            columns, size = batch, next(iter(lengths.values()))
        else:
            samples = [self._as_mapping(sample) for sample in batch]
            keys = list(samples[0]) if samples else []
            if any(set(sample) != set(keys) for sample in samples):
                raise UserError("batch: its samples have different keys. Give all of them the same.")
            columns, size = {key: [sample[key] for sample in samples] for key in keys}, len(samples)
        if size > self.buffer.num_samples:
            raise UserError(
                f"buffer_size={self.buffer.num_samples}: is smaller than a batch of {size} samples. "
                "Raise it to many batches, or nothing old is left to replay."
            )
        return columns, size

    @staticmethod
    def _as_mapping(sample: Any) -> Mapping[str, Any]:
        return sample if isinstance(sample, Mapping) else {_SAMPLES: sample}

    def state_dict(self) -> dict[str, Any]:
        """The buffer and what is owed: JSON text and tensors, nothing that needs pickle."""
        own = {"carried": self._quota.state(), "num_draws": self._num_draws, "num_new": self._num_new}
        return {"learner": json.dumps(own), "buffer": self.buffer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        own = json.loads(state["learner"])
        self.buffer.load_state_dict(state["buffer"])
        self._quota.load(own["carried"])
        self._num_draws, self._num_new = own["num_draws"], own["num_new"]


def class_shares(token_class: Any) -> np.ndarray:
    """[token classes]: the share of a sample's trained tokens that is of each."""
    counts = np.bincount(np.asarray(token_class, np.int64).reshape(-1), minlength=NUM_CLASSES).astype(float)
    counts[TokenClass.IGNORED] = 0.0
    return counts / max(1.0, counts.sum())


def _joined(key: str, column: Any, more: list[Any]) -> Any:
    """A column with more entries at its end, of the type it has."""
    if not more:
        return column
    if isinstance(column, torch.Tensor | np.ndarray):
        rows = [torch.as_tensor(row) if isinstance(column, torch.Tensor) else np.asarray(row) for row in more]
        wrong = next((row.shape for row in rows if row.shape != column.shape[1:]), None)
        if wrong is not None:
            raise UserError(
                f"batch: the rows of '{key}' have the shape {tuple(column.shape[1:])}, and a replayed one has "
                f"{tuple(wrong)}. Mix lists of rows, and pad the mixed batch."
            )
        if isinstance(column, torch.Tensor):
            return torch.cat([column, torch.stack([row.to(column) for row in rows])])  # pyright: ignore
        return np.concatenate([column, np.stack(rows)]).astype(column.dtype)
    return [*column, *more]
