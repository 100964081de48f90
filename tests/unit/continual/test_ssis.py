"""The importance of samples: formula, purity, and signals of a real model against all logits and plain autograd."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torchtune.models.qwen2 import qwen2
from torchtune.modules import TransformerDecoder

from torchtune_agent.continual.fisher import DiagonalFisher, sample_gradients
from torchtune_agent.continual.ssis import ImportanceScorer, Signals, losses_and_embeddings, measure
from torchtune_agent.data import Collator
from torchtune_agent.distributed import World, make_mesh, process_group
from torchtune_agent.errors import UserError
from torchtune_agent.losses import CrossEntropy


def signals(n: int, seed: int, width: int = 5) -> Signals:
    generator = torch.Generator().manual_seed(seed)
    losses, embeddings = torch.rand(n, generator=generator), torch.randn(n, width, generator=generator)
    return Signals(losses, embeddings, torch.rand(n, generator=generator) * 100)


def test_importance_is_the_weighted_sum_over_a_sliding_window() -> None:
    scorer = ImportanceScorer(window=40)
    history = [signals(7, seed) for seed in range(12)]
    nearest: list[float] = []
    seen: list[torch.Tensor] = []
    for one in history:
        if seen:
            known = torch.cat(seen)[-40:]
            nearest += [min(float((a - b).norm()) for b in known) for a in one.embeddings]
        seen.append(one.embeddings)
        scorer.update(one)
    new = signals(600, 99)  # more than a block
    window = torch.cat(seen)[-40:]
    means = [
        float(torch.cat([one.losses for one in history])[-40:].mean()),
        sum(nearest[-40:]) / 40,
        float(torch.cat([one.risks for one in history])[-40:].mean()),
    ]
    got = scorer.score(new)
    for i in (0, 1, 255, 256, 599):
        distance = min(float((new.embeddings[i] - b).norm()) for b in window)
        parts = [x / (x + m) for x, m in zip((float(new.losses[i]), distance, float(new.risks[i])), means, strict=True)]
        assert [float(part[i]) for part in got[1:]] == pytest.approx(parts, rel=1e-4)
        assert float(got.importance[i]) == pytest.approx(0.4 * parts[0] + 0.3 * parts[1] + 0.3 * parts[2], rel=1e-4)


def test_scoring_changes_nothing_and_state_comes_back() -> None:
    scorer, never_asked = ImportanceScorer(window=20), ImportanceScorer(window=20)
    for seed in range(6):
        scorer.score(signals(50, 100 + seed))
        for one in (scorer, never_asked):
            one.update(signals(9, seed))
    loaded = ImportanceScorer(window=20)
    loaded.load_state_dict(scorer.state_dict())
    new = signals(30, 7)
    first = scorer.score(new)
    for other in (scorer.score(new), never_asked.score(new), loaded.score(new)):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_first_sample_is_new_and_average_and_a_repeated_one_is_no_news() -> None:
    scorer = ImportanceScorer()
    first = signals(1, 0)
    assert [float(part) for part in scorer.score(first)] == pytest.approx([0.4 / 2 + 0.3 + 0.3 / 2, 0.5, 1.0, 0.5])
    scorer.update(first)
    scorer.update(signals(5, 1))
    assert float(scorer.score(first).diversity) < 1e-3


def tiny_model() -> TransformerDecoder:
    torch.manual_seed(0)
    model = qwen2(31, 1, 2, 2, 16, 24, 64)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.4)
    return model


def sample(number: int, length: int) -> dict[str, Any]:
    tokens = torch.randint(0, 31, (length,), generator=torch.Generator().manual_seed(number)).numpy()
    labels = tokens.copy()
    labels[:2] = -100
    return {"tokens": tokens, "labels": labels}


def naive(model: TransformerDecoder, one: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The sample's mean loss, from all logits, and the mean of the states its trained tokens are predicted from."""
    states: list[Any] = []
    handle = model.norm.register_forward_hook(lambda module, inputs, output: states.append(output))
    logits = model(torch.tensor(one["tokens"])[None])[0, :-1]
    handle.remove()
    labels = torch.tensor(one["labels"][1:])
    return F.cross_entropy(logits, labels, ignore_index=-100), states[0][0, :-1][labels != -100].mean(0)


def test_signals_are_those_of_plain_autograd() -> None:
    model = tiny_model()
    samples = [sample(i, 5 + 3 * i) for i in range(4)]
    collate = Collator(0)
    losses, embeddings = losses_and_embeddings(model, collate([[one] for one in samples]))
    truth = [naive(model, one) for one in samples]
    torch.testing.assert_close(losses, torch.stack([loss for loss, _ in truth]).detach())
    torch.testing.assert_close(embeddings, torch.stack([state for _, state in truth]).detach())
    packed, _ = losses_and_embeddings(model, Collator(0, pack_to=64)([samples]))
    torch.testing.assert_close(packed, losses)

    gradients = [torch.autograd.grad(naive(model, one)[0], list(model.parameters())) for one in samples]
    fisher = [torch.zeros_like(p) for p in model.parameters()]
    for i in (0, 1):
        fisher = [0.9 * f + 0.1 * g.square() for f, g in zip(fisher, gradients[i], strict=True)]
    risks = [sum(float((f * g.square()).sum()) for f, g in zip(fisher, gradients[i], strict=True)) for i in (2, 3)]

    online = DiagonalFisher(decay=0.9)
    for one in sample_gradients(model, CrossEntropy(), [collate([[samples[i]]]) for i in (0, 1)]):
        online.add(one)
    before = {name: value.clone() for name, value in online.values.items()}
    with process_group("cpu"):
        world = World(0, 1, torch.device("cpu"), make_mesh("cpu", 1, 1))
        got = measure(model, CrossEntropy(), [collate([[samples[i]]]) for i in (2, 3)], online, world)
    assert got.risks.tolist() == pytest.approx(risks, rel=1e-4)
    torch.testing.assert_close(got.losses, losses[2:])
    assert all(torch.equal(before[name], value) for name, value in online.values.items())
    assert model.training and all(p.grad is None for p in model.parameters())


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="ssis.window=0"):
        ImportanceScorer(window=0)
    with pytest.raises(UserError, match="add up to 1"):
        ImportanceScorer(weights=(0.5, 0.5, 0.5))
