"""OnlineContinualLearner: exact shares, both kinds of batches, mistakes."""

from typing import Any

import numpy as np
import pytest
import torch

from torchtune_agent import OnlineContinualLearner
from torchtune_agent.errors import UserError


@pytest.mark.parametrize("ratio", [0.25, 0.1, 0.0, 0.3, 0.7, 1 / 3])
def test_the_share_is_exact_over_ten_thousand_small_batches(ratio: float) -> None:
    learner = OnlineContinualLearner(buffer_size=64, replay_ratio=ratio)
    learner.update_buffer(list(range(64)))
    sizes = np.random.default_rng(0).integers(1, 4, 10_000).tolist()
    new = replayed = 0
    for size in sizes:
        mixed = learner.mix_with_replay([-1] * size)["samples"]
        assert mixed[:size] == [-1] * size
        new, replayed = new + size, replayed + len(mixed) - size
        assert -1 < new * ratio / (1 - ratio) - replayed < 1 + 1e-6  # at any time, not only in the end
    assert abs(replayed / (new + replayed) - ratio) < 1 / (new + replayed)


def test_what_an_empty_buffer_could_not_give_is_not_made_up_for() -> None:
    learner = OnlineContinualLearner(buffer_size=100, replay_ratio=0.5)
    assert [len(learner.mix_with_replay([1, 2, 3])["samples"]) for _ in range(4)] == [3] * 4
    learner.update_buffer([1, 2])
    assert len(learner.mix_with_replay([1, 2, 3])["samples"]) == 5  # all there are
    learner.update_buffer([3, 4])
    assert len(learner.mix_with_replay([1, 2, 3])["samples"]) == 6


def test_columns_keep_their_types_and_rows_stay_together() -> None:
    learner = OnlineContinualLearner(buffer_size=30, replay_ratio=0.5)

    def batch(first: int) -> dict[str, Any]:
        ids = list(range(first, first + 5))
        rows = torch.tensor(ids)[:, None].expand(5, 3)
        return {"id": ids, "tokens": rows.clone(), "array": np.array(ids, np.int16), "text": [f"#{i}" for i in ids]}

    mixed: dict[str, Any] = {}
    for first in range(0, 100, 5):
        mixed = learner.mix_with_replay(batch(first))
        learner.update_buffer(batch(first))
    ids = mixed["id"]
    assert len(ids) == 10 and ids[:5] == [95, 96, 97, 98, 99] and all(i < 95 for i in ids[5:])
    assert mixed["tokens"].shape == (10, 3) and mixed["tokens"].dtype == torch.int64
    assert mixed["tokens"][:, 1].tolist() == ids == mixed["array"].tolist()
    assert mixed["array"].dtype == np.int16 and mixed["text"] == [f"#{i}" for i in ids]
    last = learner.last_mix
    assert (last.num_new, last.num_replayed, last.weights) == (5, 5, [1.0] * 10)
    assert last.mean_age == np.mean([95 - i for i in ids[5:]])
    listed = learner.mix_with_replay([{**dict.fromkeys(("tokens", "array", "text")), "id": i} for i in range(5)])
    assert listed["id"][:5] == [0, 1, 2, 3, 4] and len(listed["text"]) == 10


def test_weights_come_with_prioritized_samples_and_grow_towards_theirs() -> None:
    learner = OnlineContinualLearner(4, 0.5, "prioritized", beta_samples=40)
    learner.update_buffer(list("abcd"), importance=[1.0, 1.0, 1.0, 16.0])
    seen = set()
    for _ in range(20):
        mixed = learner.mix_with_replay([0, 0, 0, 0])["samples"]
        seen |= set(zip(mixed, [round(w, 3) for w in learner.last_mix.weights], strict=True))
    assert {w for sample, w in seen if sample in ("a", "b", "c", 0)} == {1.0}
    of_d = [w for sample, w in seen if sample == "d"]
    assert round(16.0 ** (-0.6 * 0.4), 3) in of_d and min(of_d) == round(16.0**-0.6, 3)


def test_clear_state_and_samples() -> None:
    learner = OnlineContinualLearner(buffer_size=10, replay_ratio=0.3)
    learner.update_buffer({"x": list(range(10))})
    assert sorted(sample["x"] for sample in learner.get_replay_samples(20)) == list(range(10))
    other = OnlineContinualLearner(buffer_size=10, replay_ratio=0.3)
    learner.mix_with_replay({"x": [0]})
    other.load_state_dict(learner.state_dict())
    for _ in range(30):
        assert learner.mix_with_replay({"x": [0, 1]}) == other.mix_with_replay({"x": [0, 1]})
    learner.clear_buffer()
    assert learner.get_replay_samples(3) == []
    assert learner.mix_with_replay({"x": [0] * 9})["x"] == [0] * 9


@pytest.mark.parametrize("ratio", [1.0, -0.1, 1.5, "much", float("nan"), None])
def test_a_ratio_that_is_none_is_refused(ratio: Any) -> None:
    with pytest.raises(UserError, match=f"replay_ratio={ratio}: must be 0 or more and less than 1"):
        OnlineContinualLearner(replay_ratio=ratio)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="selection_strategy=fifo: no such strategy. Known: class_loss"):
        OnlineContinualLearner(selection_strategy="fifo")
    learner = OnlineContinualLearner(buffer_size=4)
    with pytest.raises(UserError, match="buffer_size=4: is smaller than a batch of 5 samples"):
        learner.mix_with_replay([1, 2, 3, 4, 5])
    with pytest.raises(UserError, match="equally long.*'a': 2, 'b': 1"):
        learner.update_buffer({"a": [1, 2], "b": [1]})
    with pytest.raises(UserError, match="importance: has 1 entries, and the batch has 2"):
        learner.update_buffer([1, 2], importance=[0.5])
    learner.update_buffer({"a": [1, 2]})
    with pytest.raises(UserError, match=r"columns \['b'\], and a sample of an earlier one has \['a'\]"):
        learner.mix_with_replay({"b": [1, 2, 3]})
    wide = OnlineContinualLearner(buffer_size=4, replay_ratio=0.5)
    wide.update_buffer({"x": torch.zeros(2, 7)})
    with pytest.raises(UserError, match=r"'x' have the shape \(5,\), and a replayed one has \(7,\)"):
        wide.mix_with_replay({"x": torch.zeros(2, 5)})
