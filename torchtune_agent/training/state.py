"""What a run is, between two steps: everything a checkpoint holds, and how a run takes it up again.

Tensors that are split over ranks go into one folder, which any number of ranks can read (see sharded.py). What is the
run's goes into `run.pt`: how far it is, the optimizer's plain values, the schedule, and what the data and the objective
declare as state. What is a rank's goes into `rank_N.pt`: its random generators, and sums not yet logged.
"""

import io
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import nn
from torch.distributed.tensor import DTensor

from torchtune_agent.data.loader import BatchSource, num_steps
from torchtune_agent.errors import UserError
from torchtune_agent.training import sharded
from torchtune_agent.training.checkpoints import Checkpoint, Damaged
from torchtune_agent.training.optimizer import Stepper
from torchtune_agent.training.settings import Settings

T = TypeVar("T")

TENSORS = "tensors"
RUN = "run.pt"
_PLAIN = (type(None), bool, int, float, str, torch.Tensor)


@runtime_checkable
class Stateful(Protocol):
    """A data source or objective that changes as the run goes on (a replay buffer, reference statistics).

    Its state is the run's: equal on every rank, made of plain values, lists, dicts and tensors. Every rank asks for it
    at the same time, so that what is sharded can be put together.
    """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass
class Position:
    """How far a run is, on a step boundary. Rows are counted as the data orders them, so any number of ranks can go on
    from here."""

    step: int = 0
    epoch: int = 0  # epochs that are done
    steps_in_epoch: int = 0
    rows: int = 0  # trained in the epoch that has begun
    owes_validation: bool = False  # what is due after this step, the epoch's end included, is still to be done
    tokens: int = 0  # of all steps, on all ranks
    supervised: int = 0  # of these, those that were trained

    def advance(self, source: BatchSource) -> None:
        """One more step of the epoch is done."""
        self.steps_in_epoch += 1
        self.rows = min(self.rows + source.rows_per_step, source.num_rows)

    def end_epoch(self) -> None:
        self.epoch, self.steps_in_epoch, self.rows, self.owes_validation = self.epoch + 1, 0, 0, False


def steps_left_in_epoch(position: Position, source: BatchSource, settings: Settings) -> int:
    left, limit = num_steps(source, position.rows), settings.max_steps_per_epoch
    return left if limit is None else max(0, min(left, limit - position.steps_in_epoch))


def steps_left(position: Position, source: BatchSource, settings: Settings) -> int:
    """Until the end of the run."""
    epochs = settings.epochs - position.epoch
    if epochs <= 0:
        return 0
    later = steps_left_in_epoch(Position(), source, settings) * (epochs - 1)
    return steps_left_in_epoch(position, source, settings) + later


@dataclass(frozen=True)
class Snapshot:
    """What this rank writes of a checkpoint: its shards of tensors, and files."""

    tensors: dict[str, torch.Tensor]
    files: dict[str, bytes]


def rank_file(rank: int) -> str:
    return f"rank_{rank}.pt"


def to_bytes(value: Any) -> bytes:
    """`value` in a form that is read back without executing anything; other values than plain ones are a mistake."""
    _check_plain(value, "state")
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def read_plain(path: Path) -> Any:
    """What `to_bytes` wrote."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that was made to look sound can raise anything
        raise Damaged(f"{path.name} cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0]})") from error


def sound(checkpoint: Checkpoint, work: Callable[[], T]) -> Callable[[], T]:
    """`work`, which reads `checkpoint`; what it cannot read is said as the user's to mend."""

    def run() -> T:
        try:
            return work()
        except Damaged as error:
            raise UserError(
                f"{checkpoint.path}: cannot be resumed from: {error}. Name another checkpoint by "
                "resume_from_checkpoint=PATH."
            ) from error

    return run


def _check_plain(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_plain(key, where)
            _check_plain(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}[{i}]")
    elif not isinstance(value, _PLAIN):
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds plain values and tensors only")


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the run trains, and buffers: frozen weights are loaded from where they came from."""
    frozen = {name for name, value in model.state_dict(keep_vars=True).items() if _is_frozen(value)}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def has_frozen(model: nn.Module) -> bool:
    return any(_is_frozen(parameter) for parameter in model.parameters())


def _is_frozen(value: torch.Tensor) -> bool:
    return isinstance(value, nn.Parameter) and not value.requires_grad


def tensors_of(model: nn.Module, stepper: Stepper) -> dict[str, torch.Tensor]:
    """This rank's part of every tensor, under a name that is the same in every run of the same model."""
    tensors = {f"model.{name}": value for name, value in model_tensors(model).items()}
    for optimizer in stepper.optimizers:
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                if isinstance(value, torch.Tensor):
                    _check_sharded(parameter, value, type(optimizer).__name__, key)
                    tensors[f"optimizer.{key}.{stepper.names[parameter]}"] = value
    return tensors


def _check_sharded(parameter: torch.Tensor, value: torch.Tensor, optimizer: str, key: str) -> None:
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor) and value.ndim > 0:
        if parameter.device_mesh.size() > 1:
            raise TypeError(
                f"{optimizer} keeps '{key}' of each rank's shard apart; such a state cannot be put together again"
            )


def optimizer_values(stepper: Stepper) -> list[dict[str, Any]]:
    """Of every optimizer: the options of its groups, what it keeps of a parameter beside tensors, and which tensors
    (with the device, where that is not the parameter's)."""
    found = []
    for optimizer in stepper.optimizers:
        groups = [
            {**{key: value for key, value in group.items() if key != "params"}, "params": _names(stepper, group)}
            for group in optimizer.param_groups
        ]
        state: dict[str, dict[str, Any]] = {}
        for parameter, values in optimizer.state.items():
            plain = {key: value for key, value in values.items() if not isinstance(value, torch.Tensor)}
            devices = {
                key: "same" if value.device == parameter.device else value.device.type
                for key, value in values.items()
                if isinstance(value, torch.Tensor)
            }
            state[stepper.names[parameter]] = {"values": plain, "devices": devices}
        found.append({"groups": groups, "state": state})
    return found


def _names(stepper: Stepper, group: Mapping[str, Any]) -> list[str]:
    return [stepper.names[parameter] for parameter in group["params"]]


def restore_tensors(
    checkpoint: Path, model: nn.Module, stepper: Stepper, run: Mapping[str, Any], group: dist.ProcessGroup
) -> None:
    """Fill the model, and make the optimizer's tensors, from a checkpoint of any number of ranks."""
    folder = checkpoint / TENSORS
    layout = sharded.read_layout(folder).state_dict_metadata
    tensors = {f"model.{name}": value for name, value in model_tensors(model).items()}
    parameters = {name: parameter for parameter, name in stepper.names.items()}
    if len(run["optimizers"]) != len(stepper.optimizers):
        raise Damaged("it was made with another optimizer_in_bwd; optimizers cannot be split or joined")
    for optimizer, saved in zip(stepper.optimizers, run["optimizers"], strict=True):
        for name, kept in saved["state"].items():
            own: dict[str, Any] = dict(kept["values"])
            for key, device in kept["devices"].items():
                full = f"optimizer.{key}.{name}"
                properties: Any = layout.get(full)
                if properties is None or name not in parameters:
                    raise Damaged(f"its optimizer's {full} has no place in this run")
                own[key] = tensors[full] = _empty(
                    parameters[name], properties.size, properties.properties.dtype, device
                )
            optimizer.state[parameters[name]] = own
    if set(layout) != set(tensors):
        names = sorted(set(layout) ^ set(tensors))
        raise Damaged(f"its tensors are not this model's: {', '.join(names[:3])}, {len(names)} in all")
    sharded.load(folder, tensors, group)


def _empty(parameter: torch.Tensor, size: torch.Size, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Room for an optimizer's tensor: split like its parameter where it has the parameter's shape."""
    if size == parameter.shape and parameter.ndim > 0:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(size, dtype=dtype, device=parameter.device if device == "same" else device)


def restore_schedule(
    stepper: Stepper, run: Mapping[str, Any], cfg: DictConfig, settings: Settings, *, num_steps: int
) -> None:
    """Take up the optimizers' options and the schedules. What the user sets anew is new: then a schedule is made for
    the step that the run is at, by its new settings."""
    section, step = cfg.get("lr_scheduler"), run["position"]["step"]
    if settings.resume_override or run["num_steps"] != num_steps:
        _restore_options(stepper, run, settings.resume_override)
        stepper.schedule(section, num_steps=num_steps, steps_done=step)
        return
    stepper.schedule(section, num_steps=num_steps)
    _restore_options(stepper, run)  # after the schedule, which has set the rates of a first step
    for schedule, kept in zip(stepper.schedules, run["schedules"], strict=True):
        schedule.load_state_dict(kept)


def _restore_options(stepper: Stepper, run: Mapping[str, Any], overridden: Sequence[str] = ()) -> None:
    new = {key.removeprefix("optimizer.") for key in overridden}
    if "lr" in new:
        new.add("initial_lr")
    for optimizer, saved in zip(stepper.optimizers, run["optimizers"], strict=True):
        if [_names(stepper, group) for group in optimizer.param_groups] != [g["params"] for g in saved["groups"]]:
            raise Damaged("its optimizer has other groups of parameters than this run's")
        for group, options in zip(optimizer.param_groups, saved["groups"], strict=True):
            for key, value in options.items():
                if key == "params" or key in new or "optimizer" in new:
                    continue
                if isinstance(group.get(key), torch.Tensor):
                    group[key].copy_(torch.as_tensor(value))
                else:
                    group[key] = value


def schedule_states(stepper: Stepper) -> list[dict[str, Any]]:
    return [schedule.state_dict() for schedule in stepper.schedules]


def random_state(device: torch.device) -> dict[str, Any]:
    """Of every generator a rank draws from."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_random(state: Mapping[str, Any], device: torch.device) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def declared(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The states of those that declare one."""
    return {name: part.state_dict() for name, part in parts.items() if isinstance(part, Stateful)}


def restore_declared(parts: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    for name, part in parts.items():
        if isinstance(part, Stateful):
            if name not in states:
                raise Damaged(f"it holds no state of the run's {name}")
            part.load_state_dict(states[name])


def run_values(position: Position, num_steps: int, stepper: Stepper, parts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "position": asdict(position),
        "num_steps": num_steps,
        "optimizers": optimizer_values(stepper),
        "schedules": schedule_states(stepper),
        "parts": declared(parts),
    }
