"""The loss head against the whole softmax and autograd: loss, gradients, and every statistic."""

import shutil
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.reference import logit_statistics
from torchtune_agent.losses import head
from torchtune_agent.losses.head import Chunking, Projection
from torchtune_agent.metrics.table import COLUMNS

SMALL = (61, 47, 1031)  # rows, hidden size, vocabulary
WHOLE_BLOCKS = (61, 47, 1024)
QWEN = (512, 896, 151_936)
MEASURED_ROWS = 61
SCALE = 7.0  # the Trainer scales the loss: gradients must follow
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@dataclass
class Inputs:
    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        hidden, weight = (t.detach().to(dtype).requires_grad_() for t in (self.hidden, self.weight))
        return Inputs(hidden, weight, self.labels, self.weights)


@dataclass
class Found:
    loss: torch.Tensor
    hidden: torch.Tensor  # gradients
    weight: torch.Tensor
    statistics: dict[str, torch.Tensor]


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, kind: str = "plain") -> Inputs:
    rows, size, vocab = shape
    generator = torch.Generator().manual_seed(0)
    exact = torch.float64 if vocab < 10**5 else torch.float32  # the large ones would take long to draw
    hidden = torch.randn(rows, size, generator=generator, dtype=exact)
    weight = torch.randn(vocab, size, generator=generator, dtype=exact) * (3 / size**0.5)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    weights = torch.ones(rows)
    if kind == "weighted":
        weights = torch.rand(rows, generator=generator) * 3
        weights[::4] = 0.0
    elif kind == "all rows equal":
        hidden, labels = hidden[:1].repeat(rows, 1), labels[:1].repeat(rows)
    elif kind == "huge logits":
        hidden = hidden * 1e5
    elif kind == "learned":  # every other label has nearly all the probability
        weight[labels] += hidden * 0.3
    return Inputs(hidden, weight, labels, weights).to(dtype)


def expected(x: Inputs, scale: float = SCALE) -> Found:
    """Logits whole, upcast, and everything by autograd."""
    logits = x.hidden @ x.weight.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = -logits.log_softmax(-1).gather(1, x.labels[:, None])[:, 0]
    loss = (nll * x.weights).sum()
    hidden, weight = torch.autograd.grad(loss * scale, (x.hidden, x.weight))
    with torch.no_grad():
        # In float64: in float32 the plain way is itself further away than the tolerance in a large vocabulary.
        measured = slice(MEASURED_ROWS) if logits.dtype == torch.float32 else slice(None)
        statistics = logit_statistics(logits[measured].double(), x.labels[measured])
        return Found(loss.detach(), hidden, weight, {name: v.to(logits.dtype) for name, v in statistics.items()})


def found(x: Inputs, chunking: Chunking, scale: float = SCALE) -> Found:
    loss, rows = head.cross_entropy(Projection((x.hidden, x.weight)), x.labels, x.weights, chunking, entropy_k=10)
    assert rows is not None and not rows.requires_grad
    hidden, weight = torch.autograd.grad(loss * scale, (x.hidden, x.weight))
    statistics = dict(zip(COLUMNS, rows.unbind(1), strict=True))
    assert (statistics.pop("count") == 1).all()
    return Found(loss.detach(), hidden, weight, statistics)


def error(got: torch.Tensor, truth: torch.Tensor, norm: float = 2) -> float:
    """Relative to the size of the whole tensor."""
    if truth.numel() == 0:
        return 0.0
    size = torch.linalg.vector_norm(truth, norm).double() + 1e-30
    return float(torch.linalg.vector_norm(got - truth, norm).double() / size)


def check(got: Found, truth: Found, tolerance: float) -> None:
    torch.testing.assert_close(got.loss, truth.loss, rtol=tolerance, atol=tolerance)
    assert error(got.hidden, truth.hidden) < tolerance
    assert error(got.weight, truth.weight) < tolerance
    assert error(got.weight, truth.weight, torch.inf) < tolerance
    assert list(got.statistics) == list(truth.statistics)
    for name, value in truth.statistics.items():
        own = got.statistics[name][: len(value)]
        torch.testing.assert_close(own, value, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("chunk_size", [8, 61, 2048])
@pytest.mark.parametrize("shape", [SMALL, WHOLE_BLOCKS, (1, 47, 1031), (3, 5, 11), (2, 5, 128)])
def test_it_equals_the_whole_softmax(shape, chunk_size, dtype):
    x = inputs(shape, dtype)
    check(found(x, Chunking(chunk_size)), expected(x), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["weighted", "all rows equal", "huge logits", "learned"])
def test_it_equals_the_whole_softmax_on_unusual_rows(kind, dtype):
    x = inputs(SMALL, dtype, kind)
    truth = expected(x)
    if kind == "learned":
        assert truth.statistics["top1_prob"].max() > 0.99
    check(found(x, Chunking(20)), truth, TOLERANCE[dtype])


@pytest.mark.slow
def test_it_equals_the_whole_softmax_of_a_real_vocabulary():
    x = inputs(QWEN, torch.float32, "weighted")
    check(found(x, Chunking(256)), expected(x), TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    "shape, kind",
    [
        ((610, 47, 1031), "plain"),
        ((610, 47, 1031), "weighted"),
        ((610, 47, 1031), "learned"),
        ((20, 47, 151_936), "plain"),
    ],
)
def test_in_bf16_it_is_no_further_from_the_truth_than_the_plain_way(shape, kind):
    x = inputs(shape, torch.bfloat16, kind)
    check_distances(x, Chunking(), scale=1.0, at_most=1.02)
    if shape[0] > 100:  # a scale that is no power of two rounds once more, and so does every further chunk
        check_distances(x, Chunking(), scale=SCALE, at_most=1.15)
        check_distances(x, Chunking(200), scale=SCALE, at_most=1.3)


def check_distances(x: Inputs, chunking: Chunking, scale: float, at_most: float) -> None:
    """From the truth in float64, ours is at most so many times that of the plain way in the same precision."""
    truth, plain, got = expected(x.to(torch.float64), scale), expected(x, scale), found(x, chunking, scale)
    for part in ("hidden", "weight", "loss"):
        ours, theirs = (error(getattr(one, part), getattr(truth, part)) for one in (got, plain))
        assert ours <= at_most * theirs + 1e-6, part
    for name, values in plain.statistics.items():
        true = truth.statistics[name][: len(values)]
        assert error(got.statistics[name][: len(values)], true) <= at_most * error(values, true) + 1e-6, name


def test_no_rows_have_no_loss_and_zero_gradients():
    x = inputs((0, 47, 1031), torch.float32)
    got = found(x, Chunking())
    assert got.loss == 0 and got.hidden.shape == (0, 47) and len(got.statistics["nll"]) == 0
    assert got.weight.shape == (1031, 47) and not got.weight.any()


def test_not_a_number_is_reported_in_its_row_alone():
    x = inputs(SMALL, torch.float32)
    with torch.no_grad():
        x.hidden[7, 3] = torch.nan
    got, truth = found(x, Chunking(20)), expected(x)
    assert got.loss.isnan()
    others = torch.arange(SMALL[0]) != 7
    for name, values in got.statistics.items():
        assert values[7].isnan(), name
        torch.testing.assert_close(values[others], truth.statistics[name][others], rtol=1e-5, atol=1e-5)
    assert torch.equal(got.hidden.isnan(), truth.hidden.isnan())
    assert torch.equal(got.weight.isnan(), truth.weight.isnan())


def test_only_the_gradients_that_are_asked_for_are_made():
    x = inputs(SMALL, torch.float32)
    truth = expected(x)
    for frozen in ("hidden", "weight"):
        y = x.to(torch.float32)
        getattr(y, frozen).requires_grad_(False)
        loss, _ = head.cross_entropy(Projection((y.hidden, y.weight)), y.labels, y.weights, Chunking(), None)
        (loss * SCALE).backward()
        assert getattr(y, frozen).grad is None
        kept = "weight" if frozen == "hidden" else "hidden"
        assert error(getattr(y, kept).grad, getattr(truth, kept)) < 1e-5


def test_several_products_add_up_to_the_logits():
    x, more = inputs(SMALL, torch.float64), inputs((61, 4, 1031), torch.float64)
    terms = (x.hidden, x.weight, more.hidden, more.weight)
    loss, _ = head.cross_entropy(Projection(terms), x.labels, x.weights, Chunking(20), None)
    logits = x.hidden @ x.weight.t() + more.hidden @ more.weight.t()
    truth = torch.nn.functional.cross_entropy(logits, x.labels, reduction="sum")
    assert loss.item() == pytest.approx(truth.item(), rel=1e-12)
    pairs = zip(torch.autograd.grad(loss, terms), torch.autograd.grad(truth, terms), strict=True)
    assert all(error(got, true) < 1e-12 for got, true in pairs)


class Watch(TorchDispatchMode):
    """Sees every operation: which ran, and how large a tensor any of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("measure", [True, False])
def test_logits_never_exist_whole(measure):
    x = inputs((610, 16, 4100), torch.bfloat16)
    with Watch() as watch:
        loss, _ = head.cross_entropy(
            Projection((x.hidden, x.weight)), x.labels, x.weights, Chunking(100), 10 if measure else None
        )
        loss.backward()
    assert watch.largest == 88 * 4100  # seven chunks of a size


def test_without_statistics_no_work_is_done_for_them():
    x = inputs(SMALL, torch.float32)
    ran = {}
    for entropy_k in (10, None):
        with Watch() as watch:
            head.cross_entropy(Projection((x.hidden, x.weight)), x.labels, x.weights, Chunking(), entropy_k)
        ran[entropy_k] = watch.names
    assert {"topk", "argmax", "clamp_", "special_entr"} <= set(ran[10])
    assert not {"topk", "argmax", "clamp_", "special_entr"} & set(ran[None])
    assert ran[None].count("exp") + ran[None].count("exp_") == 2  # one for the sum, one for the gradient


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [61, 1, 0])
def test_log_probabilities_have_any_gradient(rows, dtype):
    x = inputs((rows, *SMALL[1:]), dtype)
    upstream = torch.randn(rows, generator=torch.Generator().manual_seed(1)).to(dtype)
    truth = (x.hidden @ x.weight.t()).log_softmax(-1).gather(1, x.labels[:, None])[:, 0]
    got = head.log_p(Projection((x.hidden, x.weight)), x.labels, Chunking(20))
    torch.testing.assert_close(got, truth, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for one, other in zip(
        torch.autograd.grad((got * upstream).sum(), (x.hidden, x.weight)),
        torch.autograd.grad((truth * upstream).sum(), (x.hidden, x.weight)),
        strict=True,
    ):
        assert one.shape == other.shape and error(one, other) < TOLERANCE[dtype]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_gives_the_same_and_is_compiled_once(dtype):
    chunking = Chunking(30, compiled=True)
    found(inputs((61, *SMALL[1:]), dtype), chunking)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (61, 7, 3, 1, 2, 30, 40, 0):
            x = inputs((rows, *SMALL[1:]), dtype, "weighted")
            check(found(x, chunking), found(x, Chunking(30)), 1e-5 if dtype == torch.float32 else 2e-2)
