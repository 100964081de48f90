"""The importance of a sample as SSIS defines it: I = 0.4 U + 0.3 D + 0.3 F.

  U  its loss under the model
  D  the smallest distance of its embedding to a sliding window of the 1,000 samples before it in the pool
  F  how much the model would forget by learning it, by a diagonal Fisher estimate

The method estimates F from gradients of weights as samples arrive. A pool of scores has no gradients, but what the
last layer's come from: of a token with hidden state h the gradient of the output weight is (p - onehot) h, and the
length of its first factor is 1 - p[label] times something between 1 and the square root of 2. So the gradient of
sample i is taken to be g_i = error_i * embedding_i (its mean 1 - p[label] times its mean hidden state), the Fisher
information of dimension j is the pool's mean of g_ij squared, and F_i = sum over j of fisher_j * g_ij squared: a sample
is risky where it would move what all others lean on. This sees the output layer alone and a mean per sample; it is an
estimate of the estimate, and large where U is large. Computed from the whole pool, it does not depend on its order.

Each of the three is scaled so that the pool's quantiles of 1 % and 99 % become 0 and 1.
"""

import numpy as np
import torch

WEIGHTS = {"loss": 0.4, "distance": 0.3, "forgetting": 0.3}
WINDOW = 1000
_BLOCK = 512


def importance(loss: np.ndarray, error: np.ndarray, embeddings: torch.Tensor, window: int = WINDOW) -> np.ndarray:
    """Of every sample, in the order of the pool; `embeddings` [n, d] of length 1."""
    return (
        WEIGHTS["loss"] * scaled(loss)
        + WEIGHTS["distance"] * scaled(window_distance(embeddings, window))
        + WEIGHTS["forgetting"] * scaled(forgetting_risk(error, embeddings))
    )


def forgetting_risk(error: np.ndarray, embeddings: torch.Tensor) -> np.ndarray:
    errors = torch.from_numpy(error).to(embeddings)
    fisher = torch.zeros(embeddings.shape[1], dtype=torch.float64, device=embeddings.device)
    for vectors, own in zip(embeddings.split(65536), errors.split(65536), strict=True):
        fisher += (vectors * own[:, None]).square().sum(0, dtype=torch.float64)
    fisher = (fisher / max(1, len(embeddings))).to(embeddings)
    return ((embeddings.square() @ fisher) * errors.square()).cpu().numpy().astype(np.float64)


def window_distance(embeddings: torch.Tensor, window: int = WINDOW) -> np.ndarray:
    """The distance of every sample to the nearest of the `window` before it; the first one's is the largest there is
    between others."""
    number = len(embeddings)
    found = torch.full((number,), torch.inf, device=embeddings.device)
    place = torch.arange(number, device=embeddings.device)
    for start in range(0, number, _BLOCK):
        rows = slice(start, min(start + _BLOCK, number))
        before = slice(max(0, start - window), rows.stop)
        squared = 2 - 2 * embeddings[rows] @ embeddings[before].t()
        age = place[rows, None] - place[None, before]
        squared.masked_fill_((age < 1) | (age > window), torch.inf)
        found[rows] = squared.amin(1)
    distance = found.clamp_(min=0).sqrt_().cpu().numpy().astype(np.float64)
    known = np.isfinite(distance)
    distance[~known] = distance[known].max(initial=0.0)
    return distance


def scaled(values: np.ndarray) -> np.ndarray:
    """`values` so that their quantiles of 1 % and 99 % become 0 and 1, and what is beyond them too. Equal ones: 0."""
    low, high = np.nanquantile(values, [0.01, 0.99])
    if not high > low:
        return np.zeros(len(values))
    return np.clip((values - low) / (high - low), 0.0, 1.0)
