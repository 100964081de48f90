"""Near-duplicates: samples of which one is enough.

Two ways to see them. By tokens: MinHash signatures of a sample's runs of five tokens, whose share of equal entries
estimates how much two samples have in common (with 128 entries, to within 0.04). Runs that many different samples share
(a system prompt, the description of tools) say nothing about a sample and are left out. By embedding: the distance.

In both, a sample is a duplicate if one before it that is kept is near. Small pools are compared all with all. In larger
ones only samples that fall into a bucket together are, of several rounds of buckets; a pair that never does is missed.
"""

from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b

import numpy as np

_RUN = 5  # tokens
_PERMUTATIONS = 128
_COUNTERS = 2**22
_COMMON = 0.1  # a run that this share of the different samples has, and at least _LEAST_COMMON
_LEAST_COMMON = 10
_ALL_WITH_ALL = 1024  # samples; beyond it, buckets
_BLOCK = 256
_MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)


def signatures(samples: Sequence[np.ndarray], seed: int = 0) -> np.ndarray:
    """MinHash signatures [n, 128] of the tokens of every sample. `samples` are read twice, one at a time."""
    first_of: dict[bytes, int] = {}
    copy_of = np.empty(len(samples), np.int64)
    counts = np.zeros(_COUNTERS, np.uint32)
    for row in range(len(samples)):
        tokens = np.ascontiguousarray(samples[row], np.int64)
        copy_of[row] = first_of.setdefault(_digest(tokens), row)
        if copy_of[row] == row:
            counts[np.unique(_runs(tokens) % np.uint64(_COUNTERS)).astype(np.int64)] += 1
    common = counts > max(_LEAST_COMMON, _COMMON * len(first_of))
    rng = np.random.default_rng(seed)
    factors = _odd(rng, _PERMUTATIONS)
    offsets = rng.integers(0, 2**63, _PERMUTATIONS, np.uint64)
    found = np.empty((len(samples), _PERMUTATIONS), np.uint32)
    for row in range(len(samples)):
        if copy_of[row] != row:
            found[row] = found[copy_of[row]]
            continue
        tokens = np.ascontiguousarray(samples[row], np.int64)
        runs = np.unique(_runs(tokens))
        own = runs[~common[(runs % np.uint64(_COUNTERS)).astype(np.int64)]]
        if not len(own):  # nothing of its own: only its copies are like it
            own = np.frombuffer(_digest(tokens), np.uint64)[:1]
        found[row] = ((own[:, None] * factors + offsets) >> np.uint64(32)).min(0).astype(np.uint32)
    return found


def near_duplicates(features: np.ndarray, threshold: float, *, seed: int = 0) -> dict[int, int]:
    """{row: the row before it that is kept for it}.

    Args:
        features: signatures (uint32), or embeddings (float32) of length 1.
        threshold: the least similarity of signatures, or the largest distance of embeddings.
        seed: of the buckets.
    """
    by_tokens = features.dtype == np.uint32
    near = _similar(threshold) if by_tokens else _close(threshold)
    found: dict[int, int] = {}
    kept = np.ones(len(features), bool)
    rng = np.random.default_rng(seed)
    for buckets in _rounds(features, rng, by_tokens):
        for rows in buckets:
            rows = rows[kept[rows]]
            for row, leader in _followers(features, rows, near):
                kept[row] = False
                found[row] = leader
    for row in found:  # a leader of one round may have found a leader of its own in another
        while found[row] in found:
            found[row] = found[found[row]]
    return found


Near = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _similar(threshold: float) -> Near:
    """Which of `some` [a, p] and `others` [b, p] are, [a, b]."""

    def similar(some: np.ndarray, others: np.ndarray) -> np.ndarray:
        equal = np.zeros((len(some), len(others)), np.int16)
        for entry in range(some.shape[1]):
            equal += some[:, entry, None] == others[None, :, entry]
        return equal >= threshold * some.shape[1] - 1e-9

    return similar


def _close(threshold: float) -> Near:
    def close(some: np.ndarray, others: np.ndarray) -> np.ndarray:
        return 2 - 2 * (some @ others.T) <= threshold**2 + 1e-6  # float32's own error

    return close


def _followers(features: np.ndarray, rows: np.ndarray, near: Near) -> Iterator[tuple[int, int]]:
    """Of ascending `rows`, those that are near an earlier one which is not such a one itself, and that one."""
    leaders = np.empty(0, np.int64)
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        leader = np.full(len(block), -1)
        for first in range(0, len(leaders), 8 * _BLOCK):
            some = leaders[first : first + 8 * _BLOCK]
            hits = near(features[block], features[some])
            new = (leader < 0) & hits.any(1)
            leader[new] = some[hits[new].argmax(1)]
        inside = near(features[block], features[block])
        for i in range(len(block)):
            if leader[i] < 0:
                before = np.flatnonzero(inside[i, :i] & (leader[:i] < 0))
                if len(before):
                    leader[i] = block[before[0]]
        yield from ((int(block[i]), int(leader[i])) for i in np.flatnonzero(leader >= 0))
        leaders = np.concatenate([leaders, block[leader < 0]])


def _rounds(features: np.ndarray, rng: np.random.Generator, by_tokens: bool) -> Iterator[list[np.ndarray]]:
    if len(features) <= _ALL_WITH_ALL:
        yield [np.arange(len(features))]
    elif by_tokens:  # samples that are 0.8 alike share a band of four with probability 1 - (1 - 0.8^4)^32 > 0.9999
        for band in np.split(features, _PERMUTATIONS // 4, axis=1):
            yield _buckets((band.astype(np.uint64) * _odd(rng, 4)).sum(1))
    else:  # on the same side of so many random planes; a pair at an angle a is with probability (1 - a / pi)^bits
        bits = min(30, max(1, int(np.log2(len(features) / 256))))
        for _ in range(24):
            planes = rng.standard_normal((features.shape[1], bits)).astype(np.float32)
            sides = np.concatenate(
                [block @ planes > 0 for block in np.array_split(features, 1 + len(features) // 65536)]
            )
            yield _buckets(sides @ (1 << np.arange(bits)))


def _buckets(keys: np.ndarray) -> list[np.ndarray]:
    """Rows with equal keys, ascending, where there are several."""
    order = np.argsort(keys, kind="stable")
    ends = np.flatnonzero(np.diff(keys[order])) + 1
    return [rows for rows in np.split(order, ends) if len(rows) > 1]


def _runs(tokens: np.ndarray) -> np.ndarray:
    """A hash of every run of tokens (of the whole, where it is shorter than one)."""
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * _MULTIPLIERS[0]
    mixed ^= mixed >> np.uint64(29)
    size = min(_RUN, len(mixed))
    total = np.zeros(max(0, len(mixed) - size + 1) if size else 0, np.uint64)
    for place in range(size):
        total = total * _MULTIPLIERS[1] + mixed[place : place + len(total)]
    return (total ^ (total >> np.uint64(31))) * _MULTIPLIERS[2]


def _odd(rng: np.random.Generator, number: int) -> np.ndarray:
    return rng.integers(0, 2**63, number, np.uint64) * np.uint64(2) + np.uint64(1)


def _digest(tokens: np.ndarray) -> bytes:
    return blake2b(tokens.tobytes(), digest_size=16).digest()
