"""A feed-forward layer of many experts, of which a router picks a few for every token, as Qwen3's mixtures have it.

The experts of a layer are three stacked weights: FSDP then has few large parameters to gather, each divided by experts,
and one grouped product serves all of them. Tokens are sorted by expert before it and put back after it. Both directions
are written as reads, in the backward pass too: adding into rows from many threads would come out different each time.
No loss balances the experts, which is what `transformers` does too unless it is asked for router logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

_ALIGNED = 8  # bf16 numbers in 16 bytes: rows of whatever a grouped product reads must be a multiple of that


@dataclass(frozen=True)
class Experts:
    """Which layers have experts, how many, and how they are picked."""

    number: int
    per_token: int
    intermediate_dim: int
    normalized: bool  # whether the scores of a token's experts are made to add up to one
    layers: tuple[bool, ...]  # False: a layer with a plain feed-forward


class Router(nn.Module):
    """Scores experts, and names the best of them. No nn.Linear, so that no adapter is put on it."""

    def __init__(self, embed_dim: int, experts: Experts) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts.number, embed_dim))
        self._experts = experts
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`x` [tokens, dim] -> scores and experts, [tokens, per_token] both."""
        probabilities = F.linear(x, self.weight).softmax(-1, dtype=torch.float32)
        scores, chosen = probabilities.topk(self._experts.per_token, dim=-1)
        if self._experts.normalized:
            scores = scores / scores.sum(-1, keepdim=True)
        return scores.to(x.dtype), chosen


class ExpertStacks(nn.Module):
    """The weights of all experts of a layer; w1, w2 and w3 are gate, down and up, as in torchtune's FeedForward."""

    def __init__(self, embed_dim: int, experts: Experts) -> None:
        super().__init__()
        number, hidden = experts.number, experts.intermediate_dim
        self.w1 = nn.Parameter(torch.empty(number, hidden, embed_dim))
        self.w2 = nn.Parameter(torch.empty(number, embed_dim, hidden))
        self.w3 = nn.Parameter(torch.empty(number, hidden, embed_dim))
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)


class RoutedFeedForward(nn.Module):
    """The sum of what a token's experts make of it, each times its score."""

    def __init__(self, embed_dim: int, experts: Experts) -> None:
        super().__init__()
        self.router = Router(embed_dim, experts)
        self.experts = ExpertStacks(embed_dim, experts)
        self.settings = experts
        self.assume_balance = False  # for plans, whose tensors have no content: as if experts had equally many tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, -2)  # [tokens, dim]
        scores, chosen = self.router(tokens)
        in_one = x.dtype == torch.bfloat16 and all(size % _ALIGNED == 0 for size in self.experts.w1.shape[1:])
        order = Order.of(chosen, self.settings.number, spare_rows=in_one)
        rows = Spread.apply(tokens, order.tokens, order.places)
        scores = Spread.apply(scores.view(-1, 1), order.picks, order.places.view(-1, 1))
        run: Any = self._in_one if in_one else self._one_by_one
        return Gather.apply(run(rows, scores, order.ends), order.tokens, order.places).view_as(x)

    def _in_one(self, rows: torch.Tensor, scores: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        w1, w2, w3 = (w.transpose(1, 2) for w in (self.experts.w1, self.experts.w2, self.experts.w3))
        hidden = F.silu(F.grouped_mm(rows, w1, offs=ends)) * F.grouped_mm(rows, w3, offs=ends)
        return F.grouped_mm(hidden * scores, w2, offs=ends)

    @torch.compiler.disable  # its sizes change with every step
    def _one_by_one(self, rows: torch.Tensor, scores: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """The same for types that a grouped product does not take; waits for the device once, for the sizes."""
        if self.assume_balance:
            ends_here = [len(rows) * (n + 1) // len(ends) for n in range(len(ends))]
        else:
            ends_here = ends.tolist()
        sizes = [end - start for start, end in zip([0, *ends_here], ends_here, strict=False)]
        # Unbound, not indexed: the gradient of every single index would be as large as the stack.
        weights = zip(*(w.unbind() for w in (self.experts.w1, self.experts.w2, self.experts.w3)), strict=True)
        return torch.cat(
            [
                F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3) * score, w2)
                for x, score, (w1, w2, w3) in zip(rows.split(sizes), scores.split(sizes), weights, strict=True)
                if len(x)
            ]
        )


def idle_weights(model: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """Every stack of experts in `model`, and how many of its numbers a token does not meet."""
    for module in model.modules():
        if isinstance(module, RoutedFeedForward):
            number, per_token = module.settings.number, module.settings.per_token
            for stack in module.experts.parameters():
                yield stack, stack.numel() // number * (number - per_token)


class Order(NamedTuple):
    """How the picks of all tokens, one row each, stand when they are sorted by expert."""

    picks: torch.Tensor  # [rows]: the pick a row is, counted over tokens
    tokens: torch.Tensor  # [rows]: its token
    places: torch.Tensor  # [tokens, per_token]: where the pick is
    ends: torch.Tensor  # [experts]: the row after an expert's last

    @classmethod
    def of(cls, chosen: torch.Tensor, num_experts: int, *, spare_rows: bool) -> "Order":
        """With `spare_rows` every expert has a row more, of no token: the gradient that a grouped product gives an
        expert without rows is not zero on every GPU. Such a row's pick and token are one beyond the last."""
        every = torch.arange(num_experts, device=chosen.device)
        spare = every if spare_rows else every[:0]
        experts, order = torch.cat([chosen.flatten(), spare]).sort(stable=True)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return cls(
            picks=order.clamp(max=chosen.numel()),
            tokens=(order // chosen.shape[1]).clamp(max=len(chosen)),
            places=places[: chosen.numel()].view_as(chosen),
            ends=torch.searchsorted(experts, every, right=True, out_int32=True),
        )


def _spread(values: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    return F.pad(values, (0, 0, 0, 1))[sources]


def _gather(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return rows[places].sum(1)


class Spread(torch.autograd.Function):
    """Every row the value it comes from; zero for a spare one."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, sources: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        return _spread(values, sources)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # pyright: ignore
        return _gather(grad, ctx.saved_tensors[0]), None, None


class Gather(torch.autograd.Function):
    """Every value the sum of its rows."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sources: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(sources)
        return _gather(rows, places)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # pyright: ignore
        return _spread(grad, ctx.saved_tensors[0]), None, None
