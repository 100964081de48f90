"""Means per class and their names, against the naive reference."""

import math
from pathlib import Path

import pytest
import torch

from tests.reference import class_means
from torchtune_agent.data.token_class import TokenClass
from torchtune_agent.errors import UserError
from torchtune_agent.metrics import DetailedMetricsTracker, metric_name
from torchtune_agent.metrics.sums import Sums

NUM, VOCAB = 48, 61
SPEC = Path(__file__).parents[4] / "shared" / "spec" / "agent-sft-metrics.md"


def tokens(scale: float = 3.0, dtype: torch.dtype = torch.float32, kinds: range = range(8)):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(NUM, VOCAB, generator=generator) * scale).to(dtype)
    labels = torch.randint(0, VOCAB, (NUM,), generator=generator)
    classes = torch.tensor([kinds[i % len(kinds)] for i in range(NUM)], dtype=torch.uint8)
    return logits, labels, classes


def reference(logits, labels, classes, split="train", entropy_k=10, slash=False) -> dict[str, float]:
    rows = zip(logits.double().tolist(), labels.tolist(), (TokenClass(int(c)) for c in classes), strict=True)
    metrics = {}
    for group, means in class_means(list(rows), entropy_k).items():
        for name, value in means.items():
            parts = [split, name] if group == "overall" else [split, group, name]
            metrics[("/" if slash else "_").join(parts)] = value
    return metrics


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9), (torch.bfloat16, 1e-5)])
@pytest.mark.parametrize("style", ["flat", "slash"])
@pytest.mark.parametrize("entropy_k", [1, 4, 10])
def test_every_metric_of_every_class_is_that_of_the_reference(dtype, tolerance, style, entropy_k):
    data = tokens(dtype=dtype)
    tracker = DetailedMetricsTracker(entropy_k=entropy_k, metric_names=style)
    tracker.update(*data)
    expected = reference(*data, entropy_k=entropy_k, slash=style == "slash")
    assert tracker.compute("train") == pytest.approx(expected, rel=tolerance, abs=tolerance)


def test_the_names_are_those_of_the_specification():
    if not SPEC.exists():
        pytest.skip("shared/spec is not beside this checkout")
    tracker = DetailedMetricsTracker()
    tracker.update(*tokens())
    for split in ("train", "val"):
        names = set(tracker.compute(split))
        for group in ("", "reasoning_", "tool_call_"):
            for metric in ("entropy", "perplexity", "top1_prob", "top2_prob", "top5_prob", "top10_prob"):
                assert f"{split}_{group}{metric}" in names
                assert f"{split}_{group}{metric}" in SPEC.read_text() or group


def test_a_class_without_tokens_has_no_metrics():
    data = tokens(kinds=range(TokenClass.REASONING, TokenClass.THINK))
    tracker = DetailedMetricsTracker()
    tracker.update(*data)
    names = tracker.compute("train")
    assert set(names) == set(reference(*data))
    assert not [name for name in names if "tool_call" in name or "think" in name or "arg" in name]


def test_nothing_added_means_no_metrics():
    tracker = DetailedMetricsTracker()
    assert tracker.compute("train") == {}
    tracker.update(torch.zeros(0, VOCAB), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.uint8))
    assert tracker.compute("train") == {}


@pytest.mark.parametrize(("kind", "group"), [(TokenClass.SPECIAL, "stop"), (TokenClass.IGNORED, None)])
def test_ends_of_turns_have_metrics_of_their_own_and_what_is_not_trained_has_none(kind, group):
    logits, labels, classes = tokens(kinds=range(2, 8))
    tracker = DetailedMetricsTracker()
    tracker.update(logits, labels, classes)
    before = tracker.compute("train")
    tracker.update(logits, labels, torch.full_like(classes, kind))
    after = tracker.compute("train")
    assert {name: value for name, value in after.items() if not name.startswith("train_stop_")} == before
    assert ("train_stop_accuracy" in after) == (group == "stop")


def test_shares_of_the_loss_and_of_exact_calls_are_named():
    sums = Sums.empty()
    sums.weighted[:] = torch.arange(8)
    sums.table[1:, 0] = 3.0  # every class has tokens
    sums.calls[:] = torch.tensor([8, 2, 5, 4])
    named = DetailedMetricsTracker().name("val", sums)
    assert named["val_stop_loss_share"] == pytest.approx(1 / 28)
    assert named["val_tool_call_loss_share"] == pytest.approx((4 + 5 + 6 + 7) / 28)
    assert named["val_reasoning_loss_share"] == pytest.approx((2 + 3) / 28)
    assert "val_loss_share" not in named
    assert named["val_tool_call_num_calls"] == 8
    assert named["val_tool_call_exact"] == 2 / 8
    assert named["val_tool_name_exact"] == 4 / 5
    assert "val/tool_call/exact" in DetailedMetricsTracker(metric_names="slash").name("val", sums)


def test_without_calls_there_are_no_shares_of_them():
    assert DetailedMetricsTracker().name("val", Sums.empty()) == {}
    sums = Sums.empty()
    sums.calls[:] = 1
    assert DetailedMetricsTracker(enable_token_classification=False).name("val", sums) == {}


def test_perplexity_is_that_of_the_classs_own_tokens_and_capped():
    logits = torch.zeros(4, 2)
    logits[2:, 0] = 1000.0  # the label is the other one: nll 1000
    labels = torch.tensor([0, 0, 1, 1])
    tracker = DetailedMetricsTracker()
    tracker.update(logits, labels, torch.tensor([2, 2, 4, 4]))
    metrics = tracker.compute("train")
    assert metrics["train_reasoning_perplexity"] == pytest.approx(2.0)
    assert metrics["train_tool_call_perplexity"] == 1e6
    assert metrics["train_perplexity"] == 1e6


@pytest.mark.parametrize("nll", [13.0, 13.8, 13.9, 2e5])
def test_perplexity_stays_exact_up_to_the_cap(nll):
    tracker = DetailedMetricsTracker()
    tracker.update(torch.tensor([[nll, 0.0]]).double(), torch.tensor([1]), torch.tensor([2]))
    assert tracker.compute("val")["val_perplexity"] == pytest.approx(min(math.exp(min(nll, 50)), 1e6), rel=1e-5)


def test_not_a_number_is_reported_where_it_is():
    logits, labels, _ = tokens()
    logits[3] = math.nan
    classes = torch.full((NUM,), int(TokenClass.REASONING))
    classes[3] = TokenClass.ARG_VALUE
    tracker = DetailedMetricsTracker()
    tracker.update(logits, labels, classes)
    metrics = tracker.compute("train")
    for name in ("nll", "perplexity", "entropy", "topk_entropy", "exact_entropy", "top1_prob", "top10_prob"):
        assert math.isnan(metrics[f"train_arg_value_{name}"]) and math.isnan(metrics[f"train_{name}"])
        assert math.isfinite(metrics[f"train_reasoning_{name}"])


def test_tables_of_micro_batches_add_up():
    logits, labels, classes = tokens()
    whole, parts = DetailedMetricsTracker(), DetailedMetricsTracker()
    whole.update(logits, labels, classes)
    for start in range(0, NUM, 7):
        piece = DetailedMetricsTracker()
        piece.update(logits[start : start + 7], labels[start : start + 7], classes[start : start + 7])
        parts.add(piece.table)
    assert parts.compute("val") == pytest.approx(whole.compute("val"), rel=1e-12)
    assert whole.compute("val", parts.table) == pytest.approx(whole.compute("val"), rel=1e-12)


def test_reset_forgets_everything():
    tracker = DetailedMetricsTracker()
    tracker.update(*tokens())
    tracker.reset()
    assert tracker.compute("train") == {}


def test_without_classification_only_the_overall_numbers_are_reported():
    tracker = DetailedMetricsTracker(enable_token_classification=False)
    tracker.update(*tokens())
    everything = DetailedMetricsTracker()
    everything.update(*tokens())
    prefixes = ("reasoning", "tool_call", "think", "call_", "arg_", "stop")
    overall = {
        name: value
        for name, value in everything.compute("train").items()
        if not name.removeprefix("train_").startswith(prefixes)
    }
    assert tracker.compute("train") == overall and overall


@pytest.mark.parametrize("entropy_k", [0, -1, 11])
def test_entropy_k_out_of_bounds_is_refused(entropy_k):
    with pytest.raises(UserError, match="entropy_k"):
        DetailedMetricsTracker(entropy_k=entropy_k)


def test_an_unknown_name_style_is_refused():
    with pytest.raises(UserError, match="metric_names"):
        DetailedMetricsTracker(metric_names="dots")  # pyright: ignore


def test_names():
    assert metric_name("train", "overall", "entropy") == "train_entropy"
    assert metric_name("val", "tool_call", "top5_prob") == "val_tool_call_top5_prob"
    assert metric_name("val", "tool_call", "top5_prob", "slash") == "val/tool_call/top5_prob"
