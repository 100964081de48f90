"""What a training config would train on: everything it does with data, and nothing with a model.

Datasets are made as training makes them, counted, listed, shown. One process does it: under torchrun the others have
nothing to do. Where training would refuse the data, the page is written all the same, and the exit code is not zero.
"""

import inspect
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from io import TextIOWrapper
from itertools import chain, islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

from torchtune_agent import __version__
from torchtune_agent.config import check_keys, instantiate, resolved, trust
from torchtune_agent.data import AgentSFTDataset, DataReport
from torchtune_agent.data.inspection import (
    CheckedData,
    Chosen,
    Parity,
    TaggedTokens,
    check_parity,
    finding_line,
    findings,
    has_colours,
    informative,
    sample_lines,
    statistics,
    tables,
    write_page,
)
from torchtune_agent.data.joined import JoinedDataset
from torchtune_agent.data.token_text import Vocabulary, vocabulary
from torchtune_agent.errors import UserError
from torchtune_agent.screen import shown
from torchtune_agent.training.run import make_output_dir
from torchtune_agent.training.settings import COMPONENT_KEYS, OTHER_SECTIONS, Settings, checked
from torchtune_agent.training.sft import check_not_empty, dataset_sections, has_token_classes, make_dataset, say_report

_NUM_ON_PAGE = 50


class CheckOptions(BaseModel):
    """The section `check` of the config."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_samples: int = Field(default=1, ge=0)  # shown in the terminal, and first on the page
    sample: int = Field(default=0, ge=0)  # the first of them
    parity_samples: int = Field(default=50, ge=0)  # conversations compared with transformers
    html: bool = True


class CheckSettings(BaseModel):
    """The plain keys of a training config that matter to its data."""

    model_config = ConfigDict(frozen=True)

    output_dir: Path
    enable_token_classification: bool = True
    trusted_components: list[str] = []
    check: CheckOptions = CheckOptions()

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "CheckSettings":
        """Any training config is right; keys that none has are refused."""
        check_keys(cfg, set(Settings.model_fields) | COMPONENT_KEYS | OTHER_SECTIONS)
        values = resolved(cfg)
        options = cfg.get("check") or DictConfig({})
        if not isinstance(options, DictConfig):
            raise UserError(f"check={options}: must be a section, for example check.num_samples=3.")
        check_keys(options, set(CheckOptions.model_fields), "check.")
        values["check"] = checked(CheckOptions, resolved(options), "check.")
        for key in ("output_dir", "tokenizer", "dataset"):
            if values.get(key) is None:
                raise UserError(f"{key}: not given. `tune cat tiny/agent_sft` shows a config.")
        return checked(cls, {key: values[key] for key in cls.model_fields if key in values})


def check_data(cfg: DictConfig) -> None:
    """Show what `cfg` would train on."""
    settings = CheckSettings.from_config(cfg)
    trust(settings.trusted_components)
    make_output_dir(settings.output_dir)
    tokenizer = instantiate(cfg.tokenizer, "tokenizer")
    known = vocabulary(tokenizer)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for screens that cannot show every character
    colours = has_colours(sys.stdout)
    print(f"torchtune_agent {__version__}: agent_data_check", flush=True)
    parts = []
    for key in ("dataset", "dataset_val"):
        if cfg.get(key) is not None:
            parts.append(_checked_data(cfg, key, settings, tokenizer, known))
            _show(parts[-1], known, settings.output_dir, colours=colours)
    for sample in parts[0].samples[: settings.check.num_samples]:
        print("", *sample_lines(sample, "dataset", known, colours=colours), sep="\n")
    if settings.check.html:
        path = settings.output_dir / "data_check.html"
        write_page(path, parts, known, type(tokenizer).__name__)
        print(f"\npage          {path}", flush=True)
    refused = next((part.refusal for part in parts if part.refusal is not None), None)
    if refused is not None:
        raise UserError(refused)


def _checked_data(cfg: DictConfig, key: str, settings: CheckSettings, tokenizer: Any, known: Vocabulary) -> CheckedData:
    """Everything about the data under `key`."""
    sections, options = dataset_sections(cfg, key), settings.check
    classified = settings.enable_token_classification
    # Made as if any number of bad records were fine, so that all of them are seen; `_refusal` asks what training does.
    datasets = {
        name: make_dataset(section, name, tokenizer, classified=classified, max_bad_fraction=1.0)
        for name, section in sections.items()
    }
    ours = [dataset for dataset in datasets.values() if isinstance(dataset, AgentSFTDataset)]
    report = sum((dataset.report for dataset in ours), DataReport()) if ours else None
    stop_ids = frozenset({tokenizer.eos_id, *tokenizer.stop_tokens})
    samples = JoinedDataset(datasets)

    def tokens(index: int) -> TaggedTokens:
        return TaggedTokens.of(samples[index], stop_ids)

    first = _first(key, options, len(samples))
    progress = tqdm(range(len(samples)), desc="Counting", unit=" samples", leave=False, delay=1)
    counts = statistics(map(tokens, progress), known, stop_ids)
    chosen = informative(counts, max(_NUM_ON_PAGE, len(first)), first) if len(samples) else {}
    return CheckedData(
        key=key,
        report=report,
        has_token_classes=all(has_token_classes(dataset) for dataset in datasets.values() if len(dataset)),
        limits=_limits(tokenizer, datasets.values()),
        stop_ids=stop_ids,
        statistics=counts,
        parity=_parity(ours, options, tokenizer),
        datasets={name: len(dataset) for name, dataset in datasets.items()},
        sources=Counter(samples.info(index).source for index in range(len(samples))),
        samples=[Chosen(index, why, samples.info(index).where, tokens(index)) for index, why in chosen.items()],
        refusal=_refusal(datasets, sections),
    )


def _first(key: str, options: CheckOptions, num_samples: int) -> Sequence[int]:
    """The samples asked for; only those of the training data are."""
    if key != "dataset" or not options.num_samples or not num_samples:
        return ()
    if options.sample >= num_samples:
        raise UserError(f"check.sample={options.sample}: the last sample is {num_samples - 1}. Choose a lower one.")
    return range(options.sample, min(options.sample + options.num_samples, num_samples))


def _limits(tokenizer: Any, datasets: Iterable[Any]) -> tuple[int, ...]:
    limits = {d.transform.max_seq_len if isinstance(d, AgentSFTDataset) else tokenizer.max_seq_len for d in datasets}
    return tuple(sorted(limit for limit in limits if limit is not None))


def _parity(datasets: Sequence[AgentSFTDataset], options: CheckOptions, tokenizer: Any) -> Parity:
    if options.parity_samples == 0:
        return Parity("check.parity_samples is 0")
    conversations = chain.from_iterable(dataset.conversations() for dataset in datasets)
    return check_parity(tokenizer, islice(conversations, options.parity_samples))


def _refusal(datasets: Mapping[str, Any], sections: Mapping[str, DictConfig]) -> str | None:
    """What training would say of these datasets instead of starting."""
    default = inspect.signature(AgentSFTDataset).parameters["max_bad_fraction"].default
    try:
        for name, dataset in datasets.items():
            if isinstance(dataset, AgentSFTDataset):
                dataset.report.check(sections[name].get("max_bad_fraction", default))
            check_not_empty(dataset, name)
    except UserError as error:
        return str(error)
    return None


def _show(data: CheckedData, known: Vocabulary, output_dir: Path, *, colours: bool) -> None:
    """One part of the output: what is in the data, what is good and bad about it, and tables."""
    print()
    if data.report is not None:
        say_report(data.key, data.report, output_dir, lambda line: print(shown(line)))
    else:
        print(f"{data.key:<14}{data.statistics.num_samples:,} samples of a dataset that is not ours")
    for finding in findings(data, known):
        print(f"{'':<14}{finding_line(finding, colours=colours)}")
    for name, lines in tables(data):
        for i, line in enumerate(lines):
            print(f"{name if i == 0 else '':<14}{line}", flush=True)
