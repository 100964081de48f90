"""Whole calls, tools, sources and samples, against plain loops."""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from pyarrow import parquet

from torchtune_agent.data.collate import Batch, Collator
from torchtune_agent.data.joined import SampleInfo
from torchtune_agent.data.token_class import GROUPS, TokenClass
from torchtune_agent.metrics.calls import CALL_SUMS, call_sums, call_table
from torchtune_agent.metrics.detail import Detail, merged, most_frequent
from torchtune_agent.metrics.table import COLUMNS

TOOLS = ("add", "né", "")


def sample(rng: np.random.Generator) -> dict:
    """Turns of text and calls; some tokens of a call, or all, may not be trained."""
    classes, calls, call = [TokenClass.IGNORED] * 2, [-1, -1], 0
    for _ in range(rng.integers(0, 4)):
        size = int(rng.integers(0, 3))
        classes += [TokenClass.REASONING] * size
        calls += [-1] * size
        inside = rng.choice([4, 5, 5, 6, 7], int(rng.integers(1, 6))).tolist()
        classes += inside
        calls += [call] * len(inside)
        call += 1
    classes.append(TokenClass.SPECIAL)
    calls.append(-1)
    classes, calls = np.array(classes), np.array(calls)
    dropped = (rng.random(len(classes)) < 0.2) | ((calls == 0) & (rng.random() < 0.3))
    classes[dropped], calls[dropped] = TokenClass.IGNORED, -1
    labels = np.where(classes != TokenClass.IGNORED, 7, -100)
    return {"tokens": np.full(len(classes), 7), "labels": labels, "token_class": classes, "call_index": calls}


def made(seed: int, pack_to: int | None = None) -> tuple[list[dict], list[SampleInfo], Batch, torch.Tensor]:
    rng = np.random.default_rng(seed)
    samples = [sample(rng) for _ in range(5)]
    infos = [
        SampleInfo(f"f:{seed}.{i}", rng.choice(["web", "lab"]), tuple(rng.choice(TOOLS, 4).tolist())) for i in range(5)
    ]
    batch = Collator(0, pack_to)([samples] if pack_to else [[one] for one in samples])
    batch.info = lambda: infos
    tokens = torch.rand(batch.num_supervised, len(COLUMNS))
    tokens[:, COLUMNS.index("correct")] = torch.from_numpy(rng.choice([0.0, 1.0, 1.0, 1.0], batch.num_supervised))
    return samples, infos, batch, tokens


def truth(samples, infos, tokens):
    """(sample, tool, source, call, class, nll, correct) of every trained token, in order."""
    rows = iter(tokens[:, [COLUMNS.index("nll"), COLUMNS.index("correct")]].tolist())
    for one, info in zip(samples, infos, strict=True):
        for kind, call, label in list(zip(one["token_class"], one["call_index"], one["labels"], strict=True))[1:]:
            if label != -100:
                nll, correct = next(rows)
                yield info.where, info.tools[call] if call >= 0 else None, info.source, call, kind, nll, correct


@pytest.mark.parametrize("pack_to", [None, 200])
@pytest.mark.parametrize("seed", range(4))
def test_calls_are_exact_where_every_token_is(seed, pack_to):
    samples, infos, batch, tokens = made(seed, pack_to)
    calls: dict = defaultdict(list)
    for where, _, _, call, kind, _, correct in truth(samples, infos, tokens):
        if call >= 0:
            calls[where, call].append((kind, correct))
    named = [[c for kind, c in call if kind == TokenClass.CALL_NAME] for call in calls.values()]
    expected = {
        "calls": len(calls),
        "exact_calls": sum(all(c for _, c in call) for call in calls.values()),
        "names": sum(bool(name) for name in named),
        "exact_names": sum(bool(name) and all(name) for name in named),
    }
    sums = call_sums(call_table(tokens, batch)).tolist()
    assert dict(zip(CALL_SUMS, sums, strict=True)) == expected


def test_a_call_with_a_token_that_is_not_a_number_is_not_exact():
    _, _, batch, tokens = made(0)
    tokens[:, COLUMNS.index("correct")] = 1.0
    assert call_sums(call_table(tokens, batch)).tolist()[1] == call_sums(call_table(tokens, batch)).tolist()[0] > 0
    tokens[:, COLUMNS.index("correct")] = math.nan
    assert call_sums(call_table(tokens, batch)).tolist()[1] == 0


def test_a_batch_without_calls_or_tokens_has_none():
    batch = Collator(0)([])
    assert call_sums(call_table(torch.zeros(0, len(COLUMNS)), batch)).tolist() == [0] * len(CALL_SUMS)


def test_tools_and_sources_are_those_of_a_plain_loop():
    tools: dict = defaultdict(lambda: defaultdict(list))
    sources: dict = defaultdict(list)
    ranks = [Detail(["tool", "source"]), Detail(["tool", "source"])]
    for seed in range(6):
        samples, infos, batch, tokens = made(seed)
        ranks[seed % 2].add(tokens, batch, step=seed)
        if seed % 3 == 0:
            ranks[seed % 2].fetch()
        for where, tool, source, call, kind, nll, correct in truth(samples, infos, tokens):
            if tool is not None:
                tools[tool][where, call].append((nll, correct))
            if kind in GROUPS["overall"]:
                sources[source].append(nll)
    for detail in ranks:
        detail.fetch()
    groups = merged(detail.take() for detail in ranks)
    by_tool = most_frequent(groups, "tool", 10)
    assert set(by_tool) == set(tools) and len(tools) == 3
    for name, calls in tools.items():
        flat = [pair for call in calls.values() for pair in call]
        exact = sum(all(correct for _, correct in call) for call in calls.values())
        row = by_tool[name]
        assert (row["calls"], row["tokens"]) == (len(calls), len(flat))
        assert row["loss"] == pytest.approx(sum(nll for nll, _ in flat) / len(flat))
        assert row["exact"] == pytest.approx(exact / len(calls))
    by_source = most_frequent(groups, "source", 10)
    assert {name: row["tokens"] for name, row in by_source.items()} == {k: len(v) for k, v in sources.items()}
    for name, nlls in sources.items():
        assert by_source[name]["loss"] == pytest.approx(sum(nlls) / len(nlls))
    assert list(most_frequent(groups, "tool", 1)) == [max(tools, key=lambda name: len(tools[name]))]
    assert all(detail.take() == {} for detail in ranks)


def test_the_ledger_has_a_line_for_every_sample_class_and_step(tmp_path):
    detail = Detail(ledger=tmp_path / "losses", rank=1)
    expected: dict = defaultdict(list)
    for seed in range(3):
        samples, infos, batch, tokens = made(seed)
        detail.add(tokens, batch, step=seed + 1)
        for where, _, _, _, kind, nll, _ in truth(samples, infos, tokens):
            expected[where, seed + 1, TokenClass(kind).name.lower()].append(nll)
    detail.fetch()
    detail.write()
    detail.write()  # there is nothing more to write
    rows = parquet.read_table(tmp_path / "losses").to_pylist()
    assert len(list((tmp_path / "losses").iterdir())) == 1 and len(rows) == len(expected)
    for row in rows:
        nlls = expected[row["sample"], row["step"], row["token_class"]]
        assert row["tokens"] == len(nlls) and row["loss"] == pytest.approx(sum(nlls) / len(nlls))
