"""Model cards: the README.md of every folder of weights, which says what was trained, on what, and how well.

Cards are published: they name files and folders, never where on a machine these are, and hide what looks like a secret.
What a card cannot find out it does not say; no run ends for it.
"""

import importlib.metadata
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtune_agent import __version__
from torchtune_agent.errors import UserError
from torchtune_agent.metrics.history import History
from torchtune_agent.metrics.summary import latest_table
from torchtune_agent.models.adapter import AdapterSettings
from torchtune_agent.screen import shown
from torchtune_agent.training.checkpoints import Manifest

_TAGS = ("torchtune", "torchtune_agent", "agent", "tool-use")
_PACKAGES = ("torch", "torchtune", "torchao", "transformers", "peft", "tokenizers", "safetensors")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_DOWNLOADED = "original_repo_id.json"  # `tune download` leaves it in the folder
_SETTINGS = (  # in this order, where the config has them
    "seed",
    "dtype",
    "batch_size",
    "gradient_accumulation_steps",
    "clip_grad_norm",
)


@dataclass(frozen=True)
class Trained:
    """What is known of a run, between two steps."""

    manifest: Manifest
    tokens: int
    supervised: int
    logs: Path | None  # its folder of logs; None where that may be another run's by now


def model_card(trained: Trained, name: str, base: Path) -> str:
    """Of a whole model in the folder `name`, trained from the checkpoint in `base`."""
    usage = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{_plain(name)}", dtype="auto")',
        f'tokenizer = AutoTokenizer.from_pretrained("{_plain(name)}")',
    ]
    adapter = trained.manifest.config.get("adapter")
    kind = "adapters, merged into all weights" if adapter else "all weights"
    return _card(
        _front_matter(base, "transformers", "finetune", _TAGS, _datasets(trained.manifest.config)),
        _title(base, trained),
        f"{_code(_name(base))}, fine-tuned as an agent with tools ({kind}).",
        usage,
        _of_run(trained),
    )


def adapter_card(trained: Trained, name: str, base: Path) -> str:
    """Of adapters in the folder `name`, trained on the checkpoint in `base`."""
    usage = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{_plain(_hub_name(base) or _name(base))}", dtype="auto")',
        f'model = PeftModel.from_pretrained(base, "{_plain(name)}")',
    ]
    return _card(
        _front_matter(base, "peft", "adapter", (*_TAGS, "lora"), _datasets(trained.manifest.config)),
        _title(base, trained),
        f"An adapter for {_code(_name(base))}, fine-tuned as an agent with tools.",
        usage,
        _of_run(trained),
    )


def merged_card(adapter: AdapterSettings, adapter_name: str, name: str, base: Path) -> str:
    """Of a whole model that an adapter was merged into, of whose training nothing is known."""
    usage = [
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{_plain(name)}", dtype="auto")',
    ]
    rows = _table(_adapter_rows(vars(adapter)))
    return _card(
        _front_matter(base, "transformers", "finetune", _TAGS, []),
        f"{_name(base)} with {adapter_name}",
        f"{_code(_name(base))} with the adapter {_code(adapter_name)} merged into its weights.",
        usage,
        ["## Adapter", "", *rows, "", "## Versions", "", _versions(__version__)],
    )


def _card(front: list[str], title: str, about: str, usage: list[str], rest: list[str]) -> str:
    lines = [*front, "", f"# {_text(title)}", "", about, "", "```python", *usage, "```", "", *rest]
    return shown("\n".join(lines)) + "\n"


def _front_matter(base: Path, library: str, relation: str, tags: tuple[str, ...], datasets: list[str]) -> list[str]:
    known = _hub_name(base)
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
    if known is not None:
        lines += [f"base_model: {known}", f"base_model_relation: {relation}"]
    else:  # the hub refuses a card whose base_model is a folder
        lines += ["# base_model: OWNER/NAME of the model on the hub that this one was trained from"]
    if datasets:
        lines += ["datasets:", *(f"- {name}" for name in datasets)]
    return [*lines, "tags:", *(f"- {tag}" for tag in tags), "---"]


def _of_run(trained: Trained) -> list[str]:
    manifest = trained.manifest
    adapter = manifest.config.get("adapter")
    return [
        "## Training",
        "",
        *_table(_run_rows(trained)),
        "",
        *(["### Adapter", "", *_table(_adapter_rows(adapter)), ""] if adapter else []),
        "## Data",
        "",
        *_table(_data_rows(trained)),
        "",
        "## Metrics",
        "",
        *_metrics(trained),
        "",
        "## Versions",
        "",
        _versions(manifest.version),
    ]


def _run_rows(trained: Trained) -> Iterator[tuple[str, Any]]:
    manifest, config = trained.manifest, trained.manifest.config
    if manifest.recipe:
        yield "recipe", manifest.recipe
    yield "trained", "adapters, all else frozen" if config.get("adapter") else "all weights"
    yield "steps", f"{manifest.step:,}"
    yield "epochs", f"{manifest.epoch} done of {config.get('epochs', 1)}"
    yield "tokens", f"{trained.tokens:,}, of which {trained.supervised:,} were trained"
    yield "processes", manifest.world_size
    for key in ("optimizer", "lr_scheduler"):
        if isinstance(config.get(key), Mapping):
            yield key, _component(config[key])
    for key in _SETTINGS:
        if config.get(key) is not None:
            yield key, config[key]
    if isinstance(config.get("tokenizer"), Mapping):
        yield "tokenizer", _component(config["tokenizer"])


def _adapter_rows(adapter: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    given = AdapterSettings.from_config({**adapter})
    yield "kind", ("Q" if given.quantize_base else "") + {"lora": "LoRA", "dora": "DoRA"}[given.kind]
    yield "rank, alpha, dropout", f"{given.rank}, {given.alpha:g}, {given.dropout:g}"
    yield "scaled by", f"{given.scaling:g} (alpha / {'sqrt(rank)' if given.rslora else 'rank'})"
    targets = list(given.targets)
    yield "on", ", ".join(targets[:8]) + (f" and {len(targets) - 8} more" if len(targets) > 8 else "")
    if given.lora_plus_lr_ratio is not None:
        yield "LoRA+ ratio", f"{given.lora_plus_lr_ratio:g}"


def _data_rows(trained: Trained) -> Iterator[tuple[str, Any]]:
    for key, title in (("dataset", "trained on"), ("dataset_val", "validated on")):
        section = trained.manifest.config.get(key)
        for part in section if isinstance(section, list) else [section]:
            if isinstance(part, Mapping):
                yield title, _component(part)
        counts = _counts(trained, key)
        if section is not None and counts is not None:
            yield (
                "",
                f"{counts['num_trained']:,} conversations of {counts['num_read']:,} records, {counts['num_samples']:,} "
                f"samples, {counts['num_tokens']:,} tokens, {counts['num_supervised']:,} of them trained",
            )


def _counts(trained: Trained, key: str) -> dict[str, Any] | None:
    """As the run kept them (sft.counts_path), where it did."""
    path = None if trained.logs is None else trained.logs / f"counts_{key}.json"
    if path is None or not path.exists():
        return None
    try:
        counts = json.loads(path.read_text(encoding="utf-8"))
        return {key: int(counts[key]) for key in counts if key.startswith("num_")}
    except (ValueError, TypeError, AttributeError):  # a full disk may have left half of it
        return None


def _metrics(trained: Trained) -> Iterator[str]:
    try:
        history = History() if trained.logs is None else _history(trained.logs, trained.manifest.step)
    except UserError:
        yield "The logs of the run could not be read when this was written."
        return
    for split, title, plain in (("val", "Validation", "val_loss"), ("train", "On training data", "loss")):
        found = latest_table(history, split)
        if found is not None:
            step, table = found
            yield f"{title}, after step {step}. Losses are in nats per token, entropies in nats."
            yield ""
            yield table
            return
        loss = history.curves.get(plain)  # all there is where detailed metrics are switched off
        if loss:
            yield f"{title}, after step {loss.steps[-1]}: loss {loss.values[-1]:.4f}."
            return
    yield "No metrics up to this step were there when this was written."


def _history(logs: Path, until: int) -> History:
    path = logs / "metrics.jsonl"
    return History.read(path, until) if path.exists() else History()


def _versions(of_training: str) -> str:
    installed = []
    for package in _PACKAGES:
        try:
            installed.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:  # not every one is needed
            continue
    trained = "" if of_training == __version__ else f"Trained with torchtune_agent {of_training}. "
    return f"{trained}Written by torchtune_agent {__version__} with {', '.join(installed)}."


def _datasets(config: Mapping[str, Any]) -> list[str]:
    """Names on the hub of the data sets trained on."""
    section = config.get("dataset")
    parts = section if isinstance(section, list) else [section]
    named = [str(part.get("source")) for part in parts if isinstance(part, Mapping) and not part.get("data_files")]
    return list(dict.fromkeys(name for name in named if _HUB_NAME.fullmatch(name) and not Path(name).exists()))


def _hub_name(base: Path) -> str | None:
    """Where on the hub a downloaded folder is from, if it says so."""
    cached = [_HUB_CACHE.fullmatch(part) for part in base.parts]
    name: Any = next((f"{match[1]}/{match[2]}" for match in cached if match), None)
    try:
        name = json.loads((base / _DOWNLOADED).read_text(encoding="utf-8"))["repo_id"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # it is there for people who used `tune download`
    return name if isinstance(name, str) and _HUB_NAME.fullmatch(name) else None


def _title(base: Path, trained: Trained) -> str:
    return f"{_name(base)}, fine-tuned for {trained.manifest.step:,} steps"


def _name(path: Path) -> str:
    """Of a folder, as people call it: without the place it has on a machine."""
    return _hub_name(path) or (path.resolve().name if path.name in ("", "..") else path.name)


def _component(section: Mapping[str, Any]) -> str:
    """`AdamW(lr=2e-05, weight_decay=0.01)`; of paths the last name."""
    given = sorted((key, value) for key, value in section.items() if key != "_component_" and value is not None)
    options = ", ".join(f"{key}={_value(value)}" for key, value in given)
    return f"{str(section.get('_component_', '')).rpartition('.')[2]}({options})"


def _value(value: Any) -> str:
    if isinstance(value, str):
        return Path(value).name if Path(value).is_absolute() else value
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return str(value)


def _table(rows: Iterator[tuple[str, Any]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {_text(key)} | {_code(_value(value))} |" for key, value in rows)]


def _code(text: str) -> str:
    """`text` as it stands, in Markdown: nothing in it is markup, or ends the cell of a table it may be in."""
    return f"`{_plain(text)}`"


def _plain(text: str) -> str:
    return text.replace("`", "'").replace("|", "¦").replace("\n", " ").replace('"', "'").strip()


def _text(text: str) -> str:
    return re.sub(r"([\\`*_<>\[\]|#])", r"\\\1", text.replace("\n", " "))
