"""`tune run agent_plan`: parameters, memory, steps, time and price of a training config, without its weights.

A plan is for GPUs that may not be here. Data and tokenizer are read as training reads them where they are at hand;
where they are not, the plan says so and goes on with `plan.sequence`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ConfigDict, Field

from torchtune_agent import __version__
from torchtune_agent.config import check_keys, instantiate, resolved
from torchtune_agent.data.packing import pack
from torchtune_agent.errors import UserError, did_you_mean
from torchtune_agent.planning.memory import (
    CONTEXT_BYTES,
    FRAGMENTATION,
    Activations,
    Memory,
    Sizes,
    activations,
    memory_of,
    optimizer_ratio,
)
from torchtune_agent.training.adapters import parameter_setup
from torchtune_agent.training.gpus import GPUS, Gpu
from torchtune_agent.training.settings import Settings, checked
from torchtune_agent.training.sft import cross_entropy, dataset_sections, make_dataset
from torchtune_agent.training.throughput import operations

_GIB = 2**30
_EIGHT_BIT = "torchao.optim.AdamW8bit"


class PlanOptions(BaseModel):
    """The section `plan` of the config."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu: str = "H100"
    num_gpus: int = Field(default=8, ge=1)
    sequence: int | None = Field(default=None, ge=2)  # tokens; the longest of the data where it is not given
    mfu: float = Field(default=0.4, gt=0, le=1)  # assumed share of the GPU's arithmetic that training uses
    price_per_gpu_hour: float = Field(default=2.5, ge=0)  # assumed, in dollars


@dataclass(frozen=True)
class DataFacts:
    """What the plan needs to know of the training data."""

    num_samples: int
    num_tokens: int
    share_trained: float
    longest: int
    num_rows: int  # packed sequences, or samples


@dataclass(frozen=True)
class Case:
    """A config with the hardware to plan for."""

    cfg: DictConfig
    settings: Settings
    options: PlanOptions
    gpu: Gpu
    sequence: int
    share_trained: float
    sizes: Sizes
    _activations: dict[Any, Activations] = field(default_factory=dict)  # those reckoned so far

    def memory(self, **changes: Any) -> Memory:
        """As configured, or with other `settings`, another `optimizer`, with an `adapter` or other `num_gpus`."""
        num_gpus = changes.pop("num_gpus", self.options.num_gpus)
        optimizer = changes.pop("optimizer", self.cfg.optimizer)
        adapter = changes.pop("adapter", None)
        settings = self.settings.model_copy(update=changes)
        cfg = self.cfg.copy()
        if adapter is not None:
            cfg.adapter = adapter
        alike = (settings.batch_size, settings.enable_activation_checkpointing, str(adapter))
        if alike not in self._activations:
            self._activations[alike] = activations(
                lambda: parameter_setup(cfg).build(cfg, settings),
                cross_entropy(self.cfg, settings),
                settings,
                self.sequence,
                self.share_trained,
            )
        return memory_of(
            self.sizes if adapter is None else Sizes.of(parameter_setup(cfg).build(cfg, settings)),
            settings,
            optimizer_ratio=optimizer_ratio(optimizer, settings.torch_dtype),
            num_gpus=num_gpus,
            activations=self._activations[alike],
        )


def print_plan(cfg: DictConfig) -> None:
    """Print the plan of `cfg`."""
    for line in _plan(cfg):
        print(line, flush=True)


def _plan(cfg: DictConfig) -> Iterator[str]:
    options, gpu = _options(cfg)
    cfg = cfg.copy()
    cfg.pop("plan", None)
    settings = Settings.from_config(cfg, for_this_machine=False)
    settings.check_world_size(options.num_gpus)
    sizes = Sizes.of(parameter_setup(cfg).build(cfg, settings))
    yield f"torchtune_agent {__version__}: agent_plan, {options.num_gpus} x {options.gpu}, {settings.dtype}"
    share = sizes.num_trained / sizes.num_parameters
    active = f", {sizes.num_active:,} active for a token" if sizes.num_active < sizes.num_parameters else ""
    yield f"model         {sizes.num_parameters:,} parameters{active}, {sizes.num_trained:,} trained ({share:.1%})"
    if active and OmegaConf.select(cfg, "adapter.quantize_base"):
        yield "              adapter.quantize_base leaves the experts as they are"
    data, reason = read_data(cfg, settings)
    sequence = options.sequence or (data.longest if data else cfg.tokenizer.get("max_seq_len"))
    if sequence is None:
        raise UserError(f"plan.sequence: not given, and the data cannot tell: {reason} Give the tokens of a sequence.")
    yield from _data_lines(data, reason, settings, options)
    case = Case(cfg, settings, options, gpu, sequence, data.share_trained if data else 1.0, sizes)
    memory = case.memory()
    yield from _memory_lines(memory, case)
    if memory.needed > gpu.memory:
        yield from _remedies(case)
    if data:
        yield from _time_lines(case, data)


def _options(cfg: DictConfig) -> tuple[PlanOptions, Gpu]:
    section = cfg.get("plan") or DictConfig({})
    if not isinstance(section, DictConfig):
        raise UserError(f"plan={section}: must be a section, for example plan.num_gpus=8.")
    check_keys(section, set(PlanOptions.model_fields), "plan.")
    options = checked(PlanOptions, resolved(section), "plan.")
    if options.gpu not in GPUS:
        raise UserError(f"plan.gpu={options.gpu}: not a GPU whose size is known. {did_you_mean(options.gpu, GPUS)}")
    return options, GPUS[options.gpu]


def read_data(cfg: DictConfig, settings: Settings) -> tuple[DataFacts | None, str]:
    """What is in the training data; where it cannot be read, why."""
    try:
        tokenizer = instantiate(cfg.tokenizer, "tokenizer")
        datasets = {
            name: make_dataset(section, name, tokenizer, classified=settings.enable_token_classification)
            for name, section in dataset_sections(cfg, "dataset").items()
        }
    except (UserError, OSError) as error:
        return None, str(error)
    lengths = np.concatenate([_lengths(dataset) for dataset in datasets.values()])
    if len(lengths) == 0:
        return None, "dataset: no conversation with a token to train."
    packed = any(section.get("packed") for section in dataset_sections(cfg, "dataset").values())
    width = tokenizer.max_seq_len if packed else None
    return DataFacts(
        num_samples=len(lengths),
        num_tokens=int(lengths.sum()),
        share_trained=_share_trained(list(datasets.values())),
        longest=width or int(lengths.max()),
        num_rows=len(pack(lengths, width)) if width else len(lengths),
    ), ""


def _lengths(dataset: Any) -> np.ndarray:
    known = getattr(dataset, "lengths", None)
    return np.asarray(known if known is not None else [len(sample["tokens"]) for sample in dataset])


def _share_trained(datasets: list[Any], most: int = 200) -> float:
    """Of the tokens, by the first samples of every data set."""
    some = [dataset[i]["labels"] for dataset in datasets for i in range(min(most, len(dataset)))]
    labels = np.concatenate([np.asarray(label) for label in some])
    return float((labels != -100).mean())


def _data_lines(data: DataFacts | None, reason: str, settings: Settings, options: PlanOptions) -> Iterator[str]:
    if data is None:
        yield f"data          not read: {reason}"
        return
    steps = _steps(data, settings, options)
    yield (
        f"data          {data.num_samples:,} samples, {data.num_tokens:,} tokens, the longest {data.longest:,}; about "
        f"{data.share_trained:.0%} of the tokens trained"
    )
    yield f"              {steps:,} steps an epoch, {data.num_tokens / steps:,.0f} tokens a step"


def _steps(data: DataFacts, settings: Settings, options: PlanOptions) -> int:
    dp = options.num_gpus // settings.tensor_parallel_dim
    per_step = settings.batch_size * settings.gradient_accumulation_steps * dp
    steps = -(-data.num_rows // per_step)
    return min(steps, settings.max_steps_per_epoch or steps)


def _memory_lines(memory: Memory, case: Case) -> Iterator[str]:
    rows = case.settings.batch_size
    what = {
        "weights": "a share of them",
        "gradients": "a share of them",
        "optimizer": str(case.cfg.optimizer["_component_"]),
        "gathered": "two layers, what is in no layer, gradients on their way",
        "activations": f"{rows} x {case.sequence:,} tokens, with the loss head; what the gradients' room does not hold",
    }
    yield "memory        of each GPU, at the fullest moment of a step, GiB"
    for name, note in what.items():
        yield f"  {name:<12}{getattr(memory, name) / _GIB:>8.2f}   {note}"
    other = f"assumed: {CONTEXT_BYTES / 1e9} GB, and {FRAGMENTATION:.0%} that is lost between blocks"
    yield f"  {'other':<12}{(memory.needed - memory.total) / _GIB:>8.2f}   {other}"
    fits = "fits" if memory.needed <= case.gpu.memory else "DOES NOT FIT"
    yield f"  {'in all':<12}{memory.needed / _GIB:>8.2f}   of {case.gpu.memory / _GIB:.1f}: {fits}"
    if case.settings.tensor_parallel_dim > 1:
        yield "              activations are those without tensor parallelism, which are more"


def _remedies(case: Case) -> Iterator[str]:
    """What would make it fit, each alone and reckoned in the same way; then how many GPUs would."""
    settings = case.settings
    changes: list[tuple[str, dict[str, Any]]] = []
    if not settings.enable_activation_checkpointing and settings.ac_mode is None:
        changes.append(("enable_activation_checkpointing=True", {"enable_activation_checkpointing": True}))
    if settings.batch_size > 1:
        changes.append(("batch_size=1", {"batch_size": 1}))
    if case.cfg.optimizer["_component_"] != _EIGHT_BIT:
        eight_bit = OmegaConf.create({"_component_": _EIGHT_BIT, "lr": 1e-5})
        changes.append((f"optimizer._component_={_EIGHT_BIT} ~optimizer.fused", {"optimizer": eight_bit}))
    if not settings.optimizer_in_bwd and settings.gradient_accumulation_steps == 1:
        changes.append(("optimizer_in_bwd=True clip_grad_norm=null", {"optimizer_in_bwd": True}))
    if not settings.fsdp_cpu_offload:
        changes.append(("fsdp_cpu_offload=True  (slow)", {"fsdp_cpu_offload": True}))
    if len(changes) > 2:
        together = {key: value for _, change in changes[:-1] for key, value in change.items()}
        changes.append(("all of these but the last", together))
    if case.cfg.get("adapter") is None and settings.tensor_parallel_dim == 1 and not settings.freeze:
        changes.append(("adapter.kind=lora adapter.rank=16", {"adapter": {"rank": 16}}))
        quantized = {"rank": 16, "quantize_base": True}
        changes.append(("adapter.kind=lora adapter.rank=16 adapter.quantize_base=True", {"adapter": quantized}))
    yield "to change     each alone, GiB of a GPU"
    for text, change in changes:
        yield _remedy(text, case.memory(**change), case.gpu)
    for num_gpus in (2**n * case.options.num_gpus for n in range(1, 7)):
        memory = case.memory(num_gpus=num_gpus)
        if memory.needed <= case.gpu.memory:
            yield _remedy(f"{num_gpus} GPUs", memory, case.gpu)
            break


def _remedy(text: str, memory: Memory, gpu: Gpu) -> str:
    return f"  {memory.needed / _GIB:>8.2f}   {'fits' if memory.needed <= gpu.memory else 'not enough':<11} {text}"


def _time_lines(case: Case, data: DataFacts) -> Iterator[str]:
    options = case.options
    with torch.device("meta"):
        model = parameter_setup(case.cfg).build(case.cfg, case.settings)
    steps = _steps(data, case.settings, options) * case.settings.epochs
    length = data.num_tokens / data.num_samples
    num_tokens = data.num_tokens * steps / (_steps(data, case.settings, options) or 1)
    seconds = num_tokens * operations(model, length) / (case.gpu.flops * options.mfu * options.num_gpus)
    dollars = seconds / 3600 * options.num_gpus * options.price_per_gpu_hour
    yield (
        f"time          {_duration(seconds)} for {case.settings.epochs} epochs ({steps:,} steps), about ${dollars:,.2f}"
    )
    yield (
        f"              assumed: {options.mfu:.0%} of {case.gpu.flops / 1e12:,.0f} TFLOP/s (plan.mfu), "
        f"${options.price_per_gpu_hour:.2f} a GPU-hour (plan.price_per_gpu_hour)"
    )
    yield "              loading, validation and saving come on top"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
