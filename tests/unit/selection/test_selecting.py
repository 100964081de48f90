"""Guard rails, floors, quotas and targets; and what is said of what a user can mend."""

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests import selection_reference as naive
from tests.selection_pools import NUM, pool
from torchtune_agent.errors import UserError
from torchtune_agent.selection import STRATEGIES, Options, Pool, select
from torchtune_agent.selection import duplicates as by_likeness
from torchtune_agent.selection.duplicates import near_duplicates, signatures
from torchtune_agent.selection.options import target_number
from torchtune_agent.selection.selecting import ranks
from torchtune_agent.selection.writing import read_rows, write_selection

TEXTS = [np.random.default_rng(i).integers(0, 500, 60) for i in range(NUM)]


def with_copies(own: Pool) -> Pool:
    """Every fifth sample's vector is nearly that of the sample two before it."""
    assert own.embeddings is not None
    vectors = own.embeddings.copy()
    vectors[5::5] = vectors[3:-2:5] * 1.5 + 0.01
    return own.with_embeddings(vectors)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["tool", "source"])
def test_floors_and_quotas_hold_for_every_strategy(strategy: str, kind: str) -> None:
    own = pool(1)
    limits: dict[str, Any] = {f"min_per_{kind}": 2, f"max_share_per_{kind}": 0.4}
    found = select(own, Options(strategy, 20, **limits))
    groups: Any = own.tools if kind == "tool" else own.sources
    assert groups is not None

    def counts(rows: Any) -> Counter[str]:
        return Counter(name for row in rows for name in ({groups[row]} if kind == "source" else set(groups[row])))

    every, kept = counts(range(NUM)), counts(found.picks.rows)
    assert len(set(found.picks.rows.tolist())) == 20 or found.notes
    for name, number in every.items():
        assert min(2, number) <= kept[name] <= 8, name


def test_quotas_keep_the_first_picks_and_go_on_without_the_group() -> None:
    own = pool(2)
    loss, sources = own.losses["overall"], own.sources
    assert sources is not None
    expected: list[int] = []
    for row in naive.top(loss, NUM):  # by loss, a quota is a walk down the ranks
        if len(expected) < 20 and Counter(sources[i] for i in expected)[sources[row]] < 5:
            expected.append(row)
    found = select(own, Options("loss_topk", 20, max_share_per_source=0.25))
    assert found.picks.rows.tolist() == expected
    assert found.notes == ([] if len(expected) == 20 else [f"quotas allow only {len(expected)} of 20 samples"])


OPTIONS = {
    "strategy": "random",
    "target_size": 31,
    "loss_ratio": 0.2,
    "score_on": "tool_call",
    "dedup_similarity": 0.5,
    "dedup_distance": 0.4,
    "loss_cap_quantile": 0.8,
    "min_per_tool": 5,
    "min_per_source": 9,
    "max_share_per_tool": 0.25,
    "max_share_per_source": 0.5,
}


@pytest.mark.parametrize(("name", "value"), OPTIONS.items())
def test_every_option_changes_what_is_selected(name: str, value: Any) -> None:
    own, signed = with_copies(pool(3)), signatures([TEXTS[i // 2] for i in range(NUM)])
    base: dict[str, Any] = {"strategy": "hybrid", "target_size": 30}
    plain, other = (select(own, Options(**o), signatures=signed) for o in (base, base | {name: value}))
    assert set(plain.rows) != set(other.rows)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_guard_rails_come_before_the_strategy(strategy: str) -> None:
    own = with_copies(pool(4))
    assert own.embeddings is not None
    loss = own.losses["overall"]
    found = select(own, Options(strategy, "50%", dedup_distance=0.1, loss_cap_quantile=0.9))
    vectors = naive.unit(own.embeddings)
    duplicates = naive.first_of_alike(naive.distances(vectors, vectors) <= 0.1)
    rest = [row for row in range(NUM) if row not in duplicates]
    capped = [row for row in rest if loss[row] > np.quantile(loss[rest], 0.9)]
    assert found.duplicates == duplicates and len(duplicates) > 5
    assert found.capped.tolist() == capped and capped
    assert not set(found.rows) & {*duplicates, *capped} and len(found.rows) == 42
    assert len(select(own, replace(found.options, target_size="100%")).rows) == NUM - len(duplicates) - len(capped)


@pytest.mark.parametrize("all_with_all", [0, 10_000], ids=["buckets", "all with all"])
def test_copies_of_tokens_are_found_and_like_prompts_are_not(
    all_with_all: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_likeness, "_ALL_WITH_ALL", all_with_all)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 1000, 300)
    texts = [np.concatenate([prompt, rng.integers(0, 1000, 80)]) for _ in range(150)]
    for i in (20, 40, 60):  # a copy, a copy but for one token, and half a copy
        texts[i] = texts[7].copy()
    texts[40][340] += 1
    texts[60][340:] += 1
    texts[80] = np.empty(0, np.int64)
    assert naive.jaccard(texts[7][300:], texts[40][300:]) > 0.8 > naive.jaccard(texts[7][300:], texts[60][300:]) > 0.3
    signed = signatures(texts)
    assert near_duplicates(signed, 0.75) == {20: 7, 40: 7}
    assert near_duplicates(signed, 1.0) == {20: 7}
    shares = (signed[7] == signed[[40, 60, 8]]).mean(1)
    own = [naive.jaccard(texts[7][296:], texts[i][296:]) for i in (40, 60, 8)]  # the prompt does not count
    assert shares == pytest.approx(own, abs=0.15)


def test_buckets_miss_few_near_vectors() -> None:
    rng = np.random.default_rng(0)
    vectors = naive.unit(rng.standard_normal((3000, 32)))
    vectors[2000:] = naive.unit(vectors[:1000] + 0.005 * rng.standard_normal((1000, 32)))
    found = near_duplicates(vectors.astype(np.float32), 0.1)
    assert all(found[row] == row - 2000 for row in found) and len(found) >= 995


@pytest.mark.parametrize(
    ("target", "size", "number"), [(5, 10, 5), ("5", 10, 5), ("30%", 10, 3), (" 12.5% ", 80, 10), ("0.1%", 10, 1)]
)
def test_targets_are_numbers_or_shares(target: Any, size: int, number: int) -> None:
    assert target_number(target, size) == number


def test_length_does_not_decide_and_is_reported(tmp_path: Any) -> None:
    own = pool(5)
    longest = replace(own, losses={"overall": own.num_tokens.astype(float)})
    lengths = [select(p, Options("loss_topk", 20)) for p in (own, longest)]
    assert abs(lengths[0].length_correlation()) < 0.3 < 0.6 < lengths[1].length_correlation()
    assert ranks(np.array([3, 1, 3, 2])).tolist() == [2.5, 0, 2.5, 1]
    chosen, page = write_selection(lengths[1], tmp_path)
    written = json.loads(chosen.read_text())
    assert written["length"]["correlation"] == lengths[1].length_correlation()
    assert [one["id"] for one in written["selected"]] == [own.ids[row] for row in lengths[1].picks.rows]
    assert all(one["reason"] == f"overall loss {one['score']:.4g}" for one in written["selected"])
    assert read_rows(chosen, own.ids).tolist() == lengths[1].rows.tolist()
    with pytest.raises(UserError, match="missing"):
        read_rows(chosen, own.ids[:-60])
    with pytest.raises(UserError, match="cannot be read"):
        read_rows(page, own.ids)


def broken(column: str, value: float) -> Pool:
    own = pool()
    loss = own.losses["overall"].copy()
    if column == "loss":
        loss[7] = value
        return replace(own, losses={"overall": loss})
    array = np.array(getattr(own, column))
    array[7] = value
    return replace(own, **{column: array})


MISTAKES: dict[str, tuple[Any, str]] = {
    "strategy": (lambda: Options("hybird"), "Did you mean 'hybrid'"),
    "tokens": (lambda: Options(score_on="arg_values"), "Did you mean 'arg_value'"),
    "ratio": (lambda: Options(loss_ratio=1.5), "between 0 and 1"),
    "target of nothing": (lambda: Options(target_size=0), "at least 1"),
    "target of words": (lambda: Options(target_size="half"), "a share such as '30%'"),
    "target above all": (lambda: Options(target_size="130%"), "at most 100%"),
    "large target": (lambda: select(pool(), Options("random", 84)), "the pool has 83 samples"),
    "target after duplicates": (
        lambda: select(with_copies(pool()), Options("random", 83, dedup_distance=0.1)),
        "Lower target_size, or loosen",
    ),
    "floors": (lambda: select(pool(), Options("random", 5, min_per_tool=3)), "Lower the floors"),
    "no losses": (lambda: select(replace(pool(), losses={}), Options("loss_topk", 5)), "Give a model"),
    "no entropy": (lambda: select(replace(pool(), entropy=None), Options("uncertainty", 5)), "needs the entropy"),
    "no vectors": (lambda: select(replace(pool(), embeddings=None), Options("diversity", 5)), "needs the embeddings"),
    "no tools": (lambda: select(replace(pool(), tools=None), Options("random", 5, min_per_tool=1)), "which tool"),
    "no tokens": (lambda: select(pool(), Options("random", 5, dedup_similarity=0.8)), "Use dedup_distance"),
    "a loss that is none": (lambda: broken("loss", np.nan), "sample 'd.jsonl:8' is not a finite number"),
    "an infinite loss": (lambda: broken("loss", np.inf), "is not a finite number"),
    "an entropy that is none": (lambda: broken("entropy", np.nan), "entropy of sample 'd.jsonl:8'"),
    "a vector that is none": (lambda: broken("embeddings", np.nan), "embeddings of sample 'd.jsonl:8'"),
    "an id that is missing": (lambda: replace(pool(), ids=["a", "", *pool().ids[2:]]), "sample 1 of the pool has none"),
    "an id twice": (lambda: replace(pool(), ids=["a", "a", *pool().ids[2:]]), "'a' names several"),
    "scores of others": (lambda: replace(pool(), num_tokens=np.ones(7)), "7 values for 83 samples"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_with_a_remedy(name: str) -> None:
    make, message = MISTAKES[name]
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        make()
