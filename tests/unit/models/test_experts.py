"""Routed layers against a loop over tokens that knows nothing of sorting, stacks and grouped products."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.hf_models import CASES, save_random
from tests.reference import routed_feed_forward
from torchtune_agent.errors import UserError
from torchtune_agent.models import Architecture, Conversion, HFWeights, save_hf_folder
from torchtune_agent.models import experts as module
from torchtune_agent.models.experts import Experts, RoutedFeedForward

DIM, HIDDEN, NUMBER, PER_TOKEN = 24, 40, 11, 3


def layer(dtype: torch.dtype, *, normalized: bool = True) -> RoutedFeedForward:
    torch.manual_seed(0)
    made = RoutedFeedForward(DIM, Experts(NUMBER, PER_TOKEN, HIDDEN, normalized, (True,)))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        made.router.weight[[2, 10]] -= 9.0  # experts that no token of ours is sent to
    return made.to(dtype)


def tokens(dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(3, 7, DIM, generator=torch.Generator().manual_seed(1)).abs()).to(dtype).requires_grad_()


def ran(made: RoutedFeedForward, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output, and all gradients."""
    weigh = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x.dtype)
    y = made(x)
    (y * weigh).sum().backward()
    return y.detach(), {"x": x.grad, **{name: p.grad for name, p in made.named_parameters()}}  # pyright: ignore


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_outputs_and_gradients_are_those_of_a_naive_loop(
    dtype: torch.dtype, tolerance: float, normalized: bool
) -> None:
    made, x = layer(dtype, normalized=normalized), tokens(dtype)
    y, gradients = ran(made, x)
    exact = [value.detach().double().requires_grad_() for value in (x, *made.parameters())]
    expected, num_rows = routed_feed_forward(*exact, per_token=PER_TOKEN, normalized=normalized)
    weigh = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype).double()
    (expected * weigh).sum().backward()

    def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
        return float((got.double() - wanted).norm() / wanted.norm())

    assert error(y, expected.detach()) < tolerance
    for (name, gradient), leaf in zip(gradients.items(), exact, strict=True):
        assert leaf.grad is not None and error(gradient, leaf.grad) < tolerance, name
    alone = [expert for expert, rows in enumerate(num_rows) if rows == 0]
    assert {2, 10} <= set(alone) and sum(num_rows) == 3 * 7 * PER_TOKEN
    for stack in (gradients[f"experts.{name}"] for name in ("w1", "w2", "w3")):  # FSDP sends them: they must be there
        assert not stack[alone].any() and all(stack[expert].any() for expert in range(NUMBER) if expert not in alone)


def test_in_one_product_and_one_by_one_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    for name in ("_in_one", "_one_by_one"):
        way = getattr(RoutedFeedForward, name)
        monkeypatch.setattr(RoutedFeedForward, name, lambda *a, way=way, name=name: used.append(name) or way(*a))
    y, gradients = ran(layer(torch.bfloat16), tokens(torch.bfloat16))
    monkeypatch.setattr(module, "_ALIGNED", 7)  # as if rows did not fit
    again, others = ran(layer(torch.bfloat16), tokens(torch.bfloat16))
    assert used == ["_in_one", "_one_by_one"]
    torch.testing.assert_close(y, again, rtol=1e-2, atol=1e-2)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-2, atol=1e-2)


def weights_of(folder: Path) -> HFWeights:
    return HFWeights(folder, Conversion(Architecture.from_folder(folder)))


def test_a_rank_reads_the_experts_it_has(tmp_path: Path) -> None:
    theirs, whole, folder = save_random(tmp_path, *CASES["qwen3_moe"]), weights_of(tmp_path), tmp_path / "files"
    save_hf_folder(whole, folder, tmp_path, max_shard_bytes=8000)  # about one expert's weight each
    weights = weights_of(folder)
    name, stack = "layers.1.mlp.experts.w3", theirs.model.layers[1].mlp.experts.gate_up_proj[:, 40:]
    assert weights.shape(name) == (6, 40, 48) and torch.equal(weights[name], stack)
    for file in {file for file, _ in weights._stacks[name][:2]}:  # whoever reads the last ones needs no others
        (folder / file).unlink()
    assert torch.equal(weights_of(folder).rows(name, 4, 6), stack[4:])
    assert weights_of(folder).rows(name, 6, 6).shape == (0, 40, 48)  # more ranks than experts
    with pytest.raises(UserError, match="is missing"):
        weights_of(folder).rows(name, 1, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers.2.mlp.experts.4.up_proj.weight": None}, "lacks 'model.layers.2.mlp.experts.4.up_proj.weight'"),
        ({"model.layers.2.mlp.experts.6.up_proj.weight": 1}, "holds 'model.layers.2.mlp.experts.6.up_proj.weight'"),
        ({"model.layers.2.mlp.experts.gate_up_proj": 1}, "holds 'model.layers.2.mlp.experts.gate_up_proj'"),
        ({"model.layers.2.mlp.shared_expert.up_proj.weight": 1}, "holds 'model.layers.2.mlp.shared_expert.up_proj"),
    ],
)
def test_experts_that_are_not_the_models_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_random(tmp_path, *CASES["qwen3_moe"])
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = torch.zeros(1)
    save_file(tensors, file)
    with pytest.raises(UserError, match=message):
        weights_of(tmp_path)


def test_what_older_folders_call_the_number_of_experts(tmp_path: Path) -> None:
    save_random(tmp_path, *CASES["qwen3_moe"])
    newer: dict[str, Any] = json.loads((tmp_path / "config.json").read_text())
    older: dict[str, Any] = {key: value for key, value in newer.items() if key != "num_local_experts"} | {
        "num_experts": 6
    }
    assert "num_local_experts" in newer
    assert Architecture.from_config(older) == Architecture.from_config(newer)
    assert transformers.Qwen3MoeConfig(**older).num_experts == 6
