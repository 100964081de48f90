"""Plans of the models people have, made from their config.json alone, against sums done by hand."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import training
from torchtune.modules import TransformerDecoder

from tests.published_models import PUBLISHED, Published
from torchtune_agent._tune import config_path
from torchtune_agent.errors import UserError
from torchtune_agent.losses import CrossEntropy
from torchtune_agent.models import hf_model
from torchtune_agent.planning import memory, print_plan
from torchtune_agent.training import Settings, parameter_setup
from torchtune_agent.training.throughput import operations

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("hf/agent_sft", {}),
    "LoRA": ("hf/agent_sft_lora", {}),
    "DoRA": ("hf/agent_sft_lora", {"adapter": {"kind": "dora"}}),
    "QLoRA": ("hf/agent_sft_lora", {"adapter": {"quantize_base": True}}),
}
TINY_ROUTED = Published("qwen3_moe", 97, 64, 80, 4, 4, 2, 0, False, 16, 6, 2, 32)
PLANNED = ("Qwen2.5-0.5B", "Qwen3-0.6B", "Llama-3.2-1B", "Mistral-7B-v0.3")


def config(folder: Path, model: str, kind: str, **more: Any) -> DictConfig:
    name, changes = KINDS[kind]
    given = {"model_dir": str(PUBLISHED[model].save(folder)), "output_dir": str(folder / "out"), **more}
    cfg = OmegaConf.merge(OmegaConf.load(config_path(name)), changes, given)
    assert isinstance(cfg, DictConfig)
    return cfg


def planned(cfg: DictConfig, capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, float]]:
    """What is printed, and GiB by their names in it."""
    print_plan(cfg)
    text = capsys.readouterr().out
    found = re.findall(r"^  ([a-z][a-z ]*?) +(\d+\.\d\d) ", text, re.M)
    return text, {name: float(value) for name, value in found}


# Quantizing takes a while even without numbers: of large models, one is enough.
MADE = [
    (model, kind)
    for model, sizes in PUBLISHED.items()
    for kind in KINDS
    if kind != "QLoRA" or sizes.num_parameters < 5e9 or model == "Qwen3-14B"
]


@pytest.mark.parametrize(("model", "kind"), MADE)
def test_every_published_model_can_be_made_from_our_configs(model: str, kind: str, tmp_path: Path) -> None:
    cfg = config(tmp_path, model, kind)
    made = parameter_setup(cfg).build(cfg, Settings.from_config(cfg, for_this_machine=False))
    sizes = PUBLISHED[model]
    trained = sum(p.numel() for p in made.parameters() if p.requires_grad)
    if kind == "full":
        assert trained == sizes.num_parameters
    else:
        head = sizes.head_dim or sizes.hidden_size // sizes.num_attention_heads
        queries, keys = (n * head for n in (sizes.num_attention_heads, sizes.num_key_value_heads))
        hidden, mlp = sizes.hidden_size, sizes.intermediate_size
        linears = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
        linears += [] if sizes.num_experts else [(hidden, mlp), (hidden, mlp), (mlp, hidden)]
        of_layer = sum(16 * (ins + outs) + (outs if kind == "DoRA" else 0) for ins, outs in linears)
        assert trained == sizes.num_hidden_layers * of_layer


@pytest.mark.parametrize("model", PLANNED)
def test_a_plan_of_each_kind(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = {"num_gpus": 2, "sequence": 256, "gpu": "H100"}
    found = {}
    for kind in KINDS:
        text, found[kind] = planned(config(tmp_path / kind, model, kind, plan=plan), capsys)
        assert "fits" in text and "data          not read" in text
    gib = PUBLISHED[model].num_parameters * 2 / 2**30  # bf16, over two devices: weights, gradients, and AdamW's two
    full = found["full"]
    assert [full["weights"], full["gradients"], full["optimizer"]] == pytest.approx(
        [gib / 2, gib / 2, gib], rel=0.01, abs=0.02
    )
    assert found["LoRA"]["gradients"] < 0.05 * full["gradients"] + 0.011
    assert found["QLoRA"]["weights"] < 0.75 * found["LoRA"]["weights"] < 0.8 * full["weights"]
    assert found["LoRA"]["in all"] < full["in all"] and found["QLoRA"]["in all"] < found["LoRA"]["in all"]


def test_experts_are_counted_as_they_are_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = {"num_gpus": 16, "sequence": 256, "gpu": "H100"}
    text, gib = planned(config(tmp_path / "30B", "Qwen3-30B-A3B", "full", plan=plan), capsys)
    assert "30,532,122,624 parameters, 3,353,032,704 active for a token, 30,532,122,624 trained" in text
    assert gib["weights"] == pytest.approx(30_532_122_624 * 2 / 16 / 2**30, abs=0.01)

    as_large = Published("qwen3", 97, 64, 2 * 32, 4, 4, 2, 0, False, 16)  # as the two experts of a token
    with torch.device("meta"):
        counts = [operations(hf_model(str(sizes.save(tmp_path / "tiny"))), 100.0) for sizes in (TINY_ROUTED, as_large)]
    assert counts[0] - counts[1] == 6 * 4 * 6 * 64  # the routers


@pytest.mark.parametrize(("dtype", "plain_layers"), [("bf16", []), ("fp32", [0, 1, 2])])
def test_layers_with_experts_take_what_was_planned(dtype: str, plain_layers: list[int], tmp_path: Path) -> None:
    """The same step with numbers in its tensors: experts have as many tokens as the router says."""
    settings = Settings(output_dir=tmp_path, device="cpu", dtype=dtype, batch_size=2)
    sizes = replace(TINY_ROUTED, num_hidden_layers=5)
    described = json.loads((sizes.save(tmp_path) / "config.json").read_text()) | {"mlp_only_layers": plain_layers}
    (tmp_path / "config.json").write_text(json.dumps(described))

    def build() -> TransformerDecoder:
        with training.set_default_dtype(settings.torch_dtype), torch.device("meta"):
            return hf_model(str(tmp_path))

    expected = memory.activations(build, CrossEntropy(), settings, 64, 0.5).at_most(0.0)
    model = build().to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "rope_init"):
            module.rope_init()  # pyright: ignore
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch = memory._batch(2, 64, 32)
    batch = replace(batch, tokens=torch.arange(128).view(2, 64) % 97)
    with memory._Living([*model.parameters(), *model.buffers()]) as living:
        CrossEntropy()(model, batch, with_statistics=True).loss_sum.backward()
    assert expected == pytest.approx(living.peak, rel=0.01)


def test_a_plan_says_that_experts_are_not_quantized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config(tmp_path, "Qwen3-0.6B", "QLoRA", plan={"num_gpus": 1, "sequence": 64})
    TINY_ROUTED.save(Path(cfg.model_dir))
    assert "adapter.quantize_base leaves the experts as they are" in planned(cfg, capsys)[0]


SPLIT = {"tensor_parallel_dim": 2, "tensor_parallel_plan": {}, "plan": {"num_gpus": 2}, "optimizer": {"fused": False}}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("full", SPLIT, "tensor_parallel_dim=2: experts are not split"),
        ("LoRA", {"adapter": {"targets": ["q_proj", "up_proj"]}}, "up_proj: the model has no such linear.*Experts and"),
        ("LoRA", {"adapter": {"targets": ["layers.*.mlp.router"]}}, "no such linear.*Experts and their router are no"),
    ],
)
def test_what_experts_cannot_have_is_refused(kind: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    cfg = config(tmp_path, "Qwen3-0.6B", kind, **changes)
    TINY_ROUTED.save(Path(cfg.model_dir))
    with pytest.raises(UserError, match=message):
        print_plan(cfg)


def test_what_does_not_fit_is_told_what_to_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config(tmp_path, "Llama-3.2-3B", "full", plan={"num_gpus": 1, "sequence": 512, "gpu": "A10G"})
    text, _ = planned(cfg, capsys)
    assert "DOES NOT FIT" in text
    remedies = dict(re.findall(r"^ +[\d.]+   (fits|not enough) +(.+)$", text, re.M)[::-1])
    assert {"fits", "not enough"} == set(remedies)
    assert "adapter.kind=lora adapter.rank=16 adapter.quantize_base=True" in text and "AdamW8bit" in text


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"gpu": "H1000"}, "plan.gpu=H1000: not a GPU whose size is known. Did you mean 'H100'"),
        ({"gpus": 8}, "plan.gpus: unknown config key"),
        ({"num_gpus": 0}, "plan.num_gpus=0"),
    ],
)
def test_plans_that_cannot_be_made(plan: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        print_plan(config(tmp_path, "Qwen3-0.6B", "full", plan=plan))


def test_steps_and_time_follow_from_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg: Any = OmegaConf.load(config_path("tiny/agent_sft"))
    cfg.merge_with({"output_dir": str(tmp_path), "dataset": {"num_tasks": 48}, "dtype": "bf16"})
    cfg.plan = {"num_gpus": 2, "gpu": "H100", "mfu": 0.5, "price_per_gpu_hour": 3.0}
    text, _ = planned(cfg, capsys)
    num_tokens = int(re.search(r"48 samples, ([\d,]+) tokens", text)[1].replace(",", ""))  # type: ignore[index]
    assert num_tokens > 5000 and "6 steps an epoch" in text  # 48 samples, 4 on each of 2 devices
    assert re.search(r"assumed: 50% of 989 TFLOP/s \(plan.mfu\), \$3.00 a GPU-hour", text), text
