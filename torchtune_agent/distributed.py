"""The only module that calls collectives.

Everything else asks the World: who am I, what is the sum over all data-parallel ranks, did every rank
come this far. One process without torchrun is a world of one.
"""

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from torchtune_agent.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place: ranks along data (dp) and tensor (tp) parallelism, and the device it drives."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dp_size(self) -> int:
        return self.mesh["dp"].size()

    @property
    def dp_rank(self) -> int:
        return self.mesh["dp"].get_local_rank()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over data-parallel ranks, in place; lives on `tensor`'s device."""
        if self.dp_size > 1:
            dist.all_reduce(tensor, group=self.mesh["dp"].get_group())
        return tensor

    def gather(self, item: T) -> list[T]:
        """Every data-parallel rank's item. Pickled on its way: for small things, now and then."""
        items: list[Any] = [None] * self.dp_size
        dist.all_gather_object(items, item, group=self.mesh["dp"].get_group())
        return items

    def tally(self, counts: torch.Tensor, raised: bool) -> tuple[list[float], bool]:
        """Counts summed over data-parallel ranks, and whether any rank at all has `raised` its hand: one collective,
        on the host."""
        is_counted = self.mesh["tp"].get_local_rank() == 0  # ranks that share a model have the same counts
        own = torch.tensor([float(raised)], dtype=torch.float64)
        total = torch.cat([counts if is_counted else torch.zeros_like(counts), own])
        if self.size > 1:
            dist.all_reduce(total)
        *sums, hands = total.tolist()
        return sums, hands > 0

    def any(self, raised: bool) -> bool:
        """Whether `raised` is true on any rank."""
        return self.tally(torch.empty(0, dtype=torch.float64), raised)[1]

    def barrier(self) -> None:
        dist.barrier()


def rank_from_environment() -> int:
    return int(os.environ.get("RANK", 0))


@contextmanager
def process_group(device: str, timeout_seconds: float = 600) -> Iterator[tuple[int, int]]:
    """The default process group for `device`: NCCL for CUDA tensors, gloo for CPU ones; yields (rank, size).

    A rank that has waited `timeout_seconds` for another gives up. The group is not taken down after an exception:
    that would wait for ranks which wait for this one.
    """
    on_cuda = device.startswith("cuda") and torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    timeout = timedelta(seconds=timeout_seconds)
    if "RANK" in os.environ:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))  # pyright: ignore
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun keeps its store when it restarts workers, and in it the addresses of those that are gone. On
            # several machines the counts of restarts differ; there our launcher asks for a new store.
            prefix = f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
            store = dist.PrefixStore(prefix, store)  # pyright: ignore
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    yield dist.get_rank(), dist.get_world_size()
    dist.barrier()
    gc.collect()  # a model's cycles hold on to communication, which must be gone before the interpreter is
    dist.destroy_process_group()


class SharedNotes:
    """Short texts, one for each rank, that all can read at any time, also while a collective hangs."""

    def __init__(self, name: str) -> None:
        self._store = dist.distributed_c10d._get_default_store().clone()  # pyright: ignore  (a connection that no collective holds)
        self._name = name

    def write(self, rank: int, text: str) -> None:
        self._store.set(f"{self._name}/{rank}", text)

    def read_others(self, rank: int, size: int) -> list[str]:
        """The texts of those other ranks that have written one."""
        keys = [f"{self._name}/{other}" for other in range(size) if other != rank]
        if not self._store.check(keys):  # at the very start: asking for one that is missing would wait for it
            keys = [key for key in keys if self._store.check([key])]
        return [text.decode() for text in self._store.multi_get(keys)] if keys else []

    def claim(self, what: str) -> bool:
        """True for the first of all ranks that asks."""
        mark = f"claimed-{os.getpid()}-{dist.get_rank()}"
        return self._store.compare_set(f"{self._name}/{what}", "", mark) == mark.encode()


def _by_mesh(parameters: Iterable[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    by_mesh: dict[Any, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
    return list(by_mesh.values())


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """The norm of all gradients together, the same on every rank.

    torch's own `clip_grad_norm_` takes no parameters on different meshes, which tensor parallelism makes.
    """
    norms = [
        torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in _by_mesh(parameters)
    ]
    return torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float, norm: torch.Tensor) -> None:
    """Scale all gradients, whose norm is `norm`, so that it is at most `max_norm`."""
    for group in _by_mesh(parameters):
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)


@dataclass(frozen=True)
class VocabularyShare:
    """The rows of an output's weight that this rank has, where tensor parallelism splits the vocabulary."""

    mesh: DeviceMesh
    first_id: int
    width: int  # of the largest share

    @classmethod
    def of(cls, weight: DTensor) -> "VocabularyShare | None":
        """None where every rank has the whole weight."""
        (placement,) = weight.placements
        if placement.is_replicate():
            return None
        assert placement.is_shard(0), f"an output weight placed as {placement}"
        width = -(-weight.shape[0] // weight.device_mesh.size())
        return cls(weight.device_mesh, weight.device_mesh.get_local_rank() * width, width)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The `rows` of every rank, stacked in a new first dimension."""
        gathered = rows.new_empty(self.mesh.size() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous(), group=self.mesh.get_group())
        return gathered.unflatten(0, (self.mesh.size(), len(rows)))


def replicate(tensor: torch.Tensor, mesh: DeviceMesh, *, partial_gradient: bool) -> torch.Tensor:
    """`tensor`, whole on every rank of `mesh`, for work of which every rank does a share.

    With `partial_gradient` the gradients that come back are each rank's share of it, and are added up.
    """
    if not isinstance(tensor, DTensor):
        tensor = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    whole = tensor.redistribute(placements=[Replicate()])
    return whole.to_local(grad_placements=[Partial() if partial_gradient else Replicate()])


def make_mesh(device_type: str, dp: int, tp: int) -> DeviceMesh:
    return init_device_mesh(device_type, (dp, tp), mesh_dim_names=("dp", "tp"))


def own_group() -> dist.ProcessGroup:
    """A second group of all ranks, on the host, for work beside the training collectives."""
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


def collected(item: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's item. Pickled on its way: for small things, now and then."""
    items: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(items, item, group=group)
    return items


def together(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `work` on every rank; where it fails on one with a UserError, raise the first such error on all.

    `work` must not call collectives itself: a rank that failed would not take part in them.
    """
    result: T | None = None
    mistake: str | None = None
    try:
        result = work()
    except UserError as error:
        mistake = str(error)
    first = next((m for m in collected(mistake, group) if m is not None), None)
    if first is not None:
        raise UserError(first)
    return result  # type: ignore[return-value]


def on_main(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `work` on rank 0 alone and give every rank what it returns (see `collected`), or its UserError."""
    result = together(lambda: work() if dist.get_rank() == 0 else None, group)
    return collected(result, group)[0]  # type: ignore[return-value]
