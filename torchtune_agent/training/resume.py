"""From which checkpoint a run goes on, and whether it is still the same run.

Every file of a checkpoint is read and compared with its SHA-256 before anything of it is used. A damaged one is named,
and the newest good one taken. Where there were some and none is good, the run stops: starting anew is for the user to
ask for.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from torchtune_agent import __version__
from torchtune_agent.config import redacted, resolved
from torchtune_agent.data.joined import Known
from torchtune_agent.distributed import World, collected, on_main
from torchtune_agent.errors import UserError
from torchtune_agent.metrics.rewind import rewind
from torchtune_agent.training.checkpoints import Checkpoint, CheckpointFolder, Damaged, Manifest, write_readme
from torchtune_agent.training.saving import FOLDER
from torchtune_agent.training.settings import Settings
from torchtune_agent.training.trainer import Parts

# Keys that say what is shown and kept, when, and how the work is shared out: a run stays the same run without them.
# Every other key must be what it was.
_FREE = (
    "output_dir",
    "checkpointer.output_dir",
    "dataset.cache_dir",
    "dataset_val.cache_dir",
    "resume_from_checkpoint",
    "resume_override",
    "save_every_n_steps",
    "keep_last_n_checkpoints",
    "keep_best",
    "enable_async_checkpointing",
    "export_every_n_steps",
    "metric_logger",
    "profiler",
    "check",
    "plan",
    "export",
    "log_every_n_steps",
    "log_peak_memory_stats",
    "log_detailed_metrics_every_n_steps",
    "enable_detailed_metrics",
    "entropy_k",
    "metric_names",
    "log_by",
    "log_by_top_n",
    "log_sample_losses",
    "run_val_every_n_steps",
    "batch_size_val",
    "fsdp_cpu_offload",
    "fsdp_reshard_after_forward",
    "custom_sharded_layers",
    "tensor_parallel_dim",
    "tensor_parallel_plan",
    "enable_activation_checkpointing",
    "enable_activation_offloading",
    "ac_mode",
    "ac_option",
    "max_nonfinite_steps",
    "process_group_timeout_seconds",
    "trusted_components",
    "coreset.only_select",
    "coreset.score_batch_size",
    "coreset.batches_per_part",
    "arrivals.ahead",
    "arrivals.idle_seconds",
    "arrivals.poll_seconds",
)
_STEP = ("batch_size", "gradient_accumulation_steps")  # with the number of ranks they make a step; only that counts
_INDEX = re.compile(r"\[\d+\]")
_NUM_LISTED = 20


def find(settings: Settings, world: World, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that the settings ask for, verified; None for a run that starts anew."""
    wanted = settings.resume_from_checkpoint
    if wanted is False:
        return None
    if isinstance(wanted, Path):
        found, problem = _verified(wanted, world)
        if found is None:
            raise UserError(
                f"resume_from_checkpoint={wanted}: not a good checkpoint: {problem}. Name another one, or set "
                "resume_from_checkpoint=auto for the newest good one."
            )
        return found
    folder = CheckpointFolder(settings.output_dir / FOLDER)
    on_main(folder.recover)
    steps, has_had_any = on_main(lambda: (folder.steps(), folder.has_had_any))
    problems = []
    for step in steps:
        found, problem = _verified(folder.of_step(step), world)
        if found is not None:
            return found
        problems.append(f"{folder.of_step(step)}: {problem}")
        say(f"warning: {problems[-1]}. It is not used.")
    if has_had_any:
        raise UserError(
            f"resume_from_checkpoint={wanted}: {folder.path} has no good checkpoint"
            + "".join(f"\n  {line}" for line in problems)
            + "\nSet resume_from_checkpoint=False to start anew; these are kept under another name then."
        )
    if wanted is True:
        raise UserError(
            f"resume_from_checkpoint=True: {folder.path} has no checkpoint. Check output_dir; to start anew where "
            "there is none, set resume_from_checkpoint=auto."
        )
    return None


def _verified(path: Path, world: World) -> tuple[Checkpoint | None, str | None]:
    """The checkpoint at `path`, or what is wrong with it. Every rank reads a share of its files."""
    try:
        checkpoint: Checkpoint | None = Checkpoint.open(path)
        problem = None
    except Damaged as error:
        checkpoint, problem = None, str(error)
    problems = collected(problem)
    if checkpoint is not None and not any(problems):
        own = sorted(checkpoint.manifest.files)[world.rank :: world.size]
        problems = collected(next((found for name in own if (found := checkpoint.problem_of(name))), None))
    first = next((found for found in problems if found), None)
    return (None, first) if first else (checkpoint, None)


def kept_config(cfg: DictConfig, settings: Settings) -> dict[str, Any]:
    """The config as a checkpoint keeps it: defaults filled in, secrets taken out."""
    return redacted({**resolved(cfg), **settings.model_dump(mode="json")})


def manifest_of_run(recipe: str, cfg: DictConfig, settings: Settings, parts: Parts, world_size: int) -> Manifest:
    """What every checkpoint of a run says of it."""
    data = {"dataset": parts.train, "dataset_val": parts.validation}
    return Manifest(
        step=0,
        epoch=0,
        world_size=world_size,
        rows_per_step=parts.train.rows_per_step,
        version=__version__,
        config=kept_config(cfg, settings),
        data={name: source.fingerprint() for name, source in data.items() if isinstance(source, Known)},
        recipe=recipe,
    )


def prepare_folders(
    checkpoint: Checkpoint | None, cfg: DictConfig, settings: Settings, now: Manifest, say: Callable[[str], None]
) -> None:
    """Rank 0, before the first step: refuse to go on with what has changed; put aside what later steps had left."""
    folder = CheckpointFolder(settings.output_dir / FOLDER)
    if checkpoint is not None:
        check_unchanged(checkpoint, settings, now)
        _say_where(checkpoint, now, say)
    try:
        folder.clean()
        step = None if checkpoint is None else checkpoint.manifest.step
        aside = folder.set_aside(step)
        if aside is not None:
            say(f"{'earlier' if step is None else 'later'} checkpoints moved to {aside}")
        if checkpoint is not None:
            then = checkpoint.manifest
            rewind(settings.output_dir / "logs", then.step, before_validation=then.owes_validation)
        write_readme(settings.output_dir, Path(cfg.checkpointer.get("output_dir", settings.output_dir)))
    except OSError as error:
        raise UserError(
            f"output_dir={settings.output_dir}: cannot be written to: {error.strerror or error}. Make room, change its "
            "permissions, or name another folder."
        ) from error


def _say_where(checkpoint: Checkpoint, now: Manifest, say: Callable[[str], None]) -> None:
    then = checkpoint.manifest
    say(f"resuming      {checkpoint.path}, after {then.epoch} whole epochs")
    if then.epoch >= now.config["epochs"]:
        say(
            f"              this run is finished: all its {then.epoch} epochs are trained. To train on, raise epochs "
            "and set resume_override=[epochs]"
        )
    if then.rows_per_step != now.rows_per_step:
        say(
            f"              a step is now {now.rows_per_step} rows, and was {then.rows_per_step} on {then.world_size} "
            "processes; change gradient_accumulation_steps to keep it"
        )


def check_unchanged(checkpoint: Checkpoint, settings: Settings, now: Manifest) -> None:
    """Refuse to go on where config or data are not those of the checkpoint, unless the user names what is new."""
    then = checkpoint.manifest
    changed = changes(then.config, now.config)
    if then.rows_per_step == now.rows_per_step:
        changed = {key: change for key, change in changed.items() if key not in _STEP}
    for key in sorted({*then.data, *now.data}):
        if then.data.get(key) != now.data.get(key):
            changed[key] = f"{then.data.get(key, 'none')} → {now.data.get(key, 'none')} (the content of its samples)"
    refused = [key for key in changed if not _is_part_of(key, (*_FREE, *settings.resume_override))]
    if not refused:
        return
    lines = [f"\n  {key}: {changed[key]}" for key in refused[:_NUM_LISTED]]
    more = f"\n  and {len(refused) - _NUM_LISTED} more" if len(refused) > _NUM_LISTED else ""
    raise UserError(
        f"resume_from_checkpoint={settings.resume_from_checkpoint}: {checkpoint.path} is of a run with other settings"
        + "".join(lines)
        + more
        + f"\nSet them back, or go on with the new ones: resume_override=[{','.join(_sections(refused))}]"
    )


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Every dotted key that two configs do not say the same of, and what they say."""
    then, now = dict(_flat(old)), dict(_flat(new))
    different = (key for key in {**then, **now} if then.get(key) != now.get(key))
    return {key: f"{_shown(then, key)} → {_shown(now, key)}" for key in different}


def _sections(keys: list[str]) -> list[str]:
    """`keys` without those of which a section is named too."""
    return [key for key in keys if not any(other != key and _is_part_of(key, (other,)) for other in keys)]


def _is_part_of(key: str, names: tuple[str, ...]) -> bool:
    """Whether `key` is one of `names` or in such a section. `dataset.cache_dir` is that of every one of a list too."""
    spellings = (f"{key}.", f"{key}[", f"{_INDEX.sub('', key)}.")
    return any(spelled.startswith((f"{name}.", f"{name}[")) for name in names for spelled in spellings)


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "not given"


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value of a config by its dotted key. What is not given is None."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _flat(item, f"{key}[{i}]")
    elif value is not None:
        yield key, value
