"""Active learning: which records are worth an answer, by how unsure the model is of its own.

The model answers every record of an unlabelled pool several times. `uncertainty` is the mean entropy of its tokens;
`disagreement` is the share of pairs of answers that do not make the same calls with the same arguments (answers without
a call agree), and the entropy decides between equals.
"""

from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from omegaconf import DictConfig, ListConfig, OmegaConf
from pydantic import BaseModel, ConfigDict

from torchtune_agent.config import check_keys, instantiate
from torchtune_agent.data.collate import Collator
from torchtune_agent.data.dataset import IGNORE_INDEX, AgentSFTTransform
from torchtune_agent.data.reasons import BadRecord
from torchtune_agent.data.token_class import TokenClass
from torchtune_agent.data.token_text import vocabulary
from torchtune_agent.distributed import on_main, together
from torchtune_agent.errors import UserError
from torchtune_agent.selection.labelling import LABELLED, asked, read_answers, read_records, rounds, write_records
from torchtune_agent.selection.loaded import loaded_model
from torchtune_agent.selection.options import target_number
from torchtune_agent.selection.sampling import Answer, Drawing, draw_answers
from torchtune_agent.training import Run
from torchtune_agent.training.settings import checked

_CALL = (TokenClass.CALL_NAME, TokenClass.ARG_NAME, TokenClass.ARG_VALUE)
_STAND_IN = {"role": "assistant", "content": "I"}  # for an answer, to see where one begins


class ActiveSettings(BaseModel):
    """The keys of the `active` section.

    pool: files of records whose `messages` end before the answer.
    answers: files of records that were picked before, with answers.
    num_records: how many to pick, or a share as "10%"; 0: none, `answers` are read only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pool: str | list[str] | None = None
    answers: str | list[str] | None = None
    num_records: int | str = 50
    by: Literal["uncertainty", "disagreement", "random"] = "uncertainty"
    num_answers: int = 4
    max_new_tokens: int = 64
    temperature: float = 1.0
    batch_size: int = 8

    @classmethod
    def from_config(cls, section: Any) -> "ActiveSettings":
        if not isinstance(section, DictConfig):
            raise UserError("active: not given. Name the records to pick from: active.pool=FILE.jsonl")
        check_keys(section, set(cls.model_fields), "active.")
        values: Any = OmegaConf.to_container(section, resolve=True)
        made = checked(cls, values, "active.")
        for name in ("num_answers", "max_new_tokens", "batch_size"):
            if getattr(made, name) < 1:
                raise UserError(f"active.{name}={getattr(made, name)}: must be at least 1.")
        if not made.temperature > 0:
            raise UserError(f"active.temperature={made.temperature}: must be above 0.")
        if made.by == "disagreement" and made.num_answers < 2:
            raise UserError(f"active.num_answers={made.num_answers}: answers of one cannot disagree. Draw at least 2.")
        if made.pool is None and made.answers is None:
            raise UserError("active: has neither pool nor answers. Name the records to pick from: active.pool=FILE")
        return made


def active_round(run: Run) -> None:
    """Read the answers that came back, and pick what is to be answered next. Every rank calls it."""
    settings, transform, tokenizer = together(lambda: _prepared(run))
    folder = run.settings.output_dir / "active"
    answers, pool = settings.answers, settings.pool
    if answers is not None:
        came, there = on_main(lambda: read_answers(folder, answers, transform))
        run.say(f"active        {came:,} answers read; {there:,} in {folder / LABELLED}")
    if pool is None or settings.num_records == 0:
        return
    open_records, number = together(lambda: _open(folder, pool, settings))
    prompts = [_prompt(record, transform) for record in open_records]
    scores = _scores(run, settings, transform, tokenizer, prompts, open_records)
    path = on_main(lambda: _write(folder, settings, open_records, scores, number))
    run.say(f"active        {number:,} of {len(open_records):,} records picked by {settings.by}: {path}")
    run.say("              add the assistant's messages to each, and read them with active.answers=FILE")


def _prepared(run: Run) -> tuple[ActiveSettings, AgentSFTTransform, Any]:
    settings = ActiveSettings.from_config(run.cfg.get("active"))
    if run.settings.tensor_parallel_dim > 1:
        raise UserError("tensor_parallel_dim: the model cannot answer in tensor parallel yet. Set it to 1.")
    tokenizer = instantiate(run.cfg.tokenizer, "tokenizer")
    section = {} if isinstance(run.cfg.dataset, ListConfig) else run.cfg.dataset
    how = {key: section[key] for key in ("call_style", "control_tokens", "format") if section.get(key) is not None}
    return settings, AgentSFTTransform(tokenizer, train_on="last", **how), tokenizer


def _open(folder: Path, pool: str | list[str], settings: ActiveSettings) -> tuple[list[dict[str, Any]], int]:
    """The records that were never picked, and how many to pick of them."""
    known = asked(folder)
    found = read_records("active.pool", pool)
    left = [record for name, record in found.items() if name not in known]
    answered = next((record for record in left if record["messages"][-1].get("role") == "assistant"), None)
    if answered is not None:
        raise UserError(
            f"active.pool={pool}: '{answered['id']}' has an answer already. Take the assistant's last message away, or "
            "train on the record."
        )
    if not left:
        raise UserError(f"active.pool={pool}: all of its {len(found):,} records were picked before (see {folder}).")
    try:
        return left, target_number(settings.num_records, len(left))
    except UserError as error:
        raise UserError(f"active.num_records: {error}") from error


def _prompt(record: dict[str, Any], transform: AgentSFTTransform) -> np.ndarray:
    """What a server would show the model."""
    try:
        sample = transform({**record, "messages": [*record["messages"], _STAND_IN]})
    except BadRecord as error:
        raise UserError(f"active.pool: '{record['id']}': {error}. Mend the record, or take it out.") from error
    trained = np.flatnonzero(np.asarray(sample["labels"]) != IGNORE_INDEX)
    return np.asarray(sample["tokens"])[: trained[0]]


Score = tuple[float, float, list[str]]  # what is picked by, what decides between equals, the answers


def _scores(
    run: Run,
    settings: ActiveSettings,
    transform: AgentSFTTransform,
    tokenizer: Any,
    prompts: list[np.ndarray],
    records: list[dict[str, Any]],
) -> list[Score]:
    seed = run.settings.seed or 0
    if settings.by == "random":
        return [(float(value), 0.0, []) for value in np.random.default_rng(seed).random(len(prompts))]
    model = loaded_model(run)
    longest = max(map(len, prompts))
    if longest + settings.max_new_tokens > model.max_seq_len:
        raise UserError(
            f"active.max_new_tokens={settings.max_new_tokens}: the longest prompt has {longest} tokens, and the model "
            f"takes {model.max_seq_len}. Lower it, or take long records out of the pool."
        )
    stops = frozenset({tokenizer.eos_id, *tokenizer.stop_tokens})
    drawing = Drawing(settings.num_answers, settings.max_new_tokens, settings.temperature, settings.batch_size, seed)
    answers = draw_answers(model, prompts, Collator(pad_id=tokenizer.pad_id), stops, run.world, drawing)
    known = vocabulary(tokenizer)

    def text(answer: Answer) -> str:
        return b"".join(map(known.text_of, answer.tokens)).decode(errors="replace")

    found = []
    for record, own in zip(records, answers, strict=True):
        texts = [text(answer) for answer in own]
        entropy = float(np.mean([answer.entropy for answer in own]))
        if settings.by == "uncertainty":
            found.append((entropy, 0.0, texts))
        else:
            found.append((disagreement([calls_of(record, answer, transform) for answer in texts]), entropy, texts))
    return found


def calls_of(record: dict[str, Any], answer: str, transform: AgentSFTTransform) -> tuple[Any, ...]:
    """The names, arguments and values of the calls in an answer."""
    try:
        sample = transform({**record, "messages": [*record["messages"], {"role": "assistant", "content": answer}]})
    except BadRecord:  # such as an empty one
        return ()
    own = np.asarray(sample["labels"]) != IGNORE_INDEX
    parts = own & np.isin(sample["token_class"], _CALL)
    columns = (np.asarray(sample[name])[parts].tolist() for name in ("call_index", "token_class", "tokens"))
    return tuple(zip(*columns, strict=True))


def disagreement(calls: list[tuple[Any, ...]]) -> float:
    """The share of pairs that differ."""
    pairs = list(combinations(calls, 2))
    return sum(one != other for one, other in pairs) / len(pairs)


def _write(
    folder: Path, settings: ActiveSettings, records: list[dict[str, Any]], scores: list[Score], number: int
) -> Path:
    order = sorted(range(len(records)), key=lambda row: (-scores[row][0], -scores[row][1], row))[:number]
    path = folder / f"round_{len(rounds(folder)) + 1}.jsonl"
    picked = []
    for row in order:
        value, _, answers = scores[row]
        picked.append({**records[row], "active": {"by": settings.by, "score": value, "answers": answers}})
    write_records(path, picked)
    return path
