"""What selections must come to, written as plainly as can be: loops over float64 numbers, every distance made anew."""

import numpy as np


def unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def distances(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.linalg.norm(vectors[:, None].astype(np.float64) - others[None].astype(np.float64), axis=2)


def top(values: np.ndarray, number: int) -> list[int]:
    """Rows of the largest values; NaN is the least of all."""
    return sorted(range(len(values)), key=lambda i: (-np.nan_to_num(values[i], nan=-np.inf), i))[:number]


def k_center(vectors: np.ndarray, number: int, given: list[int]) -> tuple[list[int], float]:
    """Rows that are farthest from `given` and from each other, and what the farthest of all is away in the end."""
    every = distances(vectors, vectors)
    picked: list[int] = []
    if not given:
        mean = np.linalg.norm(vectors.astype(np.float64) - vectors.astype(np.float64).mean(0), axis=1)
        picked.append(int(mean.argmin()))
    while len(picked) < number:
        nearest = every[:, given + picked].min(1)
        nearest[given + picked] = -1
        picked.append(int(nearest.argmax()))
    return picked, float(every[:, given + picked].min(1).max())


def hybrid(loss: np.ndarray, vectors: np.ndarray, number: int, ratio: float) -> list[int]:
    by_loss = top(loss, round(ratio * number))
    return by_loss + k_center(vectors, number - len(by_loss), by_loss)[0]


def facility_gaps(vectors: np.ndarray, picked: list[int]) -> list[float]:
    """How much less each pick gains, after those before it, than the best row would."""
    similar = (1 + vectors.astype(np.float64) @ vectors.astype(np.float64).T) / 2
    served, gaps = np.zeros(len(vectors)), []
    for pick in picked:
        gains = [np.maximum(row - served, 0).sum() for row in similar]
        gaps.append(max(gains) - gains[pick])
        served = np.maximum(served, similar[pick])
    return gaps


def importance(loss: np.ndarray, error: np.ndarray, vectors: np.ndarray, window: int) -> np.ndarray:
    number = len(loss)
    apart = distances(vectors, vectors)
    far = [min(apart[i, max(0, i - window) : i], default=np.nan) for i in range(number)]
    far = np.where(np.isnan(far), np.nanmax(far), far)
    gradients = vectors * error[:, None]
    fisher = np.mean([gradient**2 for gradient in gradients], axis=0)
    risk = np.array([(fisher * gradient**2).sum() for gradient in gradients])
    total = np.zeros(number)
    for weight, values in ((0.4, loss), (0.3, far), (0.3, risk)):
        low, high = np.quantile(values, 0.01), np.quantile(values, 0.99)
        total += weight * np.clip((values - low) / (high - low), 0, 1)
    return total


def first_of_alike(near: np.ndarray) -> dict[int, int]:
    """{row: the first row before it that is kept and near it}, by a matrix of what is near what."""
    found: dict[int, int] = {}
    for i in range(len(near)):
        for j in range(i):
            if j not in found and near[i, j]:
                found[i] = j
                break
    return found


def jaccard(one: np.ndarray, other: np.ndarray, size: int = 5) -> float:
    """How many runs of tokens two samples share, of those that either has."""
    runs = [{tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)} for tokens in (one, other)]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])
