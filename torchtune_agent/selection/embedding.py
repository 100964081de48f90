"""Vectors of samples: without a model from their tokens, with one from its hidden states; or of a sentence encoder."""

from collections.abc import Sequence

import numpy as np
import torch

from torchtune_agent.errors import UserError

NUM_DIMENSIONS = 256
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def token_embeddings(samples: Sequence[np.ndarray], dimensions: int = NUM_DIMENSIONS) -> np.ndarray:
    """float32 [n, dimensions] of length 1: hashed counts of single tokens and pairs, each weighted by how rare it is.

    Logarithms of counts, and length 1, so that a long sample is not far from all others for its length.
    """
    rarity = np.zeros(2**20)
    for tokens in samples:
        rarity[np.unique(_features(tokens) >> np.uint64(44)).astype(np.int64)] += 1
    rarity = np.log((1 + len(samples)) / (1 + rarity))
    found = np.zeros((len(samples), dimensions), np.float32)
    for row, tokens in enumerate(samples):
        keys, counts = np.unique(_features(tokens), return_counts=True)
        sign = np.where(keys & np.uint64(1), 1.0, -1.0)
        values = sign * np.log1p(counts) * rarity[(keys >> np.uint64(44)).astype(np.int64)]
        place = ((keys >> np.uint64(1)) % np.uint64(dimensions)).astype(np.int64)
        found[row] = np.bincount(place, values, dimensions)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


def _features(tokens: np.ndarray) -> np.ndarray:
    """A hash of every token and of every pair of neighbours."""
    single = (np.asarray(tokens, np.int64).astype(np.uint64) + np.uint64(1)) * _FACTOR
    pairs = single[1:] * np.uint64(31) ^ (single[:-1] >> np.uint64(17))
    both = np.concatenate([single, pairs * _FACTOR])
    return (both ^ (both >> np.uint64(32))) * _FACTOR


def projection(width: int, dimensions: int, seed: int = 0) -> torch.Tensor | None:
    """A matrix [width, dimensions] that makes wide vectors narrow and keeps their distances, to within about
    sqrt(2 / dimensions); None where they are narrow already."""
    if width <= dimensions:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, dimensions, generator=generator) / dimensions**0.5


def sentence_embeddings(texts: Sequence[str], model: str, device: str) -> np.ndarray:
    """float32 [n, width] of length 1, by the sentence encoder `model`: a folder, or a name on the hub."""
    try:
        from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"embedding_model={model}: needs sentence-transformers ({error}). Install it: "
            "pip install 'torchtune-agent[embeddings]'; or leave embedding_model out."
        ) from error
    try:
        encoder = SentenceTransformer(model, device=device)
    except (OSError, ValueError) as error:
        raise UserError(f"embedding_model={model}: cannot be loaded: {error}") from error
    found = encoder.encode(list(texts), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False)
    return np.asarray(found, np.float32)
