"""Plans of the models people have, made from their config.json alone, against sums done by hand."""

import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from tests.published_models import PUBLISHED
from torchtune_agent._tune import config_path
from torchtune_agent.errors import UserError
from torchtune_agent.planning import print_plan
from torchtune_agent.training import Settings, parameter_setup

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("hf/agent_sft", {}),
    "LoRA": ("hf/agent_sft_lora", {}),
    "DoRA": ("hf/agent_sft_lora", {"adapter": {"kind": "dora"}}),
    "QLoRA": ("hf/agent_sft_lora", {"adapter": {"quantize_base": True}}),
}
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
        linears += [(hidden, mlp), (hidden, mlp), (mlp, hidden)]
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
