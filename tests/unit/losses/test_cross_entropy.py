"""The cross-entropy objective against the plainest loss there is."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune.models.gemma2 import gemma2
from torchtune.models.qwen2 import lora_qwen2, qwen2
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import disable_adapter, get_adapter_params, set_trainable_params

from tests.reference import IGNORE_INDEX, class_means
from torchtune_agent.data import Batch, Collator, TokenClass
from torchtune_agent.data.joined import SampleInfo
from torchtune_agent.errors import UserError
from torchtune_agent.losses import CrossEntropy, token_logprobs
from torchtune_agent.losses.output import check_output
from torchtune_agent.metrics import COLUMNS, DetailedMetricsTracker
from torchtune_agent.metrics.detail import Detail
from torchtune_agent.metrics.sums import Sums

VOCAB = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "embed_dim": 32,
    "intermediate_dim": 48,
    "max_seq_len": 64,
}


def tiny_model(tied: bool = True) -> TransformerDecoder:
    torch.manual_seed(0)
    model = qwen2(**SIZES, tie_word_embeddings=tied)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return model


def conversation(seed: int, length: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (length,), generator=generator)
    classes = torch.randint(0, 8, (length,), generator=generator)
    return {
        "tokens": tokens.numpy(),
        "labels": torch.where(classes > 0, tokens, IGNORE_INDEX).numpy(),
        "token_class": classes.numpy(),
        "call_index": torch.full((length,), -1).numpy(),
    }


SAMPLES = [conversation(seed, length) for seed, length in enumerate([9, 17, 2, 13])]


def gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def naive(model: TransformerDecoder) -> tuple[float, dict[str, torch.Tensor], list]:
    """Summed loss, gradients, and (logits, label, class) of every label, one conversation at a time."""
    model.zero_grad()
    total, rows = 0.0, []
    for one in SAMPLES:
        logits = model(torch.tensor(one["tokens"])[None])[0].float()
        targets = torch.tensor(one["labels"])[1:]
        loss = F.cross_entropy(logits[:-1], targets, ignore_index=IGNORE_INDEX, reduction="sum")
        loss.backward()
        total += loss.item()
        for row, label, kind in zip(logits.detach(), targets.tolist(), one["token_class"][1:], strict=False):
            if label != IGNORE_INDEX:
                rows.append((row.tolist(), label, TokenClass(int(kind))))
    return total, {name: gradient_of(p).clone() for name, p in model.named_parameters()}, rows


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pack_to", [None, 22, 48])
@pytest.mark.parametrize("chunk_size", [3, 1000])
def test_loss_and_gradient_are_those_of_plain_cross_entropy(tied, pack_to, chunk_size):
    model = tiny_model(tied)
    total, gradients, rows = naive(model)
    model.zero_grad()
    packed = {None: [[s] for s in SAMPLES], 22: [[SAMPLES[0], SAMPLES[3]], [SAMPLES[1], SAMPLES[2]]], 48: [SAMPLES]}
    batch = Collator(0, pack_to)(packed[pack_to])
    objective = CrossEntropy(chunk_size=chunk_size)
    output = objective(model, batch, with_statistics=True)
    output.loss_sum.backward()
    assert objective.num_targets(batch) == len(rows)
    assert output.loss_sum.item() == pytest.approx(total, rel=1e-5)
    for name, parameter in model.named_parameters():
        scale = gradients[name].norm() + 1e-6
        assert (gradient_of(parameter) - gradients[name]).norm() / scale < 1e-5, name
    sums = Sums.empty()
    sums.add(output.loss_sum.detach(), output.tokens, batch)
    metrics = DetailedMetricsTracker().compute("x", sums.table)
    for group, means in class_means(rows).items():
        for name, value in means.items():
            full = f"x_{name}" if group == "overall" else f"x_{group}_{name}"
            assert metrics[full] == pytest.approx(value, rel=1e-4, abs=1e-5), full


def lora_model(dora: bool = False) -> TransformerDecoder:
    """Adapters on attention and output, everything else frozen."""
    torch.manual_seed(0)
    rank: dict[str, Any] = {"lora_rank": 4, "lora_alpha": 8, "use_dora": dora}
    model = lora_qwen2(["q_proj", "v_proj"], apply_lora_to_output=True, **SIZES, **rank)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    set_trainable_params(model, get_adapter_params(model))
    return model


def frozen_output() -> TransformerDecoder:
    model = tiny_model(tied=False)
    model.get_submodule("output").requires_grad_(False)
    return model


def gemma_model() -> TransformerDecoder:
    """Tied, with scaled embeddings and a cap behind its last norm."""
    torch.manual_seed(0)
    model = gemma2(**SIZES, head_dim=16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return model


WEIGHTED = [{**one, "weights": torch.rand(len(one["tokens"])).numpy()} for one in SAMPLES]


def naive_logprobs(model: TransformerDecoder, batch: Batch) -> torch.Tensor:
    log_p = model(batch.tokens).flatten(0, 1).log_softmax(-1)[batch.supervised]
    return log_p.gather(1, batch.labels.flatten()[batch.supervised][:, None])[:, 0]


def check_gradients(model: TransformerDecoder, ours: torch.Tensor, truth: torch.Tensor) -> None:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    got = torch.autograd.grad(ours, list(trained.values()), allow_unused=True)
    expected = torch.autograd.grad(truth, list(trained.values()), allow_unused=True)
    for name, one, other in zip(trained, got, expected, strict=True):
        assert one is not None and other is not None and other.norm() > 0, name
        assert (one - other).norm() / other.norm() < 1e-5, name


@pytest.mark.parametrize("make", [tiny_model, frozen_output, lora_model, gemma_model])
def test_weights_and_kinds_of_output_and_log_probabilities(make):
    model = make()
    batch = Collator(0)([[one] for one in WEIGHTED])
    truth, weights = naive_logprobs(model, batch), batch.weights.flatten()[batch.supervised]
    check_output(model)
    output = CrossEntropy()(model, batch, with_statistics=True)
    assert output.loss_sum.item() == pytest.approx(-(truth * weights).sum().item(), rel=1e-5)
    assert output.tokens is not None and not output.tokens.requires_grad
    torch.testing.assert_close(output.tokens[:, COLUMNS.index("nll")], -truth.detach(), rtol=1e-4, atol=1e-5)
    check_gradients(model, output.loss_sum, -(truth * weights).sum())
    logprobs = token_logprobs(model, batch, chunk_size=4)
    torch.testing.assert_close(logprobs, truth, rtol=1e-4, atol=1e-5)
    signed = torch.linspace(-1, 2, len(truth))
    check_gradients(model, (logprobs * signed).sum(), (naive_logprobs(model, batch) * signed).sum())
    logits = model(batch.tokens)  # the model is as it was before
    assert logits.shape == (*batch.tokens.shape, VOCAB)


def test_disabled_adapters_count_for_nothing():
    model, batch = lora_model(), Collator(0)([[one] for one in SAMPLES])
    with disable_adapter(model):
        loss = CrossEntropy()(model, batch, with_statistics=False).loss_sum
        assert loss.item() == pytest.approx(-naive_logprobs(model, batch).sum().item(), rel=1e-5)
    assert CrossEntropy()(model, batch, with_statistics=False).loss_sum.item() != pytest.approx(loss.item(), rel=1e-3)


class Capped(TransformerDecoder):
    def unembed(self, h: torch.Tensor) -> torch.Tensor:
        output: Any = self.output
        return torch.tanh(output(self.norm(h)))


def capped() -> TransformerDecoder:
    model = tiny_model()
    model.__class__ = Capped
    return model


def biased() -> TransformerDecoder:
    model = tiny_model(tied=False)
    model.output = torch.nn.Linear(32, VOCAB)
    return model


@pytest.mark.parametrize(
    "make, named", [(capped, "Capped"), (biased, "bias"), (lambda: lora_model(dora=True), "DoRALinear")]
)
def test_an_output_that_is_not_one_matrix_is_refused_by_name(make, named):
    with pytest.raises(UserError, match=named):
        check_output(make())


def test_a_chunk_of_no_rows_is_refused():
    with pytest.raises(UserError, match="chunk_size=0"):
        CrossEntropy(chunk_size=0)


def test_measuring_does_not_change_the_loss():
    model = tiny_model()
    batch = Collator(0)([[s] for s in SAMPLES])
    measured = CrossEntropy()(model, batch, with_statistics=True)
    without = CrossEntropy()(model, batch, with_statistics=False)
    assert torch.equal(measured.loss_sum, without.loss_sum)
    assert without.tokens is None and measured.tokens is not None


def test_without_gradients_the_loss_is_the_same():
    model, batch = tiny_model(), Collator(0)([[one] for one in SAMPLES])
    with torch.no_grad():
        validated = CrossEntropy()(model, batch, with_statistics=True)
    trained = CrossEntropy()(model, batch, with_statistics=True)
    assert not validated.loss_sum.requires_grad and torch.equal(validated.loss_sum, trained.loss_sum.detach())


@pytest.mark.parametrize("rows", [[], [[{"tokens": [1, 2, 3], "labels": [IGNORE_INDEX] * 3}]]])
@pytest.mark.parametrize("pack_to", [None, 8])
def test_a_batch_without_labels_has_zero_loss_and_zero_gradients(rows, pack_to):
    model = tiny_model()
    batch = Collator(0, pack_to)(rows)
    output = CrossEntropy()(model, batch, with_statistics=True)
    output.loss_sum.backward()
    assert output.loss_sum.item() == 0 and CrossEntropy().num_targets(batch) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert output.tokens is not None and len(output.tokens) == 0


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device: reading a value, or a size that depends on values."""

    OPS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        masks = name in ("index", "index_put", "index_put_") and any(
            one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1]
        )
        if name in self.OPS or masks:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_a_micro_batch_never_makes_the_host_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a packed one, whose mask is made on the host of lengths that never leave it."""
    model = tiny_model()
    batch = Collator(0)([[s] for s in SAMPLES])
    batch.info = lambda: [SampleInfo(str(i), "", ()) for i in range(len(SAMPLES))]
    sums, detail = Sums.empty(), Detail(["tool", "source"])
    for name in ("cpu", "item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, None)  # calling one would fail
    with HostReads() as reads:
        output = CrossEntropy()(model, batch, with_statistics=True)
        (output.loss_sum * 0.5).backward()
        assert output.tokens is not None
        sums.add(output.loss_sum.detach(), output.tokens, batch)
        detail.add(output.tokens, batch, step=1)
    monkeypatch.undo()
    assert reads.found == []
    with HostReads() as reads:
        sums.loss.item()
        output.tokens[output.tokens[:, 0] > 0]
    assert reads.found == ["_local_scalar_dense", "index"], "this is how they would be seen"
