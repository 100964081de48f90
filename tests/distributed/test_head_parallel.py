"""The loss and its gradient on two ranks, prepared in every way a run can be, against one process and all logits.

`torchrun THIS_FILE RESULT.json` is what the test starts: one launch for all ways.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
)
from torch.nn import functional as F
from torchtune.models.llama3 import base_llama_tp_plan
from torchtune.models.qwen2 import lora_qwen2, qwen2
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params, set_trainable_params

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.reference import IGNORE_INDEX, logit_statistics  # noqa: E402
from torchtune_agent.config import trust  # noqa: E402
from torchtune_agent.data import Collator  # noqa: E402
from torchtune_agent.distributed import World, make_mesh, process_group  # noqa: E402
from torchtune_agent.losses import CrossEntropy, LossOutput, token_logprobs  # noqa: E402
from torchtune_agent.metrics.table import COLUMNS  # noqa: E402
from torchtune_agent.training.parallel import prepare  # noqa: E402
from torchtune_agent.training.settings import Settings  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": 67,  # odd: two ranks have shares of different sizes
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 2,
    "embed_dim": 16,
    "intermediate_dim": 24,
    "max_seq_len": 64,
}
TOLERANCE = 1e-5


def untied() -> TransformerDecoder:
    return qwen2(**SIZES)


def tied() -> TransformerDecoder:
    return qwen2(**SIZES, tie_word_embeddings=True)


def frozen() -> TransformerDecoder:
    model = untied()
    model.get_submodule("output").requires_grad_(False)
    return model


def lora() -> TransformerDecoder:
    model = lora_qwen2(["q_proj"], apply_lora_to_output=True, **SIZES, lora_rank=4, lora_alpha=8)
    set_trainable_params(model, get_adapter_params(model))
    return model


def sequence_parallel_plan() -> dict[str, Any]:
    """The residual stream split along the sequence, so that hidden states reach the head as a DTensor."""
    split, whole = Shard(1), Replicate()
    return {
        "tok_embeddings": RowwiseParallel(input_layouts=whole, output_layouts=split),
        "norm": SequenceParallel(),
        "output": ColwiseParallel(input_layouts=split, output_layouts=whole),
        "layers.*.attn": PrepareModuleInput(
            input_layouts=(split, split),
            desired_input_layouts=(whole, whole),  # as query and as key
        ),
        "layers.*.mlp": PrepareModuleInput(input_layouts=(split,), desired_input_layouts=(whole,)),
        "layers.*.sa_norm": SequenceParallel(),
        "layers.*.mlp_norm": SequenceParallel(),
        "layers.*.attn.q_proj": ColwiseParallel(),
        "layers.*.attn.k_proj": ColwiseParallel(),
        "layers.*.attn.v_proj": ColwiseParallel(),
        "layers.*.attn.output_proj": RowwiseParallel(output_layouts=split),
        "layers.*.mlp.w1": ColwiseParallel(),
        "layers.*.mlp.w2": RowwiseParallel(output_layouts=split),
        "layers.*.mlp.w3": ColwiseParallel(),
    }


PLAN = {"_component_": "torchtune.models.llama3.base_llama_tp_plan"}
WAYS: dict[str, tuple[Callable[[], TransformerDecoder], dict[str, Any]]] = {
    "root group": (untied, {}),
    "root group, not resharded": (untied, {"fsdp_reshard_after_forward": False}),
    "own group": (untied, {"custom_sharded_layers": ["output"]}),
    "own groups, not resharded": (
        untied,
        {"custom_sharded_layers": ["tok_embeddings", "output"], "fsdp_reshard_after_forward": False},
    ),
    "tied": (tied, {}),
    "tied, own group": (tied, {"custom_sharded_layers": ["tok_embeddings"]}),
    "frozen, own group": (frozen, {"custom_sharded_layers": ["output"]}),
    "lora": (lora, {}),
    "lora, own group": (lora, {"custom_sharded_layers": ["output"]}),
    "checkpointed activations": (untied, {"enable_activation_checkpointing": True}),
    "tensor parallel": (untied, {"tensor_parallel_dim": 2}),
    "tensor parallel, tied": (tied, {"tensor_parallel_dim": 2}),
    "tensor and sequence parallel": (untied, {"tensor_parallel_dim": 2, "plan": sequence_parallel_plan}),
}


def samples(rank: int) -> list[dict[str, Any]]:
    """The second rank's second micro-batch trains nothing at all."""
    generator = torch.Generator().manual_seed(rank)
    found = []
    for number in range(2):
        tokens = torch.randint(0, SIZES["vocab_size"], (12,), generator=generator).numpy()
        weights = torch.rand(12, generator=generator).numpy()
        labels = tokens * 0 + IGNORE_INDEX if (rank, number) == (1, 1) else tokens
        found.append({"tokens": tokens, "labels": labels, "weights": weights})
    return found


def with_weights(make: Callable[[], TransformerDecoder]) -> TransformerDecoder:
    model = make()
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.5, generator=generator)
    return model


@dataclass
class Truth:
    loss: float
    gradients: dict[str, torch.Tensor]
    table: torch.Tensor  # [metrics.table.COLUMNS], of all tokens


def truth(make: Callable[[], TransformerDecoder], ranks: list[int]) -> Truth:
    """Of all samples of `ranks`, from all logits, in this process."""
    model = with_weights(make)
    total, table = torch.zeros(()), torch.zeros(len(COLUMNS), dtype=torch.float64)
    for one in (one for rank in ranks for one in samples(rank)):
        logits, labels = model(torch.tensor(one["tokens"])[None])[0, :-1], torch.tensor(one["labels"][1:])
        losses = F.cross_entropy(logits, labels, reduction="none")
        total = total + (losses * torch.tensor(one["weights"][1:])).sum()
        supervised = labels != IGNORE_INDEX
        measured = logit_statistics(logits[supervised].detach().double(), labels[supervised])
        table += torch.tensor([supervised.sum(), *(column.sum() for column in measured.values())])
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Truth(total.item(), gradients, table)


def as_loss(model: TransformerDecoder, batch: Any) -> LossOutput:
    """The same loss by way of the log-probabilities."""
    weights = batch.weights.flatten()[batch.supervised]
    return LossOutput(-(token_logprobs(model, batch) * weights).sum())


def errors(make: Callable[[], TransformerDecoder], options: dict[str, Any], size: int) -> dict[str, float]:
    """By how much loss and gradients, by either way to them, are off the truth."""
    settings = Settings(output_dir=Path("unused"), device="cpu", dtype="fp32", **without_plan(options))
    tp = settings.tensor_parallel_dim
    rank = torch.distributed.get_rank()
    world = World(rank, size, torch.device("cpu"), make_mesh("cpu", size // tp, tp))
    weights = with_weights(make).state_dict()
    expected = truth(make, list(range(world.dp_size)))
    found = {}
    ways = {"loss": lambda m, b: CrossEntropy(chunk_size=4)(m, b, with_statistics=True), "logprobs": as_loss}
    for way, objective in ways.items():
        with torch.device("meta"):
            model = make()
        plan = options.get("plan", base_llama_tp_plan)
        cfg = OmegaConf.create({"tensor_parallel_plan": {"_component_": f"{plan.__module__}.{plan.__name__}"}})
        prepare(model, cfg, settings, world, weights)
        loss_sum, table = torch.zeros(()), torch.zeros(len(COLUMNS), dtype=torch.float64)
        for one in samples(world.dp_rank):
            output = objective(model, Collator(0)([[one]]))
            (output.loss_sum * world.dp_size).backward()
            loss_sum += output.loss_sum.detach()
            if output.tokens is not None:
                table += output.tokens.double().sum(0)
        found[f"{way}: loss"] = abs(world.sum(loss_sum).item() / expected.loss - 1)
        if way == "loss":
            found["statistics"] = float(((world.sum(table) - expected.table) / expected.table.clamp(min=1)).abs().max())
        named = [(n.replace("_checkpoint_wrapped_module.", ""), p) for n, p in model.named_parameters()]
        got = {name: p.grad for name, p in named if p.grad is not None}
        assert set(got) == set(expected.gradients), set(got) ^ set(expected.gradients)
        for name, gradient in got.items():
            assert isinstance(gradient, DTensor)
            true = expected.gradients[name]
            found[f"{way}: {name}"] = float((gradient.full_tensor() - true).norm() / true.norm())
    return {name: value for name, value in found.items() if not name.endswith("k_proj.bias")}  # nothing but rounding


def without_plan(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "plan"}


def main() -> None:
    with process_group("cpu") as (rank, size):
        results = {name: errors(make, options, size) for name, (make, options) in WAYS.items()}
        if rank == 0:
            Path(sys.argv[1]).write_text(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, float]]:
    path = tmp_path_factory.mktemp("head") / "result.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    done = subprocess.run([*launch, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("name", WAYS)
def test_loss_and_gradients_are_those_of_one_process(results, name):
    worst = max(results[name], key=lambda key: results[name][key])
    assert results[name][worst] < TOLERANCE, worst


if __name__ == "__main__":
    trust(["__main__"])  # where the plan of sequence parallelism is
    main()
