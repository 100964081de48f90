"""Facility location: picks that leave every sample a similar one, by lazy greedy.

Maximizes the sum over clients of the similarity of each to the nearest pick, (1 + cosine) / 2. Gains only shrink as
picks are added, so old gains are upper bounds, and only the samples with the largest are looked at again, a block at a
time. Clients are all samples, or beyond a number a seeded draw of them: the sum is then an estimate of the whole one,
and everything else stays exact.
"""

import numpy as np
import torch

_BLOCK = 512
MOST_CLIENTS = 8192


def facility_location(
    vectors: torch.Tensor,
    number: int,
    given: torch.Tensor | None = None,
    *,
    clients: torch.Tensor | None = None,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Pick `number` rows of `vectors` [n, d], each of length 1; returns them and the gain of each, in order of picking.

    `given` [m, d] are picks that are there already, `clients` [c, d] who is to be served (None: `vectors`). Of equal
    gains the first row is picked.
    """
    clients = vectors if clients is None else clients
    if len(clients) > MOST_CLIENTS:
        drawn = np.random.default_rng(seed).choice(len(clients), MOST_CLIENTS, replace=False)
        clients = clients[torch.from_numpy(np.sort(drawn)).to(vectors.device)]
    served = torch.zeros(len(clients), device=vectors.device)
    for block in () if given is None or not len(given) else given.split(_BLOCK):
        served = torch.maximum(served, _similarity(block, clients).amax(0))
    bound = torch.cat([_gains(block, clients, served) for block in vectors.split(_BLOCK)])
    picks: list[int] = []
    gains: list[float] = []
    current = torch.ones(len(vectors), dtype=torch.bool, device=vectors.device)  # bounds that are the gains of now
    size = 8
    while len(picks) < number:
        best = int(bound.argmax())
        if not current[best]:
            rows = bound.topk(min(size, len(bound))).indices
            size = min(2 * size, _BLOCK)
            rows = rows[~current[rows] & (bound[rows] >= 0)]
            bound[rows] = _gains(vectors[rows], clients, served)
            current[rows] = True
            continue
        picks.append(best)
        gains.append(float(bound[best]))
        served = torch.maximum(served, _similarity(vectors[best : best + 1], clients)[0])
        bound[best] = -1.0
        current[:] = False
        size = 8
    return np.array(picks, np.int64), np.array(gains) / max(1, len(clients))


def _similarity(vectors: torch.Tensor, clients: torch.Tensor) -> torch.Tensor:
    return torch.mm(vectors, clients.t()).add_(1).div_(2).clamp_(min=0)


def _gains(vectors: torch.Tensor, clients: torch.Tensor, served: torch.Tensor) -> torch.Tensor:
    return (_similarity(vectors, clients) - served).clamp_(min=0).sum(1)
