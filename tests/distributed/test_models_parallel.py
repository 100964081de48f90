"""Models from Hugging Face folders on two ranks, split in every way, against one process: weights, loss, gradients, and
adapters after a few steps over a base that may be quantized.

`torchrun THIS_FILE FOLDER` is what the test starts: one launch for all ways.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.distributed.tensor import DTensor
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune import training
from torchtune.modules import TransformerDecoder

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from torchtune_agent.data import Collator  # noqa: E402
from torchtune_agent.distributed import World, make_mesh, process_group  # noqa: E402
from torchtune_agent.losses import CrossEntropy  # noqa: E402
from torchtune_agent.models import Architecture, Conversion, HFWeights, hf_model, load_weights  # noqa: E402
from torchtune_agent.models.adapter import AdapterSettings  # noqa: E402
from torchtune_agent.models.adapter_weights import AdaptedWeights  # noqa: E402
from torchtune_agent.training.adapters import add_adapters, lora_plus_groups  # noqa: E402
from torchtune_agent.training.parallel import prepare  # noqa: E402
from torchtune_agent.training.settings import Settings  # noqa: E402

TOLERANCE = 1e-5
MODELS: dict[str, dict[str, Any]] = {  # folder: its difference from tests.hf_models.CASES[key]
    "llama": {"case": "llama"},
    "llama tied": {"case": "llama tied, linear, biases"},
    "qwen2 tied": {"case": "qwen2 tied, yarn"},
    "qwen3": {"case": "qwen3"},
    "qwen3 tied": {"case": "qwen3 tied"},
    "experts": {"case": "qwen3_moe", "num_experts": 25},  # of which a rank's few tokens leave some alone
    "experts tied": {"case": "qwen3_moe tied, some layers plain"},
    "blocks": {"case": "qwen2", "hidden_size": 64, "intermediate_size": 128},  # where NF4 fits
}
TENSOR = {"tensor_parallel_dim": 2}
# name: (model, settings, adapter); "streamed": loaded by our own function instead of torchtune's
WAYS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "sharded": ("llama", {}, None),
    "sharded, streamed": ("llama tied", {}, None),
    "tensor parallel": ("llama", TENSOR, None),
    "tensor parallel, tied, biases": ("llama tied", TENSOR, None),
    "tensor parallel, biases of queries, streamed": ("qwen2 tied", TENSOR, None),
    "tensor parallel, normed queries": ("qwen3", TENSOR, None),
    "tensor parallel, normed queries, tied, streamed": ("qwen3 tied", TENSOR, None),
    "experts": ("experts", {}, None),
    "experts, streamed, checkpointed": ("experts", {"enable_activation_checkpointing": True}, None),
    "experts, tied, streamed": ("experts tied", {}, None),
    "lora": ("llama", {}, {}),
    "lora beside experts, streamed": ("experts", {}, {}),
    "dora, streamed, checkpointed": ("qwen3", {"enable_activation_checkpointing": True}, {"kind": "dora"}),
    "qlora": ("blocks", {}, {"quantize_base": True}),
    "qlora, streamed": ("blocks", {}, {"quantize_base": True, "lora_plus_lr_ratio": 4.0}),
    "qdora, streamed": ("blocks", {}, {"quantize_base": True, "kind": "dora"}),
}


@contextmanager
def loader(streamed: bool) -> Iterator[None]:
    before = training.load_from_full_model_state_dict
    if streamed:
        training.load_from_full_model_state_dict = lambda model, weights, device, **_: load_weights(  # pyright: ignore
            model, weights, device
        )
    yield
    training.load_from_full_model_state_dict = before


def make(folder: Path, adapter: AdapterSettings | None) -> tuple[TransformerDecoder, Any]:
    """A model on the meta device and its weights."""
    weights = HFWeights(folder, Conversion(Architecture.from_folder(folder)))
    with torch.device("meta"):
        model = hf_model(str(folder))
    if adapter is None:
        return model, weights
    add_adapters(model, adapter)
    return model, AdaptedWeights(weights, model)


def batch(rank: int) -> Any:
    tokens = torch.randint(0, 97, (20,), generator=torch.Generator().manual_seed(rank)).numpy()
    return Collator(0)([[{"tokens": tokens, "labels": tokens}]])


def train(model: TransformerDecoder, adapter: AdapterSettings | None, ranks: list[int], world: World | None) -> None:
    """Three steps for adapters; one backward pass for a whole model."""
    groups: Any = [p for p in model.parameters() if p.requires_grad]
    if adapter is not None and adapter.lora_plus_lr_ratio is not None:
        groups = lora_plus_groups(model, 0.1, adapter.lora_plus_lr_ratio)
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for _ in range(1 if adapter is None else 3):
        optimizer.zero_grad()
        for rank in ranks:
            loss = CrossEntropy(chunk_size=4)(model, batch(rank), with_statistics=False).loss_sum / 20
            (loss * (1 if world is None else world.dp_size)).backward()
        if adapter is not None:
            optimizer.step()


def values(model: TransformerDecoder, gradients: bool) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.grad if gradients else parameter.detach()
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        if tensor is not None and not isinstance(local, NF4Tensor):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            found[name.replace("_checkpoint_wrapped_module.", "")] = whole.clone()
    return found


def errors(name: str, folder: Path, size: int) -> dict[str, float]:
    model_name, options, adapter_options = WAYS[name]
    adapter = None if adapter_options is None else AdapterSettings(rank=4, **adapter_options)
    settings = Settings(output_dir=folder, device="cpu", dtype="fp32", **options)
    tp = settings.tensor_parallel_dim
    world = World(torch.distributed.get_rank(), size, torch.device("cpu"), make_mesh("cpu", size // tp, tp))
    directory = folder / model_name
    plan = {"_component_": "torchtune_agent.models.tp_plan", "model_dir": str(directory)}

    alone, weights = make(directory, adapter)
    for module in alone.modules():
        if hasattr(module, "rope_init"):
            module.rope_init()  # pyright: ignore
    load_weights(alone, weights, torch.device("cpu"))
    split, weights = make(directory, adapter)
    with loader("streamed" in name):
        prepare(split, OmegaConf.create({"tensor_parallel_plan": plan}), settings, world, weights)
    expected, got = values(alone, False), values(split, False)
    assert got.keys() == expected.keys()
    for key, value in got.items():
        assert torch.equal(value, expected[key]), key

    train(alone, adapter, list(range(world.dp_size)), None)
    train(split, adapter, [world.dp_rank], world)
    expected, got = values(alone, adapter is None), values(split, adapter is None)
    assert got.keys() == expected.keys()
    if adapter is not None:
        assert any(value.abs().max() > 1e-3 for key, value in got.items() if "lora_b" in key)  # it did learn
    return {
        key: float((value - expected[key]).norm() / expected[key].norm().clamp(min=1e-3))
        for key, value in got.items()
        if not key.endswith("k_proj.bias")  # a gradient of nothing but rounding
    }


def main() -> None:
    folder = Path(sys.argv[1])
    with process_group("cpu") as (rank, size):
        results = {name: errors(name, folder, size) for name in WAYS}
        if rank == 0:
            (folder / "result.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    from tests.hf_models import CASES, save_random

    folder = tmp_path_factory.mktemp("models")
    for name, changes in MODELS.items():
        made, options = CASES[changes["case"]]
        changes = {key: value for key, value in changes.items() if key != "case"}
        save_random(folder / name, made, {**options, **changes}, max_shard_size="60KB")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    done = subprocess.run([*launch, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("name", WAYS)
def test_two_ranks_are_one(results: dict[str, dict[str, float]], name: str) -> None:
    worst = max(results[name], key=lambda key: results[name][key])
    assert results[name][worst] < TOLERANCE, worst


if __name__ == "__main__":
    main()
