"""Shares of a vocabulary, read apart and merged, against the whole."""

import pytest
import torch

from torchtune_agent.metrics import softmax
from torchtune_agent.metrics.softmax import RowSums

VOCAB = 700
CUTS = [(0, 300), (300, 301), (301, 700)]


def logits_and_labels(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, VOCAB, generator=generator, dtype=torch.float64) * 5
    if kind == "ties":
        logits = logits.round()
    if kind == "all equal":
        logits = torch.zeros_like(logits)
    labels = torch.randint(0, VOCAB, (40,), generator=generator)
    labels[:10] = logits[:10].argmax(1)
    return logits, labels


def merged(logits: torch.Tensor, labels: torch.Tensor, measure: bool) -> RowSums:
    parts = [softmax.read(logits[:, a:b], labels, measure=measure, first_id=a) for a, b in CUTS]
    stacked = iter([torch.stack(fields) for fields in zip(*parts, strict=True) if fields[0] is not None])
    return softmax.merge(parts[0], lambda _: next(stacked))


@pytest.mark.parametrize("measure", [True, False])
@pytest.mark.parametrize("kind", ["usual", "ties", "all equal"])
def test_shares_know_together_what_the_whole_does(kind, measure):
    logits, labels = logits_and_labels(kind)
    whole, together = softmax.read(logits, labels, measure=measure), merged(logits, labels, measure)
    for name, expected, got in zip(RowSums._fields, whole, together, strict=True):
        if expected is None:
            assert got is None and not measure, name
        else:
            torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13, msg=name)


def test_the_gradients_of_the_shares_are_those_of_the_whole():
    logits, labels = logits_and_labels("usual")
    leaf = logits.clone().requires_grad_()
    size = torch.linspace(0, 3, len(labels), dtype=torch.float64)
    (-leaf.log_softmax(1).gather(1, labels[:, None])[:, 0] * size).sum().backward()
    assert leaf.grad is not None
    sums = merged(logits, labels, False)
    for a, b in CUTS:
        got = softmax.gradient_(logits[:, a:b].clone(), labels, sums, size, first_id=a)
        torch.testing.assert_close(got, leaf.grad[:, a:b], rtol=1e-12, atol=1e-14)
    got = softmax.gradient_(logits.clone(), labels, softmax.read(logits, labels, measure=False), size)
    torch.testing.assert_close(got, leaf.grad, rtol=1e-12, atol=1e-14)


def test_a_label_outside_the_vocabulary_is_an_error_and_not_a_loss():
    logits, labels = logits_and_labels("usual")
    labels[3] = VOCAB
    with pytest.raises(RuntimeError, match="out of bounds"):
        softmax.read(logits, labels, measure=False)
