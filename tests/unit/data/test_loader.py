"""The order of training: nothing dropped, nothing repeated, the same steps on any number of ranks."""

import itertools

import pytest

from torchtune_agent.data import Collator, SampleLoader, StepPlan
from torchtune_agent.data.joined import JoinedDataset
from torchtune_agent.data.loader import num_steps

NUM = 53


def dataset(number: int = NUM) -> list[dict]:
    """Sample i holds the token i, a few times."""
    return [{"tokens": [i] * (i % 5 + 2), "labels": [i] * (i % 5 + 2)} for i in range(number)]


def loader(rank=0, size=1, batch=1, accumulation=1, shuffle=True, seed=0, pack_to=None, data=None) -> SampleLoader:
    plan = StepPlan(batch, accumulation, rank, size)
    data = JoinedDataset({"data": dataset() if data is None else data})
    return SampleLoader(data, Collator(pad_id=1000, pack_to=pack_to), plan, shuffle=shuffle, seed=seed)


def samples_in(batch) -> list[int]:
    """The samples of a batch: each is seen once where its positions start anew."""
    if batch.input_pos is None:
        return [int(row[0]) for row in batch.tokens if row[0] != 1000]
    return batch.tokens[(batch.input_pos == 0) & (batch.tokens != 1000)].tolist()


def steps_of(epoch: int = 0, **options) -> list[list[list[int]]]:
    """Samples of every micro-batch of every step of one rank."""
    return [[samples_in(batch) for batch in step] for step in loader(**options).epoch(epoch)]


def steps_of_all(size: int, **options) -> list[list[int]]:
    """Samples of every step, over all ranks."""
    per_rank = [steps_of(rank=rank, size=size, **options) for rank in range(size)]
    return [sorted(i for rank in step for micro in rank for i in micro) for step in zip(*per_rank, strict=True)]


GRID = list(itertools.product([1, 2, 3, 4], [1, 2, 3], [1, 2, 4]))


@pytest.mark.parametrize(("size", "batch", "accumulation"), GRID)
@pytest.mark.parametrize("pack_to", [None, 13])
def test_every_sample_is_trained_once_per_epoch(size, batch, accumulation, pack_to):
    steps = steps_of_all(size, batch=batch, accumulation=accumulation, pack_to=pack_to)
    assert sorted(i for step in steps for i in step) == list(range(NUM))


@pytest.mark.parametrize(("size", "batch", "accumulation"), GRID)
def test_all_ranks_have_equally_many_micro_batches(size, batch, accumulation):
    options = {"batch": batch, "accumulation": accumulation, "size": size}
    counts = [[len(step) for step in steps_of(rank=rank, **options)] for rank in range(size)]
    assert all(count == counts[0] for count in counts)
    assert all(0 < number <= accumulation for number in counts[0])


@pytest.mark.parametrize(("size", "batch", "accumulation"), GRID)
def test_only_the_last_step_is_smaller(size, batch, accumulation):
    whole = size * batch * accumulation
    sizes = [len(step) for step in steps_of_all(size, batch=batch, accumulation=accumulation)]
    assert sizes == [whole] * (NUM // whole) + [NUM % whole] * (NUM % whole > 0)
    assert len(sizes) == num_steps(loader(size=size, batch=batch, accumulation=accumulation))


@pytest.mark.parametrize("pack_to", [None, 13])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_step_holds_the_same_samples_on_any_number_of_ranks(pack_to, epoch):
    splits = [(1, 12, 1), (1, 1, 12), (2, 3, 2), (2, 6, 1), (3, 2, 2), (3, 1, 4), (4, 3, 1), (4, 1, 3)]
    steps = [
        steps_of_all(size, batch=batch, accumulation=accumulation, pack_to=pack_to, epoch=epoch)
        for size, batch, accumulation in splits
    ]
    assert all(one == steps[0] for one in steps)


def test_no_micro_batch_is_larger_than_the_batch_size():
    for size, batch, accumulation in GRID:
        for rank in range(size):
            steps = steps_of(rank=rank, size=size, batch=batch, accumulation=accumulation)
            assert max(len(micro) for step in steps for micro in step) <= batch


def flat(**options) -> list[int]:
    return [i for step in steps_of(**options) for micro in step for i in micro]


def test_the_order_is_that_of_the_seed_and_the_epoch():
    orders = [flat(seed=seed, epoch=epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 9
    assert flat(seed=1, epoch=2) == flat(seed=1, epoch=2)


def test_without_shuffling_the_order_is_that_of_the_file():
    assert flat(shuffle=False) == flat(shuffle=False, epoch=7) == list(range(NUM))


@pytest.mark.parametrize("number", [1, 2, 5])
def test_ranks_without_samples_get_empty_batches(number):
    steps = [steps_of(rank=rank, size=4, batch=2, data=dataset(number)) for rank in range(4)]
    assert [len(rank) for rank in steps] == [1] * 4
    assert sorted(i for rank in steps for micro in rank[0] for i in micro) == list(range(number))
