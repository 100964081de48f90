"""The coreset of a training run: what the `coreset` section of a config means, from the pool to the loader of a subset.

It stands in front of the loop as any data does: scores (or reads) the pool, selects, writes what it did, and hands back
a loader of what was picked.
"""

import gc
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ConfigDict

from torchtune_agent.config import check_keys
from torchtune_agent.data import Collator, SampleLoader
from torchtune_agent.data.dataset import IGNORE_INDEX
from torchtune_agent.data.joined import JoinedDataset, SampleInfo
from torchtune_agent.data.token_text import vocabulary
from torchtune_agent.distributed import together
from torchtune_agent.errors import UserError
from torchtune_agent.losses.output import check_output
from torchtune_agent.selection.duplicates import signatures
from torchtune_agent.selection.embedding import token_embeddings
from torchtune_agent.selection.options import Options
from torchtune_agent.selection.pool import Pool
from torchtune_agent.selection.scores import pool_from_ledger, read_pool, unique_ids
from torchtune_agent.selection.scoring import ScoringOptions, score
from torchtune_agent.selection.selecting import select
from torchtune_agent.selection.strategies import NEEDS
from torchtune_agent.selection.writing import read_rows, write_selection
from torchtune_agent.training import FullParameters, Run
from torchtune_agent.training.parallel import prepare
from torchtune_agent.training.saving import Saver
from torchtune_agent.training.settings import checked


class SelectionDone(Exception):
    """`coreset.only_select=True`: there is nothing more to do."""


class CoresetSettings(BaseModel):
    """The keys of the `coreset` section; those that are not here are those of `Options`.

    `scores_from`: a scores.parquet, or the ledger of a training run (logs/sample_losses), instead of scoring.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    strategy: str = "hybrid"
    target_size: int | str = "30%"
    loss_ratio: float = 0.6
    score_on: str = "overall"
    dedup_similarity: float | None = None
    dedup_distance: float | None = None
    loss_cap_quantile: float | None = None
    min_per_tool: int = 0
    min_per_source: int = 0
    max_share_per_tool: float | None = None
    max_share_per_source: float | None = None
    only_select: bool = False
    scores_from: Path | None = None
    score_batch_size: int = 8
    batches_per_part: int = 32
    embedding_dim: int = 256

    @classmethod
    def from_config(cls, section: DictConfig | None) -> "CoresetSettings":
        section = OmegaConf.create() if section is None else section
        check_keys(section, set(cls.model_fields), "coreset.")
        values: Any = OmegaConf.to_container(section, resolve=True)
        return checked(cls, values, "coreset.")

    def options(self, seed: int) -> Options:
        names = set(Options.__dataclass_fields__) & set(type(self).model_fields)
        try:
            return Options(**{name: getattr(self, name) for name in names}, seed=seed)
        except UserError as error:
            raise UserError(f"coreset.{error}") from error


class Subset:
    """Some samples of a data set, in its order."""

    def __init__(self, dataset: JoinedDataset, rows: np.ndarray) -> None:
        self._dataset, self._rows = dataset, rows.tolist()
        self.lengths = None if dataset.lengths is None else dataset.lengths[rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._dataset[self._rows[index]]

    def info(self, index: int) -> SampleInfo:
        return self._dataset.info(self._rows[index])


def coreset_loader(run: Run, settings: CoresetSettings, loader: SampleLoader, tokenizer: Any = None) -> SampleLoader:
    """A loader of what is selected from the samples of `loader`. Every rank calls it.

    With a `tokenizer`, the page of the selection shows what samples read like.
    """
    assert run.settings.seed is not None
    options = settings.options(run.settings.seed)
    pool, folder = loader._dataset, run.settings.output_dir / "coreset"
    if run.settings.resume_from_checkpoint:
        run.say(f"coreset       that of the run which is resumed: {folder / 'selection.json'}")
    else:
        scores = _scores(run, settings, options, loader, folder)
        together(lambda: _select(run, options, pool, scores, folder, tokenizer) if run.world.is_main else None)
        run.world.barrier()
    if settings.only_select:
        raise SelectionDone
    rows = read_rows(folder / "selection.json", _ids(pool))
    subset = JoinedDataset({"coreset": Subset(pool, rows)})
    chosen = SampleLoader(subset, loader._collator, loader._plan, shuffle=loader._shuffle, seed=loader._seed)
    needed = loader._plan.rows_per_step
    if chosen.num_rows < needed:
        raise UserError(
            f"coreset.target_size={settings.target_size}: makes {chosen.num_rows} sequences, fewer than a step needs "
            f"({needed}). Raise it, or lower batch_size or gradient_accumulation_steps."
        )
    return chosen


def _scores(run: Run, settings: CoresetSettings, options: Options, loader: SampleLoader, folder: Path) -> Path | None:
    """The file or ledger with the scores; None where the strategy needs no model."""
    if settings.scores_from is not None:
        return settings.scores_from
    if not {"loss", "entropy", "error"} & set(NEEDS[options.strategy]) and options.loss_cap_quantile is None:
        return None
    scoring = ScoringOptions(settings.score_batch_size, settings.batches_per_part, settings.embedding_dim)
    model = FullParameters().build(run.cfg, run.settings)
    check_output(model)
    weights = Saver(run.cfg, run.settings, run.world).load_weights(model)
    prepare(model, run.cfg, run.settings, run.world, weights)
    del weights
    collator = Collator(pad_id=loader._collator.pad_id, special_ids=loader._collator.special_ids)
    path = score(model, loader._dataset, collator, folder, run.world, scoring)
    del model
    gc.collect()  # a sharded model is a cycle, and the one to be trained needs its memory
    return path


def _select(run: Run, options: Options, pool: JoinedDataset, scores: Path | None, folder: Path, tokenizer: Any) -> None:
    known = _pool(pool, scores, needs_embeddings="embeddings" in NEEDS[options.strategy])
    signed = None
    if options.dedup_similarity is not None:
        signed = signatures(_Tokens(pool), options.seed)  # pyright: ignore[reportArgumentType]
    try:
        selection = select(known, options, signatures=signed, device=str(run.world.device))
    except UserError as error:
        raise UserError(f"coreset: {error}") from error
    text = None if tokenizer is None else _Reader(pool, tokenizer)
    chosen, page = write_selection(selection, folder, text)
    run.say(
        f"coreset       {len(selection.rows):,} of {len(pool):,} samples by {options.strategy}, "
        f"{len(selection.duplicates):,} near-duplicates, {len(selection.capped):,} suspected label errors, "
        f"correlation with length {selection.length_correlation():+.2f}"
    )
    for line in (*selection.notes, f"why: {chosen}", f"page: {page}"):
        run.say(f"              {line}")


class _Reader:
    """What a sample reads like, from a little before what is trained: what comes first is alike in most."""

    def __init__(self, dataset: JoinedDataset, tokenizer: Any) -> None:
        self._dataset, self._vocabulary = dataset, vocabulary(tokenizer)

    def __call__(self, row: int) -> str:
        sample = self._dataset[row]
        trained = np.flatnonzero(np.asarray(sample["labels"]) != IGNORE_INDEX)
        start = max(0, int(trained[0]) - 60) if len(trained) else 0
        tokens = np.asarray(sample["tokens"])[start : start + 400].tolist()
        return b"".join(map(self._vocabulary.text_of, tokens)).decode(errors="replace")


class _Tokens:
    """The tokens of a data set as a sequence."""

    def __init__(self, dataset: JoinedDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int) -> np.ndarray:
        if row >= len(self._dataset):
            raise IndexError(row)
        return np.asarray(self._dataset[row]["tokens"])


def _ids(dataset: JoinedDataset) -> list[str]:
    return unique_ids([dataset.info(row).where for row in range(len(dataset))])


def _pool(dataset: JoinedDataset, scores: Path | None, *, needs_embeddings: bool) -> Pool:
    ids = _ids(dataset)
    if scores is not None and not scores.is_dir():
        known = read_pool(scores)
        if list(known.ids) != ids:
            raise UserError(
                f"coreset.scores_from={scores}: its samples are not those of dataset ({len(known):,} scored, "
                f"{len(ids):,} in the data, or in another order). Use the data that was scored, or score it anew."
            )
        return known
    infos = [dataset.info(row) for row in range(len(dataset))]
    tools, sources = [info.tools for info in infos], [info.source for info in infos]
    lengths = dataset.lengths
    if lengths is None:
        lengths = np.array([len(dataset[row]["tokens"]) for row in range(len(dataset))])
    if scores is not None:
        return pool_from_ledger(scores, ids, lengths, tools, sources)
    vectors = token_embeddings(_Tokens(dataset)) if needs_embeddings else None  # pyright: ignore[reportArgumentType]
    return Pool(ids, lengths, embeddings=vectors, tools=tools, sources=sources)
