"""Training data in the order of a curriculum: a BatchSource whose order depends on what the model finds hard."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchtune.modules import TransformerDecoder

from torchtune_agent.data.collate import Batch, Collator
from torchtune_agent.data.loader import SampleLoader
from torchtune_agent.selection.curriculum import Curriculum
from torchtune_agent.selection.pooled import lengths_of, pool_of_data
from torchtune_agent.selection.scores import read_pool
from torchtune_agent.selection.scoring import ScoringOptions, score
from torchtune_agent.training import Run

Measure = Callable[[int], np.ndarray]  # after so many steps: the difficulty of every sample


class PacedLoader:
    """The rows of `loader` in the order of `curriculum`.

    A stretch of the order follows from the difficulties at its beginning; it ends where they are measured anew. So all
    that a run must remember is the beginning of the stretch it is in.
    """

    def __init__(
        self, loader: SampleLoader, curriculum: Curriculum, measure: Measure, *, epochs: int, max_steps: int | None
    ) -> None:
        """`max_steps`: of an epoch."""
        self._loader, self._curriculum, self._measure = loader, curriculum, measure
        rows = loader.num_rows
        self._per_epoch = rows if max_steps is None else min(rows, max_steps * loader.rows_per_step)
        self._total = epochs * self._per_epoch
        self._begin: int | None = None  # of the stretch, in rows of the run
        self._difficulty = np.empty(0)  # of its rows
        self._times_trained = np.zeros(rows, np.int64)  # each row, before it

    @property
    def num_rows(self) -> int:
        return self._loader.num_rows

    @property
    def rows_per_step(self) -> int:
        return self._loader.rows_per_step

    def fingerprint(self) -> str:
        return self._loader.fingerprint()

    def epoch(self, number: int, first_row: int = 0) -> Iterator[list[Batch]]:
        place = number * self._per_epoch + first_row
        rows, times = self._stretch(place)
        for start in range(first_row, self.num_rows, self.rows_per_step):
            if self._is_over(place):
                self._begin_stretch(place, times)
                rows, times = self._stretch(place)
            size = min(self.rows_per_step, self.num_rows - start)
            yield self._loader.step(list(islice(rows, size)))
            place += size

    def _is_over(self, place: int) -> bool:
        every = self._curriculum.rescore_every_n_steps
        assert self._begin is not None
        return every is not None and self._step(place) - self._step(self._begin) >= every

    def _step(self, place: int) -> int:
        """Steps of the run until `place`; an epoch's last is short."""
        epochs, rows = divmod(place, self._per_epoch)
        return epochs * -(-self._per_epoch // self.rows_per_step) + -(-rows // self.rows_per_step)

    def _begin_stretch(self, place: int, times_trained: np.ndarray) -> None:
        samples = self._measure(self._step(place))
        rows = [samples[self._loader.row(row)] for row in range(self.num_rows)]
        known = [row[~np.isnan(row)] for row in rows]
        combine = np.sum if self._curriculum.by == "length" else np.mean  # of samples that share a packed row
        self._difficulty = np.array([combine(row) if len(row) else np.nan for row in known])
        self._begin, self._times_trained = place, times_trained.copy()

    def _stretch(self, place: int) -> tuple[Iterator[int], np.ndarray]:
        """The rows from `place` on, and how often each was trained before the next."""
        if self._begin is None:
            self._begin_stretch(place, self._times_trained)
        assert self._begin is not None
        times = self._times_trained.copy()
        rows = self._curriculum.rows(self._difficulty, times, self._begin, self._total, self._loader.seed)
        for _ in range(place - self._begin):
            next(rows)
        return rows, times

    def state_dict(self) -> dict[str, Any]:
        return {
            "begin": self._begin,
            "difficulty": torch.from_numpy(self._difficulty.copy()),
            "times_trained": torch.from_numpy(self._times_trained.copy()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if len(state_dict["times_trained"]) != self.num_rows:
            return  # the user has put other data in the place of those: it begins anew
        self._begin = state_dict["begin"]
        self._difficulty = state_dict["difficulty"].numpy().copy()
        self._times_trained = state_dict["times_trained"].numpy().copy()


def paced(run: Run, curriculum: Curriculum, loader: SampleLoader, model: TransformerDecoder) -> PacedLoader:
    """`loader` in the order of `curriculum`; the `model` that is trained says what is hard."""
    folder = run.settings.output_dir / "curriculum"
    return PacedLoader(
        loader,
        curriculum,
        lambda step: _difficulty(run, curriculum, loader, model, folder, step),
        epochs=run.settings.epochs,
        max_steps=run.settings.max_steps_per_epoch,
    )


def _difficulty(
    run: Run, curriculum: Curriculum, loader: SampleLoader, model: TransformerDecoder, folder: Path, step: int
) -> np.ndarray:
    if curriculum.by == "length":
        return np.asarray(lengths_of(loader.dataset), np.float64)
    if curriculum.scores_from is not None and step == 0:
        return pool_of_data(loader.dataset, curriculum.scores_from, "curriculum.scores_from").loss(curriculum.score_on)
    run.say(f"curriculum    step {step}: the model scores {len(loader.dataset):,} samples")
    collator = Collator(pad_id=loader.collator.pad_id, special_ids=loader.collator.special_ids)
    options = ScoringOptions(curriculum.score_batch_size, embedding_dim=1)
    path = score(model, loader.dataset, collator, folder / f"step_{step}", run.world, options, replace_others=True)
    return read_pool(path).loss(curriculum.score_on)
