"""The parts of supervised fine-tuning, shared by every recipe that trains on conversations."""

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig
from torch import nn
from torchtune.modules import TransformerDecoder
from torchtune.modules.loss import CEWithChunkedOutputLoss

from torchtune_agent.config import component, instantiate
from torchtune_agent.data import AgentSFTDataset, Collator, DataReport, SampleLoader, StepPlan
from torchtune_agent.data.joined import JoinedDataset
from torchtune_agent.data.quarantine import write_quarantine
from torchtune_agent.errors import UserError
from torchtune_agent.losses import CrossEntropy, Objective
from torchtune_agent.losses.output import check_output
from torchtune_agent.training.run import Run
from torchtune_agent.training.settings import Settings

_SAME_LOSS = (CEWithChunkedOutputLoss, nn.CrossEntropyLoss)


@dataclass
class SFTData:
    train: SampleLoader
    validation: SampleLoader | None
    has_token_classes: bool


def sft_data(run: Run, tokenizer: Any, model: nn.Module) -> SFTData:
    """The configured datasets as loaders, checked against the model and the size of a step."""
    settings, world = run.settings, run.world
    plan = StepPlan(settings.batch_size, settings.gradient_accumulation_steps, world.dp_rank, world.dp_size)
    datasets = _datasets(run, "dataset", tokenizer, model)
    classified = all(has_token_classes(dataset) for dataset in datasets)
    if settings.enable_token_classification and not classified:
        run.say("              not every dataset tells its tokens' classes, so metrics are overall only")
    train = _loader(run, "dataset", datasets, tokenizer, plan, shuffle=settings.shuffle)
    if train.num_rows < plan.rows_per_step:
        raise UserError(
            f"dataset: {train.num_rows} sequences are fewer than a step needs ({plan.rows_per_step} = "
            f"batch_size {plan.batch_size} x gradient_accumulation_steps {plan.accumulation} x "
            f"{plan.dp_size} data-parallel ranks). Lower batch_size or gradient_accumulation_steps, or add data."
        )
    validation = None
    if run.cfg.get("dataset_val") is not None:
        validation = validation_data(run, tokenizer, model)[0]
    return SFTData(train, validation, classified)


def validation_data(run: Run, tokenizer: Any, model: nn.Module) -> tuple[SampleLoader, bool]:
    """The data under `dataset_val` as a loader, and whether its tokens have classes."""
    settings, world = run.settings, run.world
    if run.cfg.get("dataset_val") is None:
        raise UserError("dataset_val: not given. It names the data to measure the model on.")
    plan = StepPlan(settings.batch_size_val or settings.batch_size, 1, world.dp_rank, world.dp_size)
    datasets = _datasets(run, "dataset_val", tokenizer, model)
    loader = _loader(run, "dataset_val", datasets, tokenizer, plan, shuffle=False)
    return loader, all(has_token_classes(dataset) for dataset in datasets)


def has_token_classes(dataset: Any) -> bool:
    return dataset.has_token_classes if isinstance(dataset, AgentSFTDataset) else "token_class" in dataset[0]


def _datasets(run: Run, key: str, tokenizer: Any, model: nn.Module) -> list[Any]:
    """Make the dataset, or every one of a list, under `key`; say what is in them."""
    datasets = []
    for name, section in dataset_sections(run.cfg, key).items():
        dataset = make_dataset(section, name, tokenizer, classified=run.settings.enable_token_classification)
        check_not_empty(dataset, name)
        if isinstance(dataset, AgentSFTDataset):
            _check_against_model(dataset, name, tokenizer, model)
        datasets.append(dataset)
    reports = [dataset.report for dataset in datasets if isinstance(dataset, AgentSFTDataset)]
    if run.world.is_main:
        _keep_counts(key, sum(reports, DataReport()) if len(reports) == len(datasets) else None, run.settings)
    if reports and run.world.is_main:
        say_report(key, sum(reports, DataReport()), run.settings.output_dir, run.say)
        for folder in {dataset.folder for dataset in datasets if isinstance(dataset, AgentSFTDataset)} - {None}:
            run.say(f"              tokens kept in {folder}")
    return datasets


def say_report(key: str, report: DataReport, output_dir: Path, say: Callable[[str], None]) -> None:
    """Say what is in the data under `key`, and write what was left out of it."""
    for i, line in enumerate(report.lines()):
        say(f"{key if i == 0 else '':<14}{line}")
    if report.left_out:
        path = output_dir / "logs" / f"quarantine_{key}.jsonl"
        write_quarantine(report.left_out, path)
        say(f"              all of them: {path}")


def counts_path(output_dir: Path, key: str) -> Path:
    """Where a run keeps the counts of its data, for the model's card."""
    return output_dir / "logs" / f"counts_{key}.json"


def _keep_counts(key: str, report: DataReport | None, settings: Settings) -> None:
    path = counts_path(settings.output_dir, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    if report is None:  # what another run here has left says nothing of this one
        path.unlink(missing_ok=True)
    else:
        path.write_text(json.dumps(report.to_json() | {"left_out": len(report.left_out)}) + "\n", encoding="utf-8")


def check_not_empty(dataset: Any, key: str) -> None:
    if len(dataset) == 0:
        raise UserError(f"{key}: no conversation with a token to train. Check the file and tokenizer.max_seq_len.")


def dataset_sections(cfg: DictConfig, key: str) -> dict[str, DictConfig]:
    """The dataset section under `key`, or all of them by name where it is a list."""
    if not isinstance(cfg[key], ListConfig):
        return {key: cfg[key]}
    return {f"{key}[{i}]": section for i, section in enumerate(cfg[key])}


def _loader(run: Run, key: str, datasets: list[Any], tokenizer: Any, plan: StepPlan, *, shuffle: bool) -> SampleLoader:
    packed = {bool(section.get("packed", False)) for section in dataset_sections(run.cfg, key).values()}
    if len(packed) > 1:
        raise UserError(f"{key}: some of its datasets are packed and some are not. Set packed alike on all of them.")
    if packed == {True} and tokenizer.max_seq_len is None:
        raise UserError(f"{key}.packed=True: needs tokenizer.max_seq_len, the length of a packed sequence.")
    collator = collator_of(tokenizer, packed=packed == {True})
    dataset = JoinedDataset(dict(zip(dataset_sections(run.cfg, key), datasets, strict=True)))
    assert run.settings.seed is not None
    return SampleLoader(dataset, collator, plan, shuffle=shuffle, seed=run.settings.seed)


def collator_of(tokenizer: Any, *, packed: bool) -> Collator:
    return Collator(
        pad_id=tokenizer.pad_id,
        pack_to=tokenizer.max_seq_len if packed else None,
        special_ids=frozenset({tokenizer.eos_id, *tokenizer.stop_tokens}),
    )


def make_dataset(section: DictConfig, key: str, tokenizer: Any, *, classified: bool, **replaced: Any) -> Any:
    """Make one dataset. Ours tells reasoning and calls apart unless the run as a whole does not (`classified`).

    Options in `replaced` come before the section's, where the dataset has them.
    """
    options: dict[str, Any] = {}
    if section.get("_component_") is not None:
        known = inspect.signature(component(section["_component_"], key)).parameters
        options = {name: value for name, value in replaced.items() if name in known}
        if "enable_token_classification" in known and not classified:
            options["enable_token_classification"] = False
        if "packed" in known:
            options["packed"] = False  # the loader packs and keeps classes; torchtune's packing drops them
    return instantiate(section, key, tokenizer, **options)


def _check_against_model(dataset: AgentSFTDataset, key: str, tokenizer: Any, model: nn.Module) -> None:
    assert isinstance(model, TransformerDecoder)
    rows = model.tok_embeddings.num_embeddings
    largest = max(dataset.largest_token, tokenizer.pad_id)
    if largest >= rows:
        raise UserError(
            f"tokenizer: its tokens reach id {largest}, but the model's embedding has {rows} rows. "
            "Use the tokenizer that belongs to the model."
        )
    limit, longest = model.max_seq_len, int(dataset.lengths.max())
    if longest > limit:
        raise UserError(
            f"{key}: its longest conversation has {longest} tokens, and the model takes {limit}. "
            f"Set tokenizer.max_seq_len={limit} to cut longer ones (they are counted), or leave them out of the data."
        )


def check_model(run: Run, tokenizer: Any, model: nn.Module) -> None:
    """Refuse a model that is not a text decoder, and settings it cannot fulfil."""
    if not isinstance(model, TransformerDecoder):
        raise UserError(f"model: {type(model).__name__} is not a text decoder; models with images are not supported.")
    check_output(model)
    limit = model.max_seq_len
    if tokenizer.max_seq_len is not None and tokenizer.max_seq_len > limit:
        raise UserError(
            f"tokenizer.max_seq_len={tokenizer.max_seq_len}: the model takes at most {limit} tokens. "
            f"Set tokenizer.max_seq_len={limit} or less."
        )
    names = {name for name, _ in model.named_modules()}
    for layer in run.settings.custom_sharded_layers or ():
        if layer not in names:
            raise UserError(
                f"custom_sharded_layers: the model has no module '{layer}' (tied embeddings have no 'output'). "
                "Remove it from the list."
            )


def sft_objective(run: Run) -> Objective:
    """The configured loss."""
    section = run.cfg.get("loss")
    if section is not None and section["_component_"].rpartition(".")[2] in {loss.__name__ for loss in _SAME_LOSS}:
        name = section["_component_"].rpartition(".")[2]
        run.say(f"loss        {name}: computed by torchtune_agent.losses.CrossEntropy, which measures every class")
    return cross_entropy(run.cfg, run.settings)


def cross_entropy(cfg: DictConfig, settings: Settings) -> Objective:
    """The configured loss. torchtune's cross entropies mean the same number, so they get our objective too."""
    section = cfg.get("loss")
    options: dict[str, Any] = {"entropy_k": settings.entropy_k, "compile": settings.compile}
    if section is None:
        return CrossEntropy(**options)
    made = component(section["_component_"], "loss")
    if made in _SAME_LOSS:
        return CrossEntropy(**options)
    if made is CrossEntropy:
        return instantiate(section, "loss", **options)
    raise UserError(
        f"loss: {section['_component_']} cannot report token classes. Leave 'loss' out, or use "
        "torchtune_agent.losses.CrossEntropy."
    )
