"""Replay buffers: what is kept and drawn, against theory; bounds, disk, state, mistakes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchtune_agent.continual import STRATEGIES, ReplayBuffer
from torchtune_agent.continual.held import NUM_CLASSES
from torchtune_agent.continual.records import Records, decode, encode
from torchtune_agent.continual.segment_tree import SegmentTree
from torchtune_agent.data import TokenClass
from torchtune_agent.errors import UserError


def chi_square_is_likely(counts: np.ndarray, expected: np.ndarray, variance_factor: float = 1.0) -> bool:
    """Whether the statistic is within 4.5 of its own standard deviations, on both sides: too even is wrong as well."""
    statistic = float(((counts - expected) ** 2 / expected).sum()) / variance_factor
    freedom = len(counts) - 1
    return abs(statistic - freedom) < 4.5 * (2 * freedom) ** 0.5


def offered(number: int, rng: np.random.Generator) -> dict[str, Any]:
    """What every strategy needs to know of a sample."""
    shares = rng.dirichlet(np.ones(NUM_CLASSES))
    return {"importance": float(rng.random()), "tools": [f"tool_{number % 7}"], "class_shares": shares}


def filled(strategy: str, size: int, stream: int, **options: Any) -> ReplayBuffer:
    buffer = ReplayBuffer(size, strategy=strategy, **options)
    rng = np.random.default_rng(1)
    for number in range(stream):
        buffer.offer(number, **offered(number, rng))
    return buffer


def test_a_reservoir_keeps_every_sample_of_the_stream_equally_often() -> None:
    size, stream, rounds = 20, 100, 1200
    counts = np.zeros(stream)
    for seed in range(rounds):
        buffer = ReplayBuffer(size, seed=seed)
        for number in range(stream):
            buffer.offer(number)
        assert len(buffer) == size
        counts[buffer.samples()] += 1
    # One round keeps each with p = size / stream, without replacement: the statistic of counts has mean (1 - p)(n - 1)
    expected = np.full(stream, rounds * size / stream)
    assert chi_square_is_likely(counts, expected, variance_factor=(1 - size / stream) * stream / (stream - 1))


def test_pairs_are_kept_together_as_often_as_by_chance() -> None:
    together = 0
    for seed in range(3000):
        buffer = ReplayBuffer(5, seed=seed)
        for number in range(20):
            buffer.offer(number)
        together += {3, 4} <= set(buffer.samples())
    chance = 5 * 4 / (20 * 19)
    assert abs(together / 3000 - chance) < 4.5 * (chance * (1 - chance) / 3000) ** 0.5


def test_a_limit_in_bytes_holds_and_does_not_favour_short_samples() -> None:
    kept: dict[bool, int] = {True: 0, False: 0}
    for seed in range(60):
        buffer = ReplayBuffer(10_000, max_bytes=4000, seed=seed)
        for number in range(600):
            buffer.offer("x" * (10 if number % 2 else 90))
        assert buffer.num_bytes <= 4000
        for sample in buffer.samples():
            kept[len(sample) == 10] += 1
    total = sum(kept.values())
    assert abs(kept[True] / total - 0.5) < 4.5 * 0.5 / total**0.5 + 0.01  # a sample too many goes: 1 % is its due


def test_what_a_reservoir_keeps_does_not_depend_on_when_draws_come() -> None:
    plain, drawn = ReplayBuffer(30, seed=3), ReplayBuffer(30, seed=3)
    for number in range(500):
        plain.offer(number)
        drawn.offer(number)
        drawn.draw(4, key=[number])
    assert plain.samples() == drawn.samples()


def test_even_draws_are_of_different_samples_and_all_equally_likely() -> None:
    buffer = filled("reservoir", 50, 400)
    for n in (5, 40):  # by trying, and from a permutation
        counts = dict.fromkeys(buffer.samples(), 0)
        rounds = 3000
        for i in range(rounds):
            samples = buffer.draw(n, key=[i]).samples
            assert len(set(samples)) == n
            for sample in samples:
                counts[sample] += 1
        expected = np.full(50, rounds * n / 50)
        assert chi_square_is_likely(np.array(list(counts.values())), expected, (1 - n / 50) * 50 / 49)


def test_prioritized_draws_have_the_probabilities_and_weights_of_the_paper() -> None:
    importance = np.array([0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 4.0, 0.3])
    buffer = ReplayBuffer(8, strategy="prioritized")
    for i, value in enumerate(importance):
        buffer.offer(i, importance=float(value))
    powers = np.maximum(importance, 1e-6) ** 0.6
    p = powers / powers.sum()
    counts, rounds = np.zeros(8), 10_000
    for progress, beta in ((0.0, 0.4), (0.5, 0.7), (1.0, 1.0), (7.0, 1.0)):
        truth = (8 * p) ** -beta
        truth /= truth.max()
        for i in range(40):
            drawn = buffer.draw(5, key=[i], progress=progress)
            np.testing.assert_allclose(drawn.weights, truth[drawn.samples], rtol=1e-9)
    for i in range(rounds):
        counts[buffer.draw(1, key=[i]).samples[0]] += 1
    likely = p > 1e-3
    assert chi_square_is_likely(counts[likely], rounds * p[likely])
    buffer.set_importance(np.array([0, 4]), [8.0, 0.0])
    powers[[0, 4]] = 8.0**0.6, 1e-6**0.6
    expected = 8 * powers / powers.sum()
    draws = np.array([np.bincount(buffer.draw(8, key=[i]).samples, minlength=8) for i in range(1000)])
    assert np.abs(draws - expected).max() < 2  # one of each of eight equal parts
    assert np.abs(draws.mean(0) - expected).max() < 0.1


def test_a_sample_nothing_is_known_of_is_as_important_as_the_most_important_so_far() -> None:
    buffer = ReplayBuffer(4, strategy="prioritized")
    for importance in (0.5, 3.0, 1.0, None):
        buffer.offer(str(importance), importance=importance)
    got = [buffer.draw(1, key=[i]).samples[0] for i in range(4000)]
    assert abs(got.count("None") - got.count("3.0")) < 4.5 * 4000**0.5


def test_recent_keeps_the_last_of_the_stream_also_when_it_is_loaded() -> None:
    buffers = [ReplayBuffer(7, strategy="recent", seed=3) for _ in range(2)]
    for number in range(50):
        buffers[0].offer(number)
    assert sorted(buffers[0].samples()) == list(range(43, 50))
    buffers[1].load_state_dict(buffers[0].state_dict())
    for buffer in buffers:
        for number in range(50, 53):
            buffer.offer(number)
        assert sorted(buffer.samples()) == list(range(46, 53))
    drawn = [buffers[1].draw(1, key=[i]).samples[0] for i in range(7000)]
    assert all(abs(drawn.count(number) - 1000) < 5 * 1000**0.5 for number in range(46, 53))


def test_tool_balanced_keeps_rare_tools_whole_and_draws_tools_alike() -> None:
    buffer = ReplayBuffer(40, strategy="tool_balanced", seed=2)
    rng = np.random.default_rng(0)
    tools = ["rare"] * 5 + ["common"] * 900 + ["usual"] * 95
    rng.shuffle(tools)
    for i, tool in enumerate(tools):
        buffer.offer([tool, i], tools=[tool])
    names = [tool for tool, _ in buffer.samples()]
    assert {name: names.count(name) for name in set(names)} == {"rare": 5, "common": 18, "usual": 17} or {
        name: names.count(name) for name in set(names)
    } == {"rare": 5, "common": 17, "usual": 18}
    drawn = [buffer.draw(3, key=[i]).samples for i in range(50)]
    assert all({tool for tool, _ in three} == {"rare", "common", "usual"} for three in drawn)
    everything = buffer.draw(40, key=[0]).samples
    assert len({i for _, i in everything}) == 40


def test_tool_balanced_is_uniform_within_a_tool() -> None:
    counts, rounds = np.zeros(60), 1500
    for seed in range(rounds):
        buffer = ReplayBuffer(16, strategy="tool_balanced", seed=seed)
        for i in range(60):
            buffer.offer(i, tools=["late" if i >= 30 else "early"])
        counts[buffer.samples()] += 1
    for part in (counts[:30], counts[30:]):
        expected = np.full(30, part.sum() / 30)
        assert chi_square_is_likely(part, expected, (1 - 8 / 30) * 30 / 29)


def test_class_loss_draws_by_the_live_loss_of_what_a_sample_trains() -> None:
    buffer = ReplayBuffer(6, strategy="class_loss")
    rng = np.random.default_rng(5)
    shares = rng.dirichlet(np.ones(NUM_CLASSES), 6)
    for i in range(6):
        buffer.offer(i, class_shares=shares[i])
    losses = rng.random(NUM_CLASSES)
    losses[TokenClass.REASONING] = 0.0
    buffer.set_class_losses(losses)
    p = shares @ losses
    counts = np.zeros(6)
    for i in range(6000):
        for sample in buffer.draw(5, key=[i]).samples:
            counts[sample] += 1
    assert chi_square_is_likely(counts, counts.sum() * p / p.sum())


def test_ssis_keeps_what_exceeds_the_streams_mean_times_the_ratio_and_gives_up_the_least_important() -> None:
    stream = np.random.default_rng(3).random(300)
    buffer = ReplayBuffer(25, strategy="ssis", threshold_ratio=0.9)
    kept: dict[int, float] = {}
    for i, importance in enumerate(stream.tolist()):
        entered = i == 0 or importance > 0.9 * stream[:i].mean()
        if entered:
            kept[i] = importance
        if len(kept) > 25:
            worst = min(kept, key=lambda j: (kept[j], j))
            entered = entered and worst != i
            del kept[worst]
        assert buffer.offer(i, importance=importance) == entered
        if i == 200:  # what is held may turn out to be worth less
            drawn = buffer.draw(10, key=[0])
            buffer.set_importance(drawn.slots, [0.01 * (k + 1) for k in range(10)])
            values = {}
            for k, sample in enumerate(drawn.samples):  # of a sample drawn twice, the last counts
                values[sample] = 0.01 * (k + 1)
            kept |= values
    assert buffer.samples() == sorted(kept)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("spilled", [False, True])
def test_a_buffer_goes_on_from_its_state_to_the_last_bit(strategy: str, spilled: bool, tmp_path: Path) -> None:
    def step(buffer: ReplayBuffer, number: int, rng: np.random.Generator) -> Any:
        buffer.offer({"n": number, "x": np.full(number % 50, number)}, **offered(number, rng))
        drawn = buffer.draw(3, key=[number], progress=number / 900)
        if strategy in ("prioritized", "ssis"):
            buffer.set_importance(drawn.slots, [0.5 + 0.1 * (number % 3)] * len(drawn.slots))
        return [sample["n"] for sample in drawn.samples], drawn.weights.tolist(), drawn.ages.tolist()

    def made(name: str) -> ReplayBuffer:
        return ReplayBuffer(100, strategy=strategy, max_bytes=9000, spill_to=tmp_path / name if spilled else None)

    one, rng = made("one"), np.random.default_rng(0)
    for number in range(400):
        step(one, number, rng)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    json.loads(state["facts"])
    other, states = made("other"), rng.bit_generator.state
    other.load_state_dict(state)
    again = np.random.default_rng()
    again.bit_generator.state = states
    for number in range(400, 800):
        assert step(one, number, rng) == step(other, number, again)
    assert one.num_bytes == other.num_bytes <= 9000


def test_a_state_that_is_larger_than_the_buffer_is_cut_by_the_strategys_rule() -> None:
    large, small = filled("reservoir", 200, 1000), filled("reservoir", 50, 1000)
    loaded = ReplayBuffer(50)
    loaded.load_state_dict(large.state_dict())
    assert loaded.samples() == small.samples()
    with pytest.raises(UserError, match="strategy=reservoir.*Set strategy=reservoir"):
        ReplayBuffer(50, strategy="prioritized").load_state_dict(large.state_dict())


@pytest.mark.parametrize("spilled", [False, True])
def test_records_hold_what_is_put_through_any_changes(spilled: bool, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "records.bin"
    records, truth = Records(path if spilled else None), {}
    rng = np.random.default_rng(0)
    for _ in range(4000):
        slot = int(rng.integers(60))
        if slot in truth:
            records.remove(slot)
            del truth[slot]
        else:
            truth[slot] = rng.bytes(int(rng.integers(1, 9000)))
            records.put(slot, truth[slot])
    assert {slot: records.get(slot) for slot in truth} == truth
    assert records.held == sum(map(len, truth.values()))
    if spilled:
        assert path.stat().st_size <= 4 * records.held + 2**17


def test_samples_come_back_as_they_were() -> None:
    sample = {
        "tokens": np.arange(500, dtype=np.int32),
        "mask": np.zeros((2, 3), bool),
        "nothing": np.zeros(0, np.float32),
        "half": torch.randn(3, 2, dtype=torch.bfloat16),
        "scalar": torch.tensor(3),
        "text": "naïve ☃",
        "deep": {"list": [1, 2.5, None, {"a": "b"}]},
        "number": np.float32(0.5),
    }
    back = decode(encode(sample))
    assert list(back) == list(sample)
    for key, value in sample.items():
        if isinstance(value, np.ndarray | torch.Tensor):
            assert back[key].dtype == value.dtype and back[key].shape == value.shape and (back[key] == value).all()
        else:
            assert back[key] == value
    for value in (5, "text", [1, 2], None):
        assert decode(encode(value)) == value
    with pytest.raises(UserError, match="cannot be kept"):
        encode({"x": object()})


def test_a_segment_tree_finds_what_a_running_sum_says() -> None:
    rng = np.random.default_rng(0)
    tree, values = SegmentTree(np.add, 0.0, 2), np.zeros((300, 2))
    for _ in range(50):
        slots = rng.choice(300, 20, replace=False)
        values[slots] = rng.integers(0, 5, (20, 2))
        tree.set(slots, values[slots])
    for column in (0, 1):
        total = values[:, column].cumsum()
        assert tree.root[column] == total[-1]
        targets = np.arange(total[-1]) + 0.5
        np.testing.assert_array_equal(
            tree.find(targets, np.full(len(targets), column)), np.searchsorted(total, targets, side="right")
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "reservior"}, "selection_strategy=reservior: no such strategy. Did you mean 'reservoir'"),
        ({"num_samples": 0}, "buffer_size=0: must be at least 1"),
        ({"max_bytes": 0}, "max_bytes=0"),
        ({"strategy": "ssis", "threshold_ratio": -1}, "threshold_ratio=-1"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ReplayBuffer(**{"num_samples": 10, **options})


def test_what_a_strategy_needs_is_asked_for() -> None:
    for strategy, needed in {"ssis": "importance", "tool_balanced": "tools", "class_loss": "class_shares"}.items():
        with pytest.raises(UserError, match=f"{strategy}: every sample must be offered with its '{needed}'"):
            ReplayBuffer(10, strategy=strategy).offer(1)
    with pytest.raises(UserError, match="importance=nan"):
        ReplayBuffer(10).offer(1, importance=float("nan"))
    with pytest.raises(UserError, match="max_bytes=100: sample 0 alone takes"):
        ReplayBuffer(10, max_bytes=100).offer("x" * 200)
