"""Statistics of tokens and their sums per class, against the naive reference."""

import math

import pytest
import torch

from tests.reference import token_statistics as naive
from torchtune_agent.data.token_class import TokenClass
from torchtune_agent.metrics.table import COLUMNS, add_tokens, empty_table, token_statistics

VOCAB = 1031
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-5}  # bf16 logits are exact in fp32


def logits_like(kind: str, rows: int, dtype: torch.dtype, vocab: int = VOCAB) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    shapes = {
        "flat": normal * 0.01,
        "usual": normal * 3,
        "sharp": normal * 30,
        "huge": normal * 1e4,
        "shifted": normal + 1e4,
        "ties": (normal * 2).round(),
        "all equal": torch.zeros_like(normal),
        "certain": torch.eye(rows, vocab, dtype=torch.float64) * 1e4,
        "impossible": torch.where(normal > 1, -math.inf, normal),
    }
    return shapes[kind].to(dtype)


def labels_like(rows: int, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(1))


def check(logits: torch.Tensor, labels: torch.Tensor, entropy_k: int, tolerance: float) -> None:
    got = token_statistics(logits, labels, entropy_k)
    assert got.shape == (len(labels), len(COLUMNS))
    for row, label, statistics in zip(logits.double().tolist(), labels.tolist(), got.tolist(), strict=True):
        expected = {"count": 1.0, **naive(row, label, entropy_k)}
        for name, value in zip(COLUMNS, statistics, strict=True):
            assert value == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", ["flat", "usual", "sharp", "huge", "shifted", "ties", "all equal", "certain", "impossible"]
)
def test_statistics_are_those_of_the_reference(kind, dtype):
    logits = logits_like(kind, 7, dtype)
    check(logits, labels_like(7), 10, TOLERANCE[dtype])
    check(logits, logits.argmax(-1), 10, TOLERANCE[dtype])


@pytest.mark.parametrize("entropy_k", range(1, 11))
def test_every_number_of_outcomes_told_apart(entropy_k):
    check(logits_like("usual", 5, torch.float64), labels_like(5), entropy_k, 1e-9)


@pytest.mark.parametrize("vocab", [1, 2, 3, 9, 10, 11])
def test_vocabularies_smaller_than_ten(vocab):
    check(logits_like("usual", 4, torch.float64, vocab), labels_like(4, vocab), 10, 1e-9)


def test_the_lowest_id_wins_a_tie():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]] * 2)
    assert token_statistics(logits, torch.tensor([1, 2]))[:, COLUMNS.index("correct")].tolist() == [1.0, 0.0]


def test_more_outcomes_told_apart_never_mean_less_entropy():
    logits = logits_like("usual", 20, torch.float64)
    column = COLUMNS.index("topk_entropy")
    values = [token_statistics(logits, labels_like(20), k)[:, column] for k in range(1, 11)]
    assert all((b >= a - 1e-12).all() for a, b in zip(values, values[1:], strict=False))
    exact = token_statistics(logits, labels_like(20))[:, COLUMNS.index("exact_entropy")]
    assert (exact >= values[-1]).all()


def test_not_a_number_is_reported_as_such():
    logits = logits_like("usual", 3, torch.float32)
    logits[1, 5] = math.nan
    got = token_statistics(logits, labels_like(3))
    assert got[0].isfinite().all() and got[2].isfinite().all()
    poisoned = dict(zip(COLUMNS, got[1].tolist(), strict=True))
    assert [name for name, value in poisoned.items() if not math.isnan(value)] in (["count"], ["count", "correct"])
    assert poisoned["correct"] != 1.0


@pytest.mark.parametrize("label", [0, 5])
def test_a_row_that_is_not_a_number_is_never_a_correct_prediction(label):
    logits = torch.full((1, VOCAB), math.nan)
    assert token_statistics(logits, torch.tensor([label]))[0, COLUMNS.index("correct")].item() != 1.0


def test_a_table_holds_the_sums_of_every_class():
    logits, labels = logits_like("usual", 2500, torch.float32, 23), labels_like(2500, 23)
    classes = torch.randint(0, 8, (2500,), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    table = empty_table()
    add_tokens(table, logits, labels, classes)
    rows = token_statistics(logits, labels).double()
    for kind in TokenClass:
        assert torch.allclose(table[kind], rows[classes == kind].sum(0), rtol=1e-12)


def test_splitting_the_tokens_changes_nothing():
    logits, labels = logits_like("sharp", 60, torch.float32), labels_like(60)
    classes = torch.arange(60) % 8
    whole, parts = empty_table(), empty_table()
    add_tokens(whole, logits, labels, classes)
    for start, end in ((0, 1), (1, 1), (1, 37), (37, 60)):
        add_tokens(parts, logits[start:end], labels[start:end], classes[start:end])
    assert torch.allclose(whole, parts, rtol=1e-12)


def test_no_tokens_add_nothing():
    table = empty_table()
    add_tokens(table, torch.zeros(0, VOCAB), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.uint8))
    assert not table.any()


def test_measuring_leaves_the_logits_and_their_gradient_alone():
    logits = logits_like("usual", 4, torch.float32).requires_grad_()
    before = logits.detach().clone()
    table = empty_table()
    add_tokens(table, logits, labels_like(4), torch.full((4,), 2))
    assert torch.equal(logits.detach(), before) and not table.requires_grad
