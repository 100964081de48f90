"""Our adapters against peft's, on the same base models, the same adapter, the same data."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from omegaconf import OmegaConf
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune.models.llama3 import llama3, lora_llama3
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import LoRALinear

from tests.hf_models import CASES, SIZES, assert_same_logits, fill, load_ours, save_random, train
from torchtune_agent.errors import UserError
from torchtune_agent.models import Architecture, Conversion, HFWeights, hf_model
from torchtune_agent.models.adapter import AdapterSettings
from torchtune_agent.models.adapter_weights import AdaptedWeights, merge_adapters
from torchtune_agent.models.peft_format import load_peft, save_peft
from torchtune_agent.training.adapters import (
    AdapterParameters,
    adapter_parameters,
    add_adapters,
    lora_plus_groups,
    train_whole,
)
from torchtune_agent.training.settings import Settings

KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_model(base: Any, folder: Path, **options: Any) -> Any:
    """`base` with an adapter none of whose values is its first one, saved in `folder`."""
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **{"target_modules": ALL, **options})
    torch.manual_seed(1)
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(str(folder))
    return model.eval()


def base_weights(folder: Path) -> HFWeights:
    return HFWeights(folder, Conversion(Architecture.from_folder(folder)))


def empty(folder: Path) -> TransformerDecoder:
    with torch.device("meta"):
        return hf_model(str(folder))


def ours_with(folder: Path, settings: AdapterSettings, adapter: dict[str, torch.Tensor] | None) -> TransformerDecoder:
    model = empty(folder)
    add_adapters(model, settings)
    weights = base_weights(folder)
    return fill(model, AdaptedWeights(weights, model) if adapter is None else {**weights, **adapter})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["llama tied, linear, biases", "qwen2", "qwen3", "qwen3_moe tied, some layers plain"])
def test_same_as_peft_loaded_trained_merged_exported(case: str, kind: str, tmp_path: Path) -> None:
    base, adapter, saved = tmp_path / "base", tmp_path / "adapter", tmp_path / "saved"
    theirs = peft_model(save_random(base, *CASES[case]), adapter, **KINDS[kind])
    architecture = Architecture.from_folder(base)
    weights, settings = load_peft(adapter, architecture)
    ours = ours_with(base, settings, weights)
    assert_same_logits(ours, theirs)

    train(adapter_parameters(ours).values(), ours)
    train([p for p in theirs.parameters() if p.requires_grad], lambda tokens: theirs(tokens).logits)
    assert_same_logits(ours, theirs)

    save_peft(ours.state_dict(), saved, settings, architecture, str(base))
    original = load_file(adapter / "adapter_model.safetensors")
    exported = load_file(saved / "adapter_model.safetensors")
    assert {n: t.shape for n, t in exported.items()} == {n: t.shape for n, t in original.items()}
    again = peft.PeftModel.from_pretrained(save_random(tmp_path / "again", *CASES[case]), saved)
    assert_same_logits(ours, again)

    merged = fill(empty(base), merge_adapters(ours.state_dict(), settings))
    assert_same_logits(merged, theirs)
    assert_same_logits(merged, theirs.merge_and_unload())


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("on_meta", [True, False])
def test_a_new_adapter_changes_nothing_yet(kind: Any, on_meta: bool, tmp_path: Path) -> None:
    theirs = save_random(tmp_path, *CASES["qwen2"])
    settings = AdapterSettings(kind=kind, rank=4)
    if on_meta:
        ours = ours_with(tmp_path, settings, None)
    else:
        ours = load_ours(tmp_path, tmp_path)
        add_adapters(ours, settings)
    assert_same_logits(ours, theirs)
    a_matrices = [p.detach() for name, p in adapter_parameters(ours).items() if "lora_a" in name]
    assert len(a_matrices) == 7 * SIZES["num_hidden_layers"]
    for a in a_matrices:  # uniform between -bound and bound
        bound = a.shape[1] ** -0.5
        assert a.abs().max() <= bound and a.std() == pytest.approx(bound / 3**0.5, rel=0.25)
    assert len({a.sum().item() for a in a_matrices}) == len(a_matrices)
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert trained == adapter_parameters(ours).keys()


def test_dropout_of_dora_is_pefts(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    options = {"use_dora": True, "lora_dropout": 0.5, "target_modules": ["k_proj"]}
    theirs = peft_model(save_random(base, *CASES["qwen2"]), adapter, **options).train()
    weights, settings = load_peft(adapter, Architecture.from_folder(base))
    assert settings.dropout == 0.5
    ours = ours_with(base, settings, weights).train()
    tokens = torch.arange(40).view(2, 20)
    torch.manual_seed(3)
    expected = theirs(tokens).logits
    torch.manual_seed(3)
    torch.testing.assert_close(ours(tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_lora_plus_groups_are_pefts(kind: Any, tmp_path: Path) -> None:
    theirs = peft_model(save_random(tmp_path, *CASES["qwen3"]), tmp_path / "adapter", use_dora=kind == "dora")
    options: dict[str, Any] = {"lr": 1e-3, "loraplus_lr_ratio": 8.0, "loraplus_weight_decay": 0.1}
    expected = create_loraplus_optimizer(theirs, torch.optim.AdamW, **options)
    weights, settings = load_peft(tmp_path / "adapter", Architecture.from_folder(tmp_path))
    ours = ours_with(tmp_path, settings, weights)
    optimizer = torch.optim.AdamW(lora_plus_groups(ours, 1e-3, 8.0), lr=1e-3, weight_decay=0.1)

    def by_rate(optimizer: torch.optim.Optimizer) -> dict[Any, list[float]]:
        groups = [group for group in optimizer.param_groups if group["params"]]
        assert len(groups) == 2
        # the sum of its absolute values tells a parameter, whatever the order of its rows
        return {(g["lr"], g["weight_decay"]): sorted(p.abs().sum().item() for p in g["params"]) for g in groups}

    got, wanted = by_rate(optimizer), by_rate(expected)
    assert got.keys() == wanted.keys()
    for key in got:
        assert got[key] == pytest.approx(wanted[key])


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_quantized_base_stays_as_it_is(kind: Any, tmp_path: Path) -> None:
    make, options = CASES["qwen2"]
    save_random(tmp_path, make, {**options, "hidden_size": 64, "intermediate_size": 128})
    settings = AdapterSettings(kind=kind, rank=4, quantize_base=True)
    model = ours_with(tmp_path, settings, None)
    weights = base_weights(tmp_path)
    quantized = {name: p for name, p in model.named_parameters() if isinstance(p, NF4Tensor)}
    assert len(quantized) == 7 * SIZES["num_hidden_layers"]
    before = {name: p.to(torch.float32).clone() for name, p in quantized.items()}
    for name, value in before.items():
        error = (value - weights[name]).abs().mean() / weights[name].abs().mean()
        assert 0 < error < 0.15
    tokens = torch.arange(60).view(2, 30)
    plain = fill(empty(tmp_path), {**weights, **before})
    torch.testing.assert_close(model(tokens), plain(tokens), atol=1e-5, rtol=1e-5)

    train(adapter_parameters(model).values(), model)
    assert not torch.allclose(model(tokens), plain(tokens), atol=1e-3)
    assert all(torch.equal(p.to(torch.float32), before[name]) for name, p in quantized.items())
    merged = fill(empty(tmp_path), merge_adapters(model.state_dict(), settings))
    torch.testing.assert_close(merged(tokens), model(tokens), atol=1e-5, rtol=1e-5)


def test_targets(tmp_path: Path) -> None:
    save_random(tmp_path, *CASES["qwen2"])

    def adapted(*targets: str) -> set[str]:
        model = empty(tmp_path)
        names = set(add_adapters(model, AdapterSettings(targets=targets)))
        assert names == {name for name, m in model.named_modules() if isinstance(m, LoRALinear)}
        return names

    layers = range(SIZES["num_hidden_layers"])
    assert adapted("all-linear") == {
        f"layers.{i}.{n}" for i in layers for n in [f"attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "output_proj")]
    } | {f"layers.{i}.mlp.w{n}" for i in layers for n in (1, 2, 3)}
    assert adapted("w1", "v_proj") == {f"layers.{i}.{n}" for i in layers for n in ("mlp.w1", "attn.v_proj")}
    assert adapted("gate_proj", "o_proj") == adapted("w1", "output_proj")
    assert adapted("layers.[12].attn.q*") == {"layers.1.attn.q_proj", "layers.2.attn.q_proj"}
    assert adapted("lm_head") == {"output"}
    with pytest.raises(UserError, match="nonsense: the model has no such linear.*k_proj"):
        adapted("q_proj", "nonsense")


def test_adapters_on_some_layers_go_to_peft_and_back(tmp_path: Path) -> None:
    theirs = save_random(tmp_path, *CASES["llama"])
    architecture = Architecture.from_folder(tmp_path)
    settings = AdapterSettings(rank=4, targets=("layers.2.attn.q_proj", "layers.0.mlp.w2"))
    ours = ours_with(tmp_path, settings, None)
    train(adapter_parameters(ours).values(), ours)
    save_peft(ours.state_dict(), tmp_path / "saved", settings, architecture)
    assert_same_logits(ours, peft.PeftModel.from_pretrained(theirs, tmp_path / "saved"))
    weights, loaded = load_peft(tmp_path / "saved", architecture)
    assert set(loaded.targets) == set(settings.targets)
    assert all(torch.equal(weights[name], p) for name, p in adapter_parameters(ours).items())


@pytest.mark.parametrize(
    ("case", "whole"),
    [("llama tied, linear, biases", ["embed_tokens"]), ("qwen3", ["embed_tokens", "lm_head", "model.norm"])],
)
def test_modules_trained_whole_go_to_peft_and_back(case: str, whole: list[str], tmp_path: Path) -> None:
    base, adapter, saved = tmp_path / "base", tmp_path / "adapter", tmp_path / "saved"
    tied = "tied" in case
    options: dict[str, Any] = {"modules_to_save": whole, "ensure_weight_tying": tied}
    theirs = peft_model(save_random(base, *CASES[case]), adapter, **options)
    architecture = Architecture.from_folder(base)
    weights, settings = load_peft(adapter, architecture)
    ours = ours_with(base, settings, weights)
    train_whole(ours, settings.modules_to_save)
    assert_same_logits(ours, theirs)

    trained = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(adapter_parameters(ours)) + len(whole)
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    train(trained.values(), ours)
    train([p for p in theirs.parameters() if p.requires_grad], lambda tokens: theirs(tokens).logits)
    assert_same_logits(ours, theirs)
    assert not any(torch.equal(before[name], parameter) for name, parameter in trained.items())

    save_peft(ours.state_dict(), saved, settings, architecture, str(base))
    again = peft.PeftModel.from_pretrained(save_random(tmp_path / "again", *CASES[case]), saved)
    assert_same_logits(ours, again)
    merged = fill(empty(base), merge_adapters(ours.state_dict(), settings))
    assert_same_logits(merged, theirs)


def test_modules_that_cannot_be_trained_whole_are_named(tmp_path: Path) -> None:
    save_random(tmp_path, *CASES["qwen2 tied, yarn"])
    model = empty(tmp_path)
    add_adapters(model, AdapterSettings())
    with pytest.raises(UserError, match="lm_head: the model has no such module.*name embed_tokens"):
        train_whole(model, ["lm_head"])
    with pytest.raises(UserError, match="layers.0.attn.q_proj has an adapter"):
        train_whole(model, ["q_proj"])
    save_random(tmp_path / "experts", *CASES["qwen3_moe"])
    with pytest.raises(UserError, match="Experts stay frozen"):
        train_whole(empty(tmp_path / "experts"), ["experts"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("bias", "all", "bias='all' is not supported"), ("rank_pattern", {"q_proj": 2}, "rank_pattern")],
)
def test_what_peft_can_and_we_cannot_is_refused(key: str, value: Any, message: str, tmp_path: Path) -> None:
    base = save_random(tmp_path, *CASES["qwen2"])
    peft_model(base, tmp_path / "adapter", **{key: value})
    with pytest.raises(UserError, match=message):
        load_peft(tmp_path / "adapter", Architecture.from_folder(tmp_path))


def test_blocks_that_do_not_fit_are_named() -> None:
    with torch.device("meta"):
        model = llama3(vocab_size=90, num_layers=1, num_heads=1, num_kv_heads=1, embed_dim=20, max_seq_len=8)
    with pytest.raises(UserError, match=r"layers.0.attn.q_proj \[20, 20\]"):
        add_adapters(model, AdapterSettings(quantize_base=True))
    with torch.device("meta"):
        model = llama3(vocab_size=90, num_layers=1, num_heads=14, num_kv_heads=2, embed_dim=896, max_seq_len=8)
    with pytest.raises(UserError, match=r"layers.0.attn.k_proj \[128, 896\].* divided over 3 ranks"):
        add_adapters(model, AdapterSettings(quantize_base=True), num_shards=3)
    assert len(add_adapters(model, AdapterSettings(quantize_base=True), num_shards=16)) == 7


def config(**keys: Any) -> Any:
    model: dict[str, Any] = {"vocab_size": 90, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2}
    model |= {
        "embed_dim": 16,
        "max_seq_len": 8,
        "_component_": "torchtune.models.llama3.llama3",
        **keys.pop("model", {}),
    }
    given = {"model": model, "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3}, **keys}
    return OmegaConf.create({"output_dir": "out", "device": "cpu", "dtype": "fp32", **given})


def settings_of(**keys: Any) -> Settings:
    return Settings(output_dir=Path("out"), device="cpu", dtype="fp32", **keys)


def test_adapters_are_a_recipes_parameters() -> None:
    parameters = AdapterParameters(
        AdapterSettings.from_config({"rank": 2, "targets": "q_proj", "lora_plus_lr_ratio": 4})
    )
    model = parameters.build(config(), settings_of())
    assert all(p.is_meta for p in model.parameters())
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"layers.{i}.attn.q_proj.lora_{m}.weight" for i in (0, 1) for m in "ab"}
    slow, fast = parameters.groups(model)
    assert isinstance(slow, dict) and isinstance(fast, dict)
    assert (slow["lr"], fast["lr"]) == (1e-3, 4e-3) and len(slow["params"]) == len(fast["params"]) == 2
    with pytest.raises(UserError, match="optimizer_in_bwd"):
        parameters.build(config(), settings_of(optimizer_in_bwd=True))
    with pytest.raises(UserError, match="adapter.ranks: unknown key. Did you mean 'rank'"):
        AdapterSettings.from_config({"ranks": 2})


def test_a_model_of_torchtunes_lora_builder_keeps_its_adapters() -> None:
    lora = {"_component_": "torchtune.models.llama3.lora_llama3", "lora_attn_modules": ["v_proj"], "lora_rank": 2}
    model = AdapterParameters(AdapterSettings(rank=2, alpha=4)).build(
        config(model={**lora, "lora_alpha": 4}), settings_of()
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"layers.{i}.attn.v_proj.lora_{m}.weight" for i in (0, 1) for m in "ab"}
    sizes: Any = {**dict.fromkeys(("num_layers", "num_heads", "num_kv_heads"), 2), "embed_dim": 16}
    sizes["vocab_size"] = SIZES["vocab_size"]
    torch.manual_seed(0)
    real = lora_llama3(["v_proj"], **sizes, max_seq_len=24, lora_rank=2, lora_alpha=4)
    train(adapter_parameters(real).values(), lambda tokens: real(tokens))
    plain = llama3(**sizes, max_seq_len=24)
    plain.load_state_dict(merge_adapters(real.state_dict(), AdapterSettings(rank=2, alpha=4)))
    tokens = torch.arange(8).view(1, 8)
    torch.testing.assert_close(plain(tokens), real(tokens), atol=1e-6, rtol=1e-5)
