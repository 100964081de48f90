"""Streaming Sample Importance Scorer: how much a sample that arrives is worth keeping and replaying.

I = 0.4 U + 0.3 D + 0.3 F, where
  U  the sample's loss under the current model, normalised
  D  its smallest distance to the embeddings of the last 1,000 samples, normalised
  F  its forgetting risk, normalised: sum of Fisher information times squared gradient, over the parameters
A quantity x is normalised to x / (x + its mean over the window): 0 where there is nothing, 1/2 for the average sample,
towards 1 for extremes, whatever the unit. So all three count as much as their weights say, all through a run.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from torchtune_agent.continual.fisher import DiagonalFisher, sample_gradients
from torchtune_agent.data.collate import Batch
from torchtune_agent.distributed import World
from torchtune_agent.errors import UserError
from torchtune_agent.losses import Objective
from torchtune_agent.losses.head import Chunking, Projection, log_p
from torchtune_agent.losses.output import at_output

_BLOCK = 256  # samples whose distances to the window are held at a time


class Signals(NamedTuple):
    """What is measured of samples."""

    losses: torch.Tensor  # [n], per trained token
    embeddings: torch.Tensor  # [n, width]
    risks: torch.Tensor  # [n]


class Scores(NamedTuple):
    importance: torch.Tensor  # [n], in [0, 1], as are its parts
    uncertainty: torch.Tensor  # [n]
    diversity: torch.Tensor  # [n]
    forgetting: torch.Tensor  # [n]


class ImportanceScorer:
    """Scores samples against a sliding window of those before. `score` changes nothing; `update` slides the window."""

    def __init__(self, window: int = 1000, weights: tuple[float, float, float] = (0.4, 0.3, 0.3)) -> None:
        if window < 1:
            raise UserError(f"ssis.window={window}: must be at least 1.")
        if min(weights) < 0 or abs(sum(weights) - 1) > 1e-9:
            raise UserError(f"ssis.weights={list(weights)}: must be three numbers of 0 or more that add up to 1.")
        self._size, self._weights = window, weights
        self._window: Signals | None = None
        self._distances = torch.zeros(0)  # of the samples in the window, to those before them when they came

    def score(self, signals: Signals) -> Scores:
        """Every sample against the window alone, not against the others that are scored with it."""
        window = self._window
        distances = self.distances(signals.embeddings)
        parts = (
            _normalised(signals.losses, None if window is None else window.losses),
            _normalised(distances, self._distances.to(distances.device)),
            _normalised(signals.risks, None if window is None else window.risks),
        )
        importance = sum((weight * part for weight, part in zip(self._weights, parts, strict=True)), torch.zeros(()))
        return Scores(importance, *parts)

    def distances(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Of every sample, the smallest distance to the window; infinite while that is empty."""
        if self._window is None:
            return embeddings.new_full((len(embeddings),), float("inf"))
        known = self._window.embeddings
        blocks = [torch.cdist(block, known).amin(1) for block in embeddings.to(known).split(_BLOCK)]
        return torch.cat(blocks) if blocks else embeddings.new_zeros(0)

    def update(self, signals: Signals) -> None:
        """The samples have come: they are the newest of the window."""
        distances = self.distances(signals.embeddings)
        finite = distances[distances.isfinite()]
        self._distances = torch.cat([self._distances.to(finite), finite])[-self._size :]
        old = self._window
        self._window = Signals(
            *(
                (new.detach().clone() if old is None else torch.cat([old[i], new.detach().to(old[i])]))[-self._size :]
                for i, new in enumerate(signals)
            )
        )

    def state_dict(self) -> dict[str, Any]:
        window = None if self._window is None else {k: v.cpu() for k, v in self._window._asdict().items()}
        return {"window": window, "distances": self._distances.cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        window = state["window"]
        self._window = None if window is None else Signals(**{k: v.clone() for k, v in window.items()})
        self._distances = state["distances"].clone()


def _normalised(values: torch.Tensor, window: torch.Tensor | None) -> torch.Tensor:
    """values / (values + mean of the window); without a window all are average, and what is infinite is 1."""
    if window is None or len(window) == 0:
        return torch.where(values.isinf(), 1.0, 0.5).to(values)
    mean = window.mean()
    shares = values / (values + mean)
    shares = torch.where(values.isinf(), torch.ones_like(shares), shares)
    return torch.where((values == 0) & (mean == 0), torch.zeros_like(shares), shares)


@torch.no_grad()
def losses_and_embeddings(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every sample of a batch, from one forward pass: the mean loss of its trained tokens [num_samples], and the
    mean of the hidden states that predict them [num_samples, width]. A sample that trains nothing has zeros."""
    labels = batch.labels.flatten()[batch.supervised]
    samples = batch.sample_index.flatten()[batch.supervised].long()
    counts = torch.bincount(samples, minlength=batch.num_samples).clamp(min=1)

    def compute(projection: Projection) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, nll = projection.terms[0].float(), -log_p(projection, labels, Chunking()).float()
        losses = nll.new_zeros(batch.num_samples).index_add_(0, samples, nll)
        sums = hidden.new_zeros(batch.num_samples, hidden.shape[1]).index_add_(0, samples, hidden)
        return losses / counts, sums / counts[:, None]

    return at_output(model, batch, compute)  # pyright: ignore[reportReturnType]


def measure(
    model: nn.Module,
    objective: Objective,
    samples: Iterable[Batch],
    fisher: DiagonalFisher,
    world: World,
    *,
    learn: bool = False,
) -> Signals:
    """The signals of samples, given as batches of one, the same on every rank. Does not change the model, nor `fisher`
    unless that is to `learn` of every sample once its risk is measured.

    Each costs a forward pass, and a forward and a backward one for its gradient.
    """
    samples = list(samples)
    was_training = model.training
    model.eval()
    pairs = [losses_and_embeddings(model, sample.to(world.device)) for sample in samples]
    model.train(was_training)
    risks: list[torch.Tensor] = []
    for gradients in sample_gradients(model, objective, samples):
        risks.append(world.sum(fisher.risk(gradients).to(world.device)))
        if learn:
            fisher.add(gradients)
    return Signals(
        torch.cat([losses for losses, _ in pairs]),
        torch.cat([embeddings for _, embeddings in pairs]),
        torch.stack(risks).float(),
    )
