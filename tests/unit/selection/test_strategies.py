"""Every strategy picks what a naive one picks."""

import numpy as np
import pytest
import torch

from tests import selection_reference as naive
from tests.selection_pools import NUM, pool
from torchtune_agent.selection import STRATEGIES, Options, Pool, kcenter, select
from torchtune_agent.selection.facility import facility_location
from torchtune_agent.selection.importance import forgetting_risk, window_distance
from torchtune_agent.selection.kcenter import k_center


def picked(own: Pool, **options) -> list[int]:
    """In the order of picking."""
    return select(own, Options(**options)).picks.rows.tolist()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("number", [1, 20, NUM])
def test_strategies_pick_what_naive_ones_pick(seed: int, number: int) -> None:
    own = pool(seed)
    assert own.embeddings is not None and own.entropy is not None and own.error is not None
    vectors, loss = naive.unit(own.embeddings), own.losses["overall"]
    importance = naive.importance(loss, own.error, vectors, 1000)
    expected = {
        "loss_topk": naive.top(loss, number),
        "uncertainty": naive.top(own.entropy, number),
        "diversity": naive.k_center(vectors, number, [])[0],
        "hybrid": naive.hybrid(loss, vectors, number, 0.6),
        "ssis": naive.top(importance, number),
    }
    found = {name: picked(own, strategy=name, target_size=number) for name in STRATEGIES}
    drawn, facility = found.pop("random"), found.pop("facility_location")
    assert max(naive.facility_gaps(vectors, facility)) < 1e-4  # float32, of sums of up to 83
    assert len(set(facility)) == number
    assert found == expected
    assert len(set(drawn)) == number


def test_losses_are_those_of_the_tokens_asked_for_and_samples_without_come_last() -> None:
    own = pool()
    calls = own.losses["tool_call"]
    found = picked(own, strategy="loss_topk", target_size=NUM, score_on="tool_call")
    assert found == naive.top(calls, NUM) != picked(own, strategy="loss_topk", target_size=NUM)
    assert np.isnan(calls[found[-20:]]).all() and not np.isnan(calls[found[:50]]).any()


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_the_ratio_of_hybrid(ratio: float) -> None:
    own = pool()
    assert own.embeddings is not None
    expected = naive.hybrid(own.losses["overall"], naive.unit(own.embeddings), 20, ratio)
    assert picked(own, strategy="hybrid", target_size=20, loss_ratio=ratio) == expected


def clustered(number: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((9, width))
    return (centers[rng.integers(0, 9, number)] + 0.2 * rng.standard_normal((number, width))).astype(np.float32)


@pytest.mark.parametrize("given", [0, 1, 37])
def test_k_center_with_many_working_sets_is_brute_force(given: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets so small that picks come from dozens of them, and blocks smaller than what they are cut from."""
    for name, value in {"_SMALLEST": 5, "_LARGEST": 40, "_ROWS": 17, "_CENTERS": 11, "_FEW_PICKS": 2}.items():
        monkeypatch.setattr(kcenter, name, value)
    vectors = clustered(501, 13)
    rows = list(range(0, 500, 13))[:given]
    found = k_center(torch.from_numpy(vectors), 200, torch.from_numpy(vectors[rows]))
    expected, radius = naive.k_center(vectors, 200, rows)
    assert found.picks.tolist() == expected
    assert found.radius == pytest.approx(radius, rel=1e-4)
    together = vectors[rows + expected]
    far = [naive.distances(together[i : i + 1], together[:i]).min() for i in range(len(rows), len(together)) if i]
    assert found.distances.tolist()[-len(far) :] == pytest.approx(far, rel=1e-3, abs=1e-3)


def test_k_center_of_equal_vectors_picks_each_once() -> None:
    found = k_center(torch.ones(30, 4), 30)
    assert sorted(found.picks.tolist()) == list(range(30)) and found.radius == 0


def test_facility_location_of_drawn_clients_and_given_picks(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.from_numpy(naive.unit(clustered(300, 6)).astype(np.float32))
    alone = facility_location(vectors, 12)[0].tolist()
    assert facility_location(vectors, 7, vectors[alone[:5]])[0].tolist() == alone[5:]
    monkeypatch.setattr("torchtune_agent.selection.facility.MOST_CLIENTS", 100)
    drawn = [facility_location(vectors, 12, seed=seed)[0].tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_importance_looks_back_as_far_as_its_window() -> None:
    vectors = naive.unit(clustered(700, 5)).astype(np.float32)
    for window in (1, 3, 600):
        apart = naive.distances(vectors, vectors)
        expected = [apart[i, max(0, i - window) : i].min() for i in range(1, len(vectors))]
        found = window_distance(torch.from_numpy(vectors), window)
        assert found[1:] == pytest.approx(expected, abs=2e-3) and found[0] == max(found)
    assert (forgetting_risk(np.zeros(700), torch.from_numpy(vectors)) == 0).all()


def test_seeds_decide_draws_and_nothing_else() -> None:
    own = pool()
    for name in STRATEGIES:
        runs = [picked(own, strategy=name, target_size=20, seed=seed) for seed in (0, 0, 1)]
        assert runs[0] == runs[1] and (runs[0] != runs[2]) == (name == "random"), name
