"""Packing: every conversation once, nothing over capacity, little room left."""

import random

import pytest

from torchtune_agent.data.packing import pack


def lengths_of(seed: int, number: int, capacity: int) -> list[int]:
    rng = random.Random(seed)
    return [max(1, min(capacity, round(rng.lognormvariate(6.2, 0.9)))) for _ in range(number)]


@pytest.mark.parametrize("seed", range(20))
def test_every_index_is_in_one_pack_and_no_pack_is_too_long(seed):
    rng = random.Random(seed)
    capacity = rng.choice([1, 7, 64, 4096])
    lengths = [rng.randint(1, capacity) for _ in range(rng.randrange(200))]
    packs = pack(lengths, capacity)
    assert sorted(i for group in packs for i in group) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in group) <= capacity for group in packs)


def test_packing_is_deterministic():
    lengths = lengths_of(0, 2000, 4096)
    assert pack(lengths, 4096) == pack(list(lengths), 4096)


@pytest.mark.parametrize("seed", range(3))
def test_a_realistic_mix_of_lengths_fills_its_packs(seed):
    lengths = lengths_of(seed, 5000, 4096)
    assert sum(lengths) / (len(pack(lengths, 4096)) * 4096) >= 0.97


@pytest.mark.parametrize("seed", range(30))
def test_few_more_packs_than_the_best_possible(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 40) for _ in range(60)]
    at_least = max(-(-sum(lengths) // 40), sum(length > 20 for length in lengths))
    assert len(pack(lengths, 40)) <= at_least * 11 / 9 + 1  # the known bound of best fit, longest first


def test_what_fits_exactly_shares_a_pack():
    assert sorted(sorted(group) for group in pack([6, 5, 4, 5], 10)) == [[0, 2], [1, 3]]


def test_nothing_makes_no_packs():
    assert pack([], 10) == []
