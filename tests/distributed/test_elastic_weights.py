"""Elastic weight consolidation on one rank and on two: Fisher information, penalty and gradient against the formula.

`torchrun THIS_FILE RESULT.json` is what the test starts.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from torchtune.models.qwen2 import lora_qwen2, qwen2
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params, set_trainable_params

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from torchtune_agent.continual.ewc import ElasticWeights  # noqa: E402
from torchtune_agent.data import Collator  # noqa: E402
from torchtune_agent.data.collate import Batch  # noqa: E402
from torchtune_agent.distributed import World, make_mesh, process_group  # noqa: E402
from torchtune_agent.losses import CrossEntropy  # noqa: E402
from torchtune_agent.training.parallel import prepare  # noqa: E402
from torchtune_agent.training.settings import Settings  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": 37,  # odd, like the widths: two ranks have shards of different sizes
    "num_layers": 1,
    "num_heads": 3,
    "num_kv_heads": 3,
    "embed_dim": 18,
    "intermediate_dim": 25,
    "max_seq_len": 32,
}
STRENGTH, DECAY = 7.0, 0.5
NUM_STEP_SAMPLES = 4  # two micro-batches of one sample on two ranks, four on one
TOLERANCE = 1e-5


def full() -> TransformerDecoder:
    return qwen2(**SIZES)


def lora() -> TransformerDecoder:
    model = lora_qwen2(["q_proj", "v_proj"], **SIZES, lora_rank=3, lora_alpha=6)
    set_trainable_params(model, get_adapter_params(model))
    return model


WAYS: dict[str, tuple[Callable[[], TransformerDecoder], dict[str, Any]]] = {
    "full": (full, {}),
    "kept whole after the forward pass": (full, {"fsdp_reshard_after_forward": False}),
    "checkpointed activations": (full, {"enable_activation_checkpointing": True}),
    "lora": (lora, {}),
}


def sample(number: int) -> dict[str, Any]:
    """Of its own length; number 3 trains next to nothing."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, SIZES["vocab_size"], (6 + 3 * number % 11,), generator=generator).numpy()
    labels = tokens.copy()
    if number == 3:
        labels[2:] = -100
    return {"tokens": tokens, "labels": labels}


def batch(number: int) -> Batch:
    return Collator(0)([[sample(number)]])


def with_weights(model: TransformerDecoder, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) * 0.3 for name, value in model.state_dict().items()}


def loss_sum(model: TransformerDecoder, number: int) -> tuple[torch.Tensor, int]:
    one = sample(number)
    labels = torch.tensor(one["labels"][1:])
    logits = model(torch.tensor(one["tokens"])[None])[0, :-1]
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100), int((labels != -100).sum())


def naive_fisher(model: TransformerDecoder, numbers: list[int]) -> dict[str, torch.Tensor]:
    found = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    for number in numbers:
        total, count = loss_sum(model, number)
        gradients = torch.autograd.grad(total / count, [p for p in model.parameters() if p.requires_grad])
        for name, gradient in zip(found, gradients, strict=True):
            found[name] += gradient.square() / len(numbers)
    return found


def truth(make: Callable[[], TransformerDecoder]) -> dict[str, Any]:
    """Two phases, then a step far from both: all from the formula, in this process, from all logits."""
    model = make()
    fisher: dict[str, torch.Tensor] = {}
    for phase in (1, 2):
        model.load_state_dict(with_weights(model, phase))
        fresh = naive_fisher(model, [10 * phase + i for i in range(3)])
        fisher = {name: DECAY * fisher.get(name, torch.zeros(())) + value for name, value in fresh.items()}
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.load_state_dict(with_weights(model, 3))
    penalty = sum((STRENGTH / 2 * (fisher[n] * (p - anchor[n]) ** 2).sum() for n, p in trained(model)), torch.zeros(()))
    losses = [loss_sum(model, number) for number in range(NUM_STEP_SAMPLES)]
    total = torch.stack([loss for loss, _ in losses]).sum() / sum(count for _, count in losses) + penalty
    total.backward()
    return {
        "fisher": fisher,
        "penalty": penalty.item(),
        "loss": total.item(),
        "gradients": {name: p.grad for name, p in trained(model)},
    }


def trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    named = ((name.replace("_checkpoint_wrapped_module.", ""), p) for name, p in model.named_parameters())
    return [(name, p) for name, p in named if p.requires_grad]


def step(objective: ElasticWeights, model: TransformerDecoder, world: World) -> float:
    """As the Trainer makes one; returns the loss it logs."""
    mine = [batch(number) for number in range(world.dp_rank, NUM_STEP_SAMPLES, world.dp_size)]
    targets = world.sum(torch.tensor(sum(map(objective.num_targets, mine)), dtype=torch.float64)).item()
    logged = torch.zeros((), dtype=torch.float64)
    for one in mine:
        output = objective(model, one, with_statistics=False)
        (output.loss_sum * (world.dp_size / targets)).backward()
        logged += output.loss_sum.detach()
    return world.sum(logged).item() / targets


def put(model: TransformerDecoder, weights: dict[str, torch.Tensor]) -> None:
    """Give a prepared model other weights, as an optimizer would: in its shards."""
    with torch.no_grad():
        for name, p in trained(model):
            if isinstance(p, DTensor):
                p.copy_(distribute_tensor(weights[name], p.device_mesh, p.placements))
            else:  # of a process that is alone
                p.copy_(weights[name])


def errors(make: Callable[[], TransformerDecoder], options: dict[str, Any], world: World) -> dict[str, float]:
    expected = truth(make)
    settings = Settings(output_dir=Path("unused"), device="cpu", dtype="fp32", **options)
    with torch.device("meta"):
        model = make()
    prepare(model, OmegaConf.create({}), settings, world, frozen := with_weights(make(), 3))
    first = ElasticWeights(CrossEntropy(), world, strength=STRENGTH, decay=DECAY)
    reference = make()
    for phase in (1, 2):
        # Frozen weights do not change from one phase to the next in a run, so the truth's do not matter to adapters
        reference.load_state_dict(with_weights(reference, phase))
        put_all(model, with_weights(reference, phase))
        with torch.no_grad():
            first(model, batch(0), with_statistics=False)  # a validation leaves the root's weights whole
        first.consolidate(model, [batch(10 * phase + i) for i in range(3)])
    found: dict[str, float] = {}
    state = first.state_dict()
    assert set(state["fisher"]) == set(expected["fisher"]) == set(state["anchor"])
    for name, value in expected["fisher"].items():
        found[f"fisher: {name}"] = off(state["fisher"][name], value)
    put_all(model, frozen)
    resumed = ElasticWeights(CrossEntropy(), world, strength=STRENGTH, decay=DECAY)
    resumed.load_state_dict(state)
    for name, objective in (("first", first), ("resumed", resumed)):
        found[f"{name}: loss"] = abs(step(objective, model, world) / expected["loss"] - 1)
        found[f"{name}: penalty"] = abs(objective.penalty(model) / expected["penalty"] - 1)
        for key, p in trained(model):
            assert p.grad is not None and isinstance(p.grad, DTensor) == (world.size > 1)
            whole = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            found[f"{name}: {key}"] = off(whole, expected["gradients"][key])
        model.zero_grad(set_to_none=True)
    return {name: value for name, value in found.items() if not name.endswith("k_proj.bias")}  # nothing but rounding


def put_all(model: TransformerDecoder, weights: dict[str, torch.Tensor]) -> None:
    """Every weight, frozen ones too."""
    needs = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(True)
    put(model, weights)
    for p, needed in needs:
        p.requires_grad_(needed)


def off(got: torch.Tensor, true: torch.Tensor) -> float:
    return float((got - true).norm() / true.norm())


def main() -> None:
    with process_group("cpu") as (rank, size):
        world = World(rank, size, torch.device("cpu"), make_mesh("cpu", size, 1))
        results = {name: errors(make, options, world) for name, (make, options) in WAYS.items()}
        if rank == 0:
            Path(sys.argv[1]).write_text(json.dumps(results))


@pytest.fixture(scope="module", params=[1, 2])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    path = tmp_path_factory.mktemp("elastic") / "result.json"
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch = [sys.executable, *(two if request.param == 2 else []), __file__, str(path)]
    done = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("name", WAYS)
def test_fisher_penalty_loss_and_gradient_are_those_of_the_formula(results, name):
    worst = max(results[name], key=lambda key: results[name][key])
    assert results[name][worst] < TOLERANCE, worst


if __name__ == "__main__":
    main()
