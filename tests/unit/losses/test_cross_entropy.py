"""The cross-entropy objective against the plainest loss there is."""

import pytest
import torch
from torch.nn import functional as F
from torchtune.models.qwen2 import qwen2
from torchtune.modules import TransformerDecoder

from tests.reference import IGNORE_INDEX, class_means
from torchtune_agent.data import Collator, TokenClass
from torchtune_agent.losses import CrossEntropy
from torchtune_agent.metrics import DetailedMetricsTracker

VOCAB = 61


def tiny_model(tied: bool = True) -> TransformerDecoder:
    torch.manual_seed(0)
    model = qwen2(
        vocab_size=VOCAB,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        embed_dim=32,
        intermediate_dim=48,
        max_seq_len=64,
        tie_word_embeddings=tied,
    )
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
@pytest.mark.parametrize("output_chunks", [0, 1, 3])
def test_loss_and_gradient_are_those_of_plain_cross_entropy(tied, pack_to, chunk_size, output_chunks):
    model = tiny_model(tied)
    total, gradients, rows = naive(model)
    model.zero_grad()
    packed = {None: [[s] for s in SAMPLES], 22: [[SAMPLES[0], SAMPLES[3]], [SAMPLES[1], SAMPLES[2]]], 48: [SAMPLES]}
    batch = Collator(0, pack_to)(packed[pack_to])
    if output_chunks:
        model.set_num_output_chunks(output_chunks)
    objective = CrossEntropy(chunk_size=chunk_size)
    output = objective(model, batch, with_statistics=True)
    output.loss_sum.backward()
    assert objective.num_targets(batch) == len(rows)
    assert output.loss_sum.item() == pytest.approx(total, rel=1e-5)
    for name, parameter in model.named_parameters():
        scale = gradients[name].norm() + 1e-6
        assert (gradient_of(parameter) - gradients[name]).norm() / scale < 1e-5, name
    metrics = DetailedMetricsTracker().compute("x", output.table)
    for group, means in class_means(rows).items():
        for name, value in means.items():
            full = f"x_{name}" if group == "overall" else f"x_{group}_{name}"
            assert metrics[full] == pytest.approx(value, rel=1e-4, abs=1e-5), full


def test_measuring_does_not_change_the_loss():
    model = tiny_model()
    batch = Collator(0)([[s] for s in SAMPLES])
    with_table = CrossEntropy()(model, batch, with_statistics=True)
    without = CrossEntropy()(model, batch, with_statistics=False)
    assert torch.equal(with_table.loss_sum, without.loss_sum)
    assert without.table is None and with_table.table is not None


@pytest.mark.parametrize("rows", [[], [[{"tokens": [1, 2, 3], "labels": [IGNORE_INDEX] * 3}]]])
@pytest.mark.parametrize("pack_to", [None, 8])
def test_a_batch_without_labels_has_zero_loss_and_zero_gradients(rows, pack_to):
    model = tiny_model()
    batch = Collator(0, pack_to)(rows)
    output = CrossEntropy()(model, batch, with_statistics=True)
    output.loss_sum.backward()
    assert output.loss_sum.item() == 0 and CrossEntropy().num_targets(batch) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert output.table is not None and not output.table.any()
