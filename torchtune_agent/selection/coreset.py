"""The coreset of a training run: what the `coreset` section of a config means, from the pool to the loader of a subset.

It stands in front of the loop as any data does: scores (or reads) the pool, selects, writes what it did, and hands back
a loader of what was picked. A run that goes on takes the selection that it began with.
"""

import gc
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ConfigDict

from torchtune_agent.config import check_keys, redacted
from torchtune_agent.data import Collator, SampleLoader
from torchtune_agent.data.joined import JoinedDataset
from torchtune_agent.data.token_text import is_readable
from torchtune_agent.distributed import on_main, slowly_on_main, together
from torchtune_agent.errors import UserError
from torchtune_agent.selection.duplicates import signatures
from torchtune_agent.selection.embedding import sentence_embeddings
from torchtune_agent.selection.loaded import loaded_model
from torchtune_agent.selection.options import Options
from torchtune_agent.selection.pooled import Reader, Subset, TokenRows, ids_of, pool_of_data, whole_texts
from torchtune_agent.selection.scoring import ScoringOptions, score
from torchtune_agent.selection.selecting import select
from torchtune_agent.selection.strategies import DEFAULT, NEEDS
from torchtune_agent.selection.writing import SELECTION, read_made_of, read_rows, write_selection
from torchtune_agent.training import Run
from torchtune_agent.training.run import NothingToTrain
from torchtune_agent.training.settings import checked


class CoresetSettings(BaseModel):
    """The keys of the `coreset` section; those that are not here are those of `Options`.

    `scores_from`: a scores.parquet, or the ledger of a training run (logs/sample_losses), instead of scoring.
    `embedding_model`: a sentence encoder whose vectors say what is alike, instead of the model's hidden states.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    strategy: str = DEFAULT
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
    embedding_model: str | None = None

    @classmethod
    def from_config(cls, section: DictConfig | None) -> "CoresetSettings":
        section = OmegaConf.create() if section is None else section
        if not isinstance(section, DictConfig):
            raise UserError(f"coreset={section}: must be a section, for example coreset.target_size=30%.")
        check_keys(section, set(cls.model_fields), "coreset.")
        values: Any = OmegaConf.to_container(section, resolve=True)
        return checked(cls, values, "coreset.")

    def options(self, seed: int) -> Options:
        names = set(Options.__dataclass_fields__) & set(type(self).model_fields)
        try:
            return Options(**{name: getattr(self, name) for name in names}, seed=seed)
        except UserError as error:
            raise UserError(f"coreset.{error}") from error


def coreset_loader(run: Run, settings: CoresetSettings, loader: SampleLoader, tokenizer: Any) -> SampleLoader:
    """A loader of what is selected from the samples of `loader`. Every rank calls it."""
    assert run.settings.seed is not None
    options = settings.options(run.settings.seed)
    pool, folder = loader.dataset, run.settings.output_dir / "coreset"
    made_of = _made_of(run, settings, options, pool)
    found = on_main(lambda: _earlier(run, folder, made_of))
    if found is not None:
        run.say(f"coreset       the one that this run began with: {found}")
    else:
        scores = _scores(run, settings, options, loader, folder)
        slowly_on_main(lambda: _select(run, settings, options, pool, scores, folder, made_of, tokenizer), "coreset")
        found = folder / SELECTION
    if settings.only_select:
        raise NothingToTrain
    return together(lambda: _loader_of(found, loader, settings))


def _loader_of(selection: Path, loader: SampleLoader, settings: CoresetSettings) -> SampleLoader:
    rows = read_rows(selection, ids_of(loader.dataset))
    chosen = loader.over(JoinedDataset({"coreset": Subset(loader.dataset, rows)}))
    if chosen.num_rows < loader.rows_per_step:
        raise UserError(
            f"coreset.target_size={settings.target_size}: makes {chosen.num_rows} sequences, fewer than a step needs "
            f"({loader.rows_per_step}). Raise it, or lower batch_size or gradient_accumulation_steps."
        )
    return chosen


def _made_of(run: Run, settings: CoresetSettings, options: Options, pool: JoinedDataset) -> dict[str, Any]:
    """All that a selection follows from."""
    made_of: dict[str, Any] = {"options": asdict(options), "data": pool.fingerprint()}
    if settings.embedding_model is not None:
        made_of["embedding_model"] = settings.embedding_model
    if settings.scores_from is not None:
        return made_of | {"scores_from": str(settings.scores_from)}
    if not _needs_model(settings, options):
        return made_of
    model, weights = (OmegaConf.to_container(run.cfg[key], resolve=True) for key in ("model", "checkpointer"))
    assert isinstance(weights, dict)
    weights.pop("output_dir", None)
    return made_of | {"model": redacted({"model": model, "weights": weights}), "embedding_dim": settings.embedding_dim}


def _earlier(run: Run, folder: Path, made_of: dict[str, Any]) -> Path | None:
    """The selection of the run that is resumed. One of other data or by other options is neither used nor replaced,
    unless the user says so."""
    wanted = run.settings.resume_from_checkpoint
    if wanted is False or any(key.split(".")[0] == "coreset" for key in run.settings.resume_override):
        return None
    folders = [folder, wanted.absolute().parents[1] / "coreset"] if isinstance(wanted, Path) else [folder]
    path = next((one / SELECTION for one in folders if (one / SELECTION).exists()), None)
    if path is None:
        return None
    then, now = (dict(_flat(one)) for one in (read_made_of(path), made_of))
    changed = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    if changed:
        raise UserError(
            f"resume_from_checkpoint={wanted}: {path} was selected with other settings ({changed[0]}: "
            f"{then.get(changed[0])} → {now.get(changed[0])}). Set them back, or go on with what is selected now: "
            "resume_override=[coreset,dataset]"
        )
    return path


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    else:
        yield key.removeprefix("options."), value


def _needs_model(settings: CoresetSettings, options: Options) -> bool:
    needs = set(NEEDS[options.strategy])
    needs |= {"embeddings"} if options.dedup_distance is not None else set()
    needs |= {"loss"} if options.loss_cap_quantile is not None else set()
    return bool(needs - ({"embeddings"} if settings.embedding_model is not None else set()))


def _scores(run: Run, settings: CoresetSettings, options: Options, loader: SampleLoader, folder: Path) -> Path | None:
    """The file or ledger with the scores; None where the strategy needs no model."""
    if settings.scores_from is not None:
        return settings.scores_from
    if not _needs_model(settings, options):
        return None
    started = time.perf_counter()
    scoring = ScoringOptions(settings.score_batch_size, settings.batches_per_part, settings.embedding_dim)
    model = loaded_model(run)
    collator = Collator(pad_id=loader.collator.pad_id, special_ids=loader.collator.special_ids)
    path = score(model, loader.dataset, collator, folder, run.world, scoring)
    del model
    gc.collect()  # a sharded model is a cycle, and the one to be trained needs its memory
    run.say(f"coreset       {len(loader.dataset):,} samples scored in {time.perf_counter() - started:.1f} s: {path}")
    return path


def _select(
    run: Run,
    settings: CoresetSettings,
    options: Options,
    pool: JoinedDataset,
    scores: Path | None,
    folder: Path,
    made_of: dict[str, Any],
    tokenizer: Any,
) -> None:
    started = time.perf_counter()
    needs_vectors = "embeddings" in NEEDS[options.strategy] or options.dedup_distance is not None
    own_vectors = settings.embedding_model is not None
    known = pool_of_data(pool, scores, "coreset.scores_from", embed=needs_vectors and not own_vectors)
    signed = None if options.dedup_similarity is None else signatures(TokenRows(pool), options.seed)
    try:
        if settings.embedding_model is not None and needs_vectors:
            texts = whole_texts(pool, tokenizer)
            known = known.with_embeddings(sentence_embeddings(texts, settings.embedding_model, str(run.world.device)))
        selection = select(known, options, signatures=signed, device=str(run.world.device))
    except UserError as error:
        raise UserError(f"coreset.{error}") from error
    text = Reader(pool, tokenizer) if is_readable(tokenizer) else None
    chosen, page = write_selection(selection, folder, text, made_of)
    run.say(
        f"coreset       {len(selection.rows):,} of {len(pool):,} samples by {options.strategy} in "
        f"{time.perf_counter() - started:.1f} s; {len(selection.duplicates):,} near-duplicates, "
        f"{len(selection.capped):,} suspected label errors, correlation with length "
        f"{selection.length_correlation():+.2f}"
    )
    for line in (*selection.notes, f"why: {chosen}", f"page: {page}"):
        run.say(f"              {line}")
