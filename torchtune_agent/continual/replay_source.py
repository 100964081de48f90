"""The data seam of replay: the rows of a new phase with rows of samples from a buffer among them, at an exact ratio.

A mixed epoch is one sequence of rows, which belongs to the run: whether row j is new or replayed follows from the ratio
and j, and what is replayed there from the seed, j and the new rows before it. Every rank walks the whole sequence, but
reads only the samples of its own rows, so all of them keep the same buffer without communication.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from torchtune_agent.continual.buffer import ReplayBuffer
from torchtune_agent.continual.learner import class_shares
from torchtune_agent.continual.mixing import INFO, Mixer, Pick, info_of, kept_info
from torchtune_agent.continual.quota import as_share
from torchtune_agent.data.collate import Batch, Collator
from torchtune_agent.data.joined import JoinedDataset, SampleInfo
from torchtune_agent.data.loader import StepPlan
from torchtune_agent.data.packing import pack
from torchtune_agent.errors import UserError

_KEPT = ("tokens", "labels", "token_class", "call_index", "weights")


class ReplaySource:
    """A BatchSource of one phase.

    Args:
        dataset: the samples of all phases of the run so far, this one included.
        samples: which of them are this phase's.
        collator, plan: see SampleLoader.
        buffer: goes from phase to phase. This phase's samples are offered to it in the first epoch.
        replay_ratio: the replayed rows' share of all rows, in [0, 1); 0 where there is nothing to replay yet.
        shuffle, seed: of the new rows.
        epochs: that will be trained, for the weights of drawing by importance.
        importance: of new samples given by number, the same on every rank; `ssis` needs it.
    """

    def __init__(
        self,
        dataset: JoinedDataset,
        samples: Sequence[int],
        collator: Collator,
        plan: StepPlan,
        buffer: ReplayBuffer,
        *,
        replay_ratio: float,
        shuffle: bool,
        seed: int,
        epochs: int = 1,
        importance: Callable[[Sequence[int]], Sequence[float]] | None = None,
    ) -> None:
        self._dataset, self._samples, self._collator, self._plan = dataset, samples, collator, plan
        self._mixer = Mixer(collator, plan, self._resolved, self._info)
        self.buffer = buffer
        self._share = as_share(replay_ratio)
        self._shuffle, self._seed, self._epochs, self._importance = shuffle, seed, epochs, importance
        if buffer.num_samples < plan.rows_per_step:
            raise UserError(
                f"buffer_size={buffer.num_samples}: is smaller than a step's {plan.rows_per_step} rows. "
                "Raise it to many steps."
            )
        if buffer.needs == "importance" and importance is None:
            raise UserError(f"selection_strategy={buffer.strategy}: needs the importance of every new sample.")
        if len(samples) == 0:
            raise UserError("stream: a phase has no samples. Check its data.")
        self._rows = [[i] for i in samples]
        if collator.pack_to is not None:
            lengths = np.array([self._length(i) for i in samples])
            self._rows = [[samples[i] for i in row] for row in pack(lengths, collator.pack_to)]
        self.walked = (0, 0)  # the epoch, and how many of its rows
        self.picks: list[Pick] = []  # of the step that was yielded last, over all ranks

    # What the Trainer asks for. Nothing else in this module knows how it does.

    @property
    def num_rows(self) -> int:
        """As many as it takes until every new row has come."""
        return int((len(self._rows) - 1) / (1 - self._share)) + 1

    @property
    def rows_per_step(self) -> int:
        return self._plan.rows_per_step

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_rows // self.rows_per_step)

    def epoch(self, number: int, first_row: int = 0) -> Iterator[list[Batch]]:
        """This rank's micro-batches from `first_row` on. When a step is yielded, the buffer has seen its rows."""
        if self._share and len(self.buffer) == 0:
            raise UserError(f"replay_ratio={float(self._share)}: the buffer is empty. Set 0 for the first phase.")
        epoch, walked = self.walked
        start = walked if epoch == number else 0
        if start > first_row or epoch > number:
            raise UserError(
                f"replay: the buffer has seen epoch {epoch} up to row {walked}, and epoch {number} is to go on at row "
                f"{first_row}. Load the state it had there."
            )
        for _ in self._walk(number, start, first_row):
            pass
        for begin in range(first_row, self.num_rows, self.rows_per_step):
            end = min(begin + self.rows_per_step, self.num_rows)
            rows = list(self._walk(number, begin, end))
            self.picks = [pick for row in rows for pick in row]
            yield self._mixer.step(rows)

    def order(self, epoch: int) -> np.ndarray:
        """Of the new rows."""
        if not self._shuffle:
            return np.arange(len(self._rows))
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))

    def num_replayed(self, num_rows: int) -> int:
        """Replayed rows among the first `num_rows`."""
        return num_rows * self._share.numerator // self._share.denominator

    def _walk(self, epoch: int, begin: int, end: int) -> Iterator[list[Pick]]:
        """The rows from `begin` to `end`; new ones are offered to the buffer as they pass."""
        order = self.order(epoch)
        for row in range(begin, end):
            before = self.num_replayed(row)
            if self.num_replayed(row + 1) > before:
                yield self._replayed(epoch, row)
            else:
                samples = self._rows[order[row - before]]
                if epoch == 0:
                    self._offer(samples)
                yield [Pick(i) for i in samples]
            self.walked = (epoch, row + 1)

    def _replayed(self, epoch: int, row: int) -> list[Pick]:
        """One sample, or as many as fit into a packed sequence."""
        progress = (epoch + row / self.num_rows) / self._epochs
        picks: list[Pick] = []
        room = self._collator.pack_to
        while True:
            key = [self._seed, self._samples[0], epoch, row, len(picks)]
            drawn = self.buffer.draw(1, key=key, progress=progress)
            age = int(drawn.ages[0])
            number = self.buffer.num_offered - age
            pick = Pick(drawn.samples[0], float(drawn.weights[0]), age, int(drawn.slots[0]), number)
            if room is None:
                return [pick]
            length = self._length(pick.sample)
            if length > room and not picks:
                raise UserError(
                    f"replay: a sample of an earlier run has {length} tokens, and a packed sequence has {room}. "
                    f"Set tokenizer.max_seq_len={length} or more."
                )
            if length > room:
                return picks
            picks.append(pick)
            room -= length

    def _offer(self, samples: Sequence[int]) -> None:
        scores = None if self._importance is None else self._importance(samples)
        for i, sample in enumerate(samples):
            needs = self.buffer.needs
            self.buffer.offer(
                sample,
                importance=None if scores is None else float(scores[i]),
                tools=self._dataset.info(sample).tools if needs == "tools" else None,
                class_shares=class_shares(self._dataset[sample]["token_class"]) if needs == "class_shares" else None,
            )

    def _length(self, sample: int | Mapping[str, Any]) -> int:
        if isinstance(sample, int) and self._dataset.lengths is not None:
            return int(self._dataset.lengths[sample])
        return len(self._resolved(sample)["tokens"])

    def _resolved(self, sample: int | Mapping[str, Any]) -> Mapping[str, Any]:
        return self._dataset[sample] if isinstance(sample, int) else sample

    def _info(self, sample: int | Mapping[str, Any]) -> SampleInfo:
        if isinstance(sample, int):
            return self._dataset.info(sample)
        return info_of(sample)

    def make_portable(self) -> None:
        """Put the samples themselves into the buffer, in the place of their numbers in this run's data, so that a run
        with other data can go on with it."""

        def resolve(sample: int | Mapping[str, Any]) -> Mapping[str, Any]:
            if not isinstance(sample, int):
                return sample
            found, info = self._dataset[sample], self._dataset.info(sample)
            kept = {key: np.asarray(found[key]) for key in _KEPT if key in found}
            return kept | {INFO: kept_info(info)}

        self.buffer.replace_samples(resolve)
