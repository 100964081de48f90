"""Replay as the data of a run: exact shares, the same on any number of ranks, resumed, taken to another run."""

from typing import Any

import numpy as np
import pytest

from torchtune_agent.continual import ReplayBuffer
from torchtune_agent.continual.mixing import MixedBatch
from torchtune_agent.continual.replay_source import ReplaySource
from torchtune_agent.data import Collator, StepPlan
from torchtune_agent.data.joined import JoinedDataset
from torchtune_agent.errors import UserError


class Numbers:
    """Samples whose tokens are all their number, from `first` on; odd ones are twice as long."""

    def __init__(self, first: int, size: int) -> None:
        self.first, self.size = first, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = self.first + index
        tokens = np.full(4 + 4 * (number % 2), number)
        return {"tokens": tokens, "labels": tokens, "token_class": np.full(len(tokens), 1 + number % 3)}


OLD, NEW = 60, 101
DATA = JoinedDataset({"old": Numbers(0, OLD), "new": Numbers(1000, NEW)})


def old_buffer(**options: Any) -> ReplayBuffer:
    buffer = ReplayBuffer(40, seed=5, **options)
    for number in range(OLD):
        buffer.offer(number, importance=1.0 + number % 5)
    return buffer


def source(buffer: ReplayBuffer, ranks: int = 1, rank: int = 0, **options: Any) -> ReplaySource:
    settings: dict[str, Any] = {"replay_ratio": 0.3, "shuffle": True, "seed": 7, **options}
    collator = Collator(0, pack_to=settings.pop("pack_to", None))
    plan = StepPlan(8 // ranks, 1, rank, ranks)
    return ReplaySource(DATA, range(OLD, OLD + NEW), collator, plan, buffer, **settings)


def numbers(batch: Any) -> list[tuple[int, bool]]:
    """Every sample's number, and whether it is replayed, in the order of the batch."""
    assert isinstance(batch, MixedBatch) and batch.replayed is not None
    samples, tokens = batch.sample_index.flatten(), batch.tokens.flatten()
    first = [int((samples == i).nonzero()[-1 if i else 0][0]) for i in range(batch.num_samples)]
    return [(int(tokens[at]), bool(flag)) for at, flag in zip(first, batch.replayed, strict=True)]


def rows(made: ReplaySource, epoch: int = 0, first_row: int = 0) -> list[tuple[int, bool]]:
    return [one for step in made.epoch(epoch, first_row) for batch in step for one in numbers(batch)]


def test_every_new_sample_comes_once_and_replayed_ones_are_their_exact_share() -> None:
    made = source(old_buffer())
    got = rows(made)
    assert len(got) == made.num_rows == 143  # the 101st new row, after 42 replayed ones
    new = [number for number, replayed in got if not replayed]
    assert sorted(new) == list(range(1000, 1000 + NEW)) != new
    for n in range(1, len(got) + 1):
        assert sum(replayed for _, replayed in got[:n]) == int(n * 0.3 + 1e-9)
    replays = [number for number, replayed in got if replayed]
    assert len(set(replays)) > 20 and any(number < OLD for number in replays)
    later = rows(made, 1)
    assert sorted(n for n, replayed in later if not replayed) == sorted(new)
    assert made.buffer.num_offered == OLD + NEW  # the second epoch offers nothing


def test_any_number_of_ranks_trains_the_same_rows_and_keeps_the_same_buffer() -> None:
    one = source(old_buffer())
    steps = [[n for batch in step for n in numbers(batch)] for step in one.epoch(0)]
    for ranks in (2, 4):
        parts = [source(old_buffer(), ranks, rank) for rank in range(ranks)]
        walked = zip(*(part.epoch(0) for part in parts), strict=True)
        together = [
            [n for step in of_ranks for batch in step if batch.num_samples for n in numbers(batch)]
            for of_ranks in walked
        ]
        assert together == steps
        for part in parts:
            assert part.buffer.samples() == one.buffer.samples()
            assert part.picks == one.picks


@pytest.mark.parametrize("strategy", ["reservoir", "prioritized"])
@pytest.mark.parametrize("with_state", [False, True])
def test_a_run_goes_on_where_it_was_stopped(strategy: str, with_state: bool) -> None:
    whole = source(old_buffer(strategy=strategy))
    expected = rows(whole)
    stopped = source(old_buffer(strategy=strategy))
    steps = stopped.epoch(0)
    for _ in range(5):
        next(steps)
    resumed = source(ReplayBuffer(40, seed=5, strategy=strategy) if with_state else old_buffer(strategy=strategy))
    if with_state:
        resumed.buffer.load_state_dict(stopped.buffer.state_dict())
        resumed.walked = stopped.walked
    assert rows(resumed, 0, 40) == expected[40:]
    assert resumed.buffer.samples() == whole.buffer.samples()
    with pytest.raises(UserError, match="seen epoch 0 up to row 40, and epoch 0 is to go on at row 16"):
        rows(stopped, 0, 16)


def test_packed_rows_hold_as_many_replayed_samples_as_fit() -> None:
    made = source(old_buffer(), pack_to=24)
    replayed_rows = new_rows = 0
    for step in made.epoch(0):
        for batch in step:
            assert isinstance(batch, MixedBatch) and batch.replayed is not None
            per_row = [batch.sample_index[r][batch.labels[r] >= 0].unique().tolist() for r in range(len(batch.tokens))]
            flags = [{bool(batch.replayed[i]) for i in row} for row in per_row]
            assert all(len(kinds) == 1 for kinds in flags)
            replayed_rows += sum(kinds == {True} for kinds in flags)
            new_rows += sum(kinds == {False} for kinds in flags)
            assert all(int((batch.tokens[r] != 0).sum()) > 12 for r, kinds in enumerate(flags) if kinds == {True})
    assert replayed_rows == int(0.3 * (replayed_rows + new_rows)) and new_rows + replayed_rows == made.num_rows


def test_weights_of_prioritized_samples_reach_the_loss() -> None:
    made = source(old_buffer(strategy="prioritized"), replay_ratio=0.5)
    weights = set()
    for step in made.epoch(0):
        for batch in step:
            for i, (_, replayed) in enumerate(numbers(batch)):
                of_sample = batch.weights[(batch.sample_index == i) & (batch.labels != -100)].unique()
                assert len(of_sample) == 1 and (replayed or of_sample.item() == 1.0)
                weights.add(round(of_sample.item(), 3))
    assert len(weights) > 5 and max(weights) <= 1.0


def test_a_buffer_is_taken_to_a_run_that_does_not_have_its_data() -> None:
    first = source(old_buffer())
    rows(first)
    first.make_portable()
    carried = ReplayBuffer(40, seed=5)
    carried.load_state_dict(first.buffer.state_dict())
    later = JoinedDataset({"later": Numbers(5000, 80)})
    made = ReplaySource(
        later, range(80), Collator(0), StepPlan(8), carried, replay_ratio=0.5, shuffle=False, seed=1, epochs=1
    )
    got = [pair for step in made.epoch(0) for pair in numbers(step[0])]
    old = {number for number, replayed in got if replayed and number < 5000}
    assert len(old) > 15 and any(number < OLD for number in old) and any(number >= 1000 for number in old)
    batch = next(source(carried).epoch(0))[0]
    assert batch.info is not None and {info.source for info in batch.info()} <= {"old", "new", "later"}


def test_strategies_that_look_at_samples_are_given_what_they_need() -> None:
    scored: list[int] = []

    def importance(samples: Any) -> list[float]:
        scored.extend(samples)
        return [1.0 + i % 3 for i in samples]

    made = source(ReplayBuffer(40, strategy="ssis"), importance=importance, replay_ratio=0)
    rows(made)
    assert sorted(scored) == list(range(OLD, OLD + NEW)) and len(made.buffer) > 8
    by_class = source(ReplayBuffer(40, strategy="class_loss"), replay_ratio=0)
    rows(by_class)
    only = np.zeros(len(by_class.buffer._held.shares[0]))
    only[2] = 1.0
    by_class.buffer.set_class_losses(only)
    drawn = by_class.buffer.draw(20, key=[0]).samples
    assert all((1000 + sample - OLD) % 3 == 1 for sample in drawn)


def test_mistakes_are_named_before_the_first_step() -> None:
    with pytest.raises(UserError, match="replay_ratio=1"):
        source(old_buffer(), replay_ratio=1)
    with pytest.raises(UserError, match="buffer_size=7: is smaller than a step's 8 rows"):
        source(ReplayBuffer(7))
    with pytest.raises(UserError, match="ssis: needs the importance"):
        source(ReplayBuffer(40, strategy="ssis"))
    with pytest.raises(UserError, match="the buffer is empty"):
        next(source(ReplayBuffer(40)).epoch(0))
    with pytest.raises(UserError, match="a phase has no samples"):
        ReplaySource(DATA, range(0), Collator(0), StepPlan(2), old_buffer(), replay_ratio=0, shuffle=False, seed=0)
