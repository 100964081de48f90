"""How much memory a training step takes on one GPU, found without weights: the step is run on tensors without content.

Everything that the forward and the backward pass make, the loss head included, is the code that trains, run under
torch's FakeTensorMode, which knows shapes and lifetimes and computes nothing. Where all layers are alike, every further
one takes what the one before it took, so two short models tell what a long one needs. What FSDP adds and what
optimizers keep is reckoned.
"""

import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtune.modules import TransformerDecoder

from torchtune_agent.config import instantiate
from torchtune_agent.data.collate import Batch, Collator
from torchtune_agent.losses import Objective
from torchtune_agent.models.experts import RoutedFeedForward, idle_weights
from torchtune_agent.training.parallel import checkpoint_activations
from torchtune_agent.training.settings import Settings

# What CUDA, its libraries and NCCL take before anything is trained, and what an allocator cannot use of the rest.
CONTEXT_BYTES = 1.5e9
FRAGMENTATION = 0.05

# Trained tokens of a sequence whose logits are really gone through; beyond these, every chunk is like the one before.
_MOST_TRAINED = 2048

_FIRST, _BETWEEN, _LAST = "first", "between", "last"  # parts of a pass

Build = Callable[[], TransformerDecoder]  # the model on the meta device, as the recipe builds it


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the fullest moment of a step."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float  # of other GPUs' shares, while they are used
    activations: float  # and the loss head, and whatever else lives for a moment; beyond the room for gradients

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    @property
    def needed(self) -> float:
        """With what no GPU does without."""
        return CONTEXT_BYTES + self.total * (1 + FRAGMENTATION)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a whole model's weights, and of the groups FSDP gathers."""

    num_parameters: int
    num_active: int  # those that a token meets
    num_trained: int
    weights: int
    trained: int
    largest_layer: int
    outside_layers: int
    largest_trained_layer: int

    @classmethod
    def of(cls, model: TransformerDecoder) -> "Sizes":
        layers = list(model.layers)
        every, trained = _bytes(model), _bytes(model, only_trained=True)
        num_parameters = sum(p.numel() for p in model.parameters())
        return cls(
            num_parameters=num_parameters,
            num_active=num_parameters - sum(number for _, number in idle_weights(model)),
            num_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            weights=every,
            trained=trained,
            largest_layer=max(map(_bytes, layers)),
            outside_layers=every - sum(map(_bytes, layers)),
            largest_trained_layer=max(_bytes(layer, only_trained=True) for layer in layers),
        )


def _bytes(module: nn.Module, *, only_trained: bool = False) -> int:
    return sum(_stored_bytes(p) for p in module.parameters() if p.requires_grad or not only_trained)


def memory_of(
    sizes: Sizes,
    settings: Settings,
    *,
    optimizer_ratio: float,
    num_gpus: int,
    activations: "Activations",
) -> Memory:
    """Of one step; for `optimizer_ratio` and `activations` see the functions of these names."""
    dp = max(1, num_gpus // settings.tensor_parallel_dim)
    on_gpu = 0.0 if settings.fsdp_cpu_offload else 1.0
    gradients = on_gpu * (sizes.largest_trained_layer if settings.optimizer_in_bwd else sizes.trained) / num_gpus
    if settings.optimizer_in_bwd or settings.gradient_accumulation_steps > 1:  # as many from the beginning of a pass
        beside = activations.at_most(0.0)
    else:
        beside = max(0.0, activations.at_most(on_gpu / num_gpus) - gradients)
    # A layer is gathered while the one before it is used. Its gradient is whole until every rank has its share, of
    # which there is a copy in the order that sending takes. What is in no layer stays gathered through the step.
    gathered = 2 * sizes.largest_layer + sizes.outside_layers + 2 * sizes.largest_trained_layer
    return Memory(
        weights=on_gpu * sizes.weights / num_gpus,
        gradients=gradients,
        optimizer=on_gpu * sizes.trained * optimizer_ratio / num_gpus,
        gathered=gathered / settings.tensor_parallel_dim if dp > 1 or settings.fsdp_cpu_offload else 0.0,
        activations=beside,
    )


def optimizer_ratio(cfg: DictConfig | Mapping[str, Any], dtype: torch.dtype) -> float:
    """Bytes an optimizer keeps for each byte of weights: those of a small weight after a step."""
    weight = nn.Parameter(torch.zeros(256, 256, dtype=dtype))
    weight.grad = torch.zeros_like(weight)
    optimizer = instantiate(cfg, "optimizer", [weight])
    with torch.compiler.set_stance("force_eager"):  # torchao's optimizers compile their step
        optimizer.step()
    kept = [t for t in tree_leaves(dict(optimizer.state[weight])) if isinstance(t, torch.Tensor)]
    return sum(map(_stored_bytes, kept)) / _stored_bytes(weight)


def _stored_bytes(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # a quantized state is several tensors
        names, _ = tensor.__tensor_flatten__()  # pyright: ignore
        return sum(_stored_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


Moments = list[tuple[float, float]]  # bytes that live, beside weights and whole gradients, and bytes of the latter


@dataclass(frozen=True)
class Activations:
    """What lives in a forward and a backward pass beside the weights.

    The fullest moment comes before the backward pass has left the last layer, or after it has reached the first:
    between them every layer gives back as much as the one before it, and makes gradients as large. Both moments grow
    alike with every layer more, so two short models tell of a long one.
    """

    short: Mapping[str, Moments]
    longer: Mapping[str, Moments]
    times: float  # what the longer has more than the short one, in the model

    def at_most(self, share: float) -> float:
        """At the fullest moment, with `share` of the gradients that there are by then."""
        found = []
        for part in (_FIRST, _LAST):
            short, longer = (
                max((living + share * gradients for living, gradients in of[part]), default=0.0)
                for of in (self.short, self.longer)
            )
            found.append(short + (longer - short) * self.times)
        return max(found)


def activations(
    build: Build, objective: Objective, settings: Settings, sequence: int, share_trained: float
) -> Activations:
    """What memory_of calls so."""
    unit = settings.ac_option or 1 if settings.ac_mode == "selective" else 1
    layers = list(build().layers)
    alike = len({tuple(p.shape for p in layer.parameters()) for layer in layers}) == 1

    if len(layers) <= 3 * unit or not alike:
        whole = _pass(build, objective, settings, sequence, share_trained, len(layers), None)
        return Activations(whole, whole, 0.0)
    short, longer = (_pass(build, objective, settings, sequence, share_trained, n * unit, unit) for n in (2, 3))
    return Activations(short, longer, len(layers) / unit - 2)


def _pass(
    build: Build,
    objective: Objective,
    settings: Settings,
    sequence: int,
    share_trained: float,
    num_layers: int,
    unit: int | None,
) -> Mapping[str, Moments]:
    """Of the model cut to some layers; with a `unit` of layers that are alike the parts of the backward pass apart."""
    model = build()
    model.layers = nn.ModuleList(list(model.layers)[:num_layers])
    restored = _without_quantization(model)
    checkpoint_activations(model, settings)
    rows = round(sequence * share_trained)
    some = min(rows, _MOST_TRAINED)
    batch = _batch(settings.batch_size, sequence, some)
    embedding = model.tok_embeddings.weight
    later = settings.batch_size * (rows - some) * embedding.shape[1] * embedding.element_size()
    with FakeTensorMode() as fake, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what a CPU has no fast way for
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        for module in model.modules():
            if hasattr(module, "rope_init"):
                module.rope_init()  # pyright: ignore
            if isinstance(module, RoutedFeedForward):
                module.assume_balance = True
        living = _Living([*model.parameters(), *model.buffers()])
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(living.take_gradient)
        if unit is not None:
            for layer, part in {num_layers - unit - 1: _BETWEEN, unit - 1: _LAST}.items():
                model.layers[layer].register_forward_hook(living.begin_at_backward(part))
        contents = {k: fake.from_tensor(v) for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
        with living:
            objective(model, replace(batch, **contents), with_statistics=True).loss_sum.backward()
    more = restored + 2 * later  # what comes in and its gradient
    return {part: [(most + more, gradients) for most, gradients in of] for part, of in living.moments.items()}


def _without_quantization(model: nn.Module) -> int:
    """Have quantized linears be plain ones, which FakeTensorMode knows. Returns the bytes of the largest: so much lives
    while one is made plain, in training one after the other."""
    largest = 0
    for module in model.modules():
        if getattr(module, "_quantize_base", False):
            module._quantize_base = False  # pyright: ignore
            weight: Any = module.weight
            largest = max(largest, weight.numel() * weight.element_size())
    return largest


def _batch(rows: int, sequence: int, num_trained: int) -> Batch:
    """Any tokens, the last of which are trained."""
    num_trained = max(1, min(num_trained, sequence - 1))
    sample = {"tokens": [0] * sequence, "labels": [-100] * (sequence - num_trained) + [0] * num_trained}
    return Collator(pad_id=0)([[sample]] * rows)


class _Living(TorchDispatchMode):
    """Adds up the bytes of all tensors that were made since and are not gone, and remembers the most there were."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.gradients = 0
        self.moments: dict[str, Moments] = {_FIRST: [(0, 0)], _BETWEEN: [], _LAST: []}
        self._part = _FIRST
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    @property
    def peak(self) -> float:
        """Without gradients."""
        return max(living for of in self.moments.values() for living, _ in of)

    def take_gradient(self, parameter: torch.Tensor) -> None:
        """It is whole: from here on it is counted apart."""
        assert parameter.grad is not None
        size = _stored_bytes(parameter.grad)
        parameter.grad = None
        self.gradients += size
        self.moments[self._part].append((self.now - size, self.gradients))  # autograd holds it a little longer

    def begin_at_backward(self, part: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        """A forward hook: when the backward pass comes to the module, `part` of it begins."""

        def begin(_: torch.Tensor) -> None:
            self._part = part
            self.moments[part].append((self.now, self.gradients))

        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(begin)

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        most, gradients = self.moments[self._part][-1]
        self.moments[self._part][-1] = (max(most, self.now), gradients)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size
