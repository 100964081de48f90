"""Tiny random models of every family, made by `transformers`, against ours: loaded, trained, saved, loaded again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torchtune import training
from torchtune.models.llama3 import llama3

from tests.hf_models import CASES, SIZES, assert_same_logits, load_ours, save_random, train
from tests.published_models import PUBLISHED
from torchtune_agent.errors import UserError
from torchtune_agent.models import FAMILIES, Architecture, HFCheckpointer, hf_model
from torchtune_agent.models.experts import idle_weights
from torchtune_agent.toolworld import TOKENIZER_DIR


def test_every_family_has_a_case() -> None:
    assert {make.model_type for make, _ in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize("case", CASES)
def test_same_logits_loaded_trained_and_saved(case: str, tmp_path: Path) -> None:
    theirs = save_random(tmp_path / "base", *CASES[case], max_shard_size="60KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    ours = load_ours(tmp_path / "base", tmp_path / "out")
    assert_same_logits(ours, theirs)

    train(ours.parameters(), ours)
    train(theirs.parameters(), lambda tokens: theirs(tokens).logits)
    assert_same_logits(ours, theirs)

    saver = HFCheckpointer(str(tmp_path / "base"), str(tmp_path / "out"), max_shard_gb=50e-6)
    saver.save_checkpoint({training.MODEL_KEY: ours.state_dict()}, epoch=0)
    saved = tmp_path / "out" / "epoch_0"
    assert len(list(saved.glob("*.safetensors"))) > 1
    assert_same_logits(load_ours(saved, tmp_path), theirs)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    again, report = loaded
    assert not any(report.values()), report
    assert_same_logits(ours, again)


EXPERTS = {"model_type": "qwen3_moe", **CASES["qwen3_moe"][1]}


def description(**changes: Any) -> dict[str, Any]:
    """A config.json as folders of `transformers` 4 have it."""
    plain = {"model_type": "llama", "rope_theta": 500.0, **SIZES}
    return {key: value for key, value in {**plain, **changes}.items() if value is not None}


def test_older_and_newer_spellings_of_rope_mean_the_same() -> None:
    numbers = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    newer = description(rope_theta=None, rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, **numbers})
    expected = Architecture.from_config(newer)
    assert expected.rope_base == 500.0 and expected.rope_scaling["rope_type"] == "llama3"
    for spelling in ("type", "rope_type"):
        assert Architecture.from_config(description(rope_scaling={spelling: "llama3", **numbers})) == expected
    assert Architecture.from_config(description(rope_scaling=None)).rope_scaling == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3"}, "'gemma3' is not one hf_model can build; it builds llama, mistral, qwen2, qwen3"),
        ({"model_type": "qwen2_moe"}, "'qwen2_moe' is not one"),
        ({**EXPERTS, "num_experts": None}, "num_experts is None"),
        ({**EXPERTS, "num_experts_per_tok": 7}, "num_experts_per_tok=7: there are only 6 experts"),
        ({**EXPERTS, "mlp_only_layers": [4]}, r"mlp_only_layers is \[4\], not a list of layers from 0 to 3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantized \(awq\)"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' needs factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_hidden_layers": "12"}, "num_hidden_layers is '12'"),
        ({"num_key_value_heads": 3}, "no multiple of 3"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(description(**changes)))
    with pytest.raises(UserError, match=message) as refused:
        hf_model(str(tmp_path))
    assert str(tmp_path / "config.json") in str(refused.value)


def test_a_sliding_window_is_the_longest_sequence(tmp_path: Path) -> None:
    silent = description(model_type="mistral", max_position_embeddings=32768)
    assert "sliding_window" not in silent
    for window, longest in (({}, 4096), ({"sliding_window": None}, 32768)):  # as transformers reads them
        assert Architecture.from_config({**silent, **window}).max_seq_len == longest
    (tmp_path / "config.json").write_text(json.dumps(description(model_type="mistral", sliding_window=40)))
    with torch.device("meta"):
        assert hf_model(str(tmp_path)).max_seq_len == 40
        assert hf_model(str(tmp_path), max_seq_len=20).max_seq_len == 20
        with pytest.raises(UserError, match="model.max_seq_len=64.*allows 40"):
            hf_model(str(tmp_path), max_seq_len=64)


@pytest.mark.parametrize("spoil", ["missing", "cut", "no folder", "index"])
def test_a_spoilt_folder_is_a_users_mistake(spoil: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    save_random(folder, *CASES["qwen2"], max_shard_size="60KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    if spoil == "missing":
        shard.unlink()
    elif spoil == "cut":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif spoil == "index":
        (folder / "model.safetensors.index.json").write_text("{}")
    else:
        folder = tmp_path / "elsewhere"
    named = {"no folder": "config.json", "index": "index.json"}.get(spoil, shard.name)
    with pytest.raises(UserError, match=named):
        load_ours(folder, tmp_path)


def test_weights_are_read_when_asked_for_and_only_the_rows(tmp_path: Path) -> None:
    """Files are changed on disk between two questions, which shows when each is answered."""
    save_random(tmp_path, *CASES["qwen2"])
    weights = HFCheckpointer(str(tmp_path), str(tmp_path)).load_checkpoint()[training.MODEL_KEY]
    name = "layers.0.mlp.w1.weight"
    whole = weights[name]
    assert weights.shape(name) == (SIZES["intermediate_size"], SIZES["hidden_size"])
    assert torch.equal(weights.rows(name, 7, 31), whole[7:31])
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    replaced = torch.full_like(whole, 2.0)
    with open(path, "r+b") as file:  # in place, so that what is mapped changes
        content = path.read_bytes()
        at = content.index(stored["model.layers.0.mlp.gate_proj.weight"].numpy().tobytes())
        file.seek(at)
        file.write(replaced.numpy().tobytes())
    assert torch.equal(weights[name], replaced) and torch.equal(weights.rows(name, 7, 31), replaced[7:31])


def test_a_model_of_torchtunes_own_has_the_same_names_and_layout(tmp_path: Path) -> None:
    theirs = save_random(tmp_path, transformers.LlamaConfig, {})
    torchtunes = llama3(
        vocab_size=SIZES["vocab_size"],
        num_layers=SIZES["num_hidden_layers"],
        num_heads=SIZES["num_attention_heads"],
        num_kv_heads=SIZES["num_key_value_heads"],
        embed_dim=SIZES["hidden_size"],
        intermediate_dim=SIZES["intermediate_size"],
        max_seq_len=SIZES["max_position_embeddings"],
        rope_base=10_000,
        norm_eps=1e-6,
    )
    torchtunes.load_state_dict(load_ours(tmp_path, tmp_path).state_dict())
    assert_same_logits(torchtunes, theirs)


def test_a_saved_folder_has_all_that_belongs_to_a_model(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_random(base, *CASES["qwen3 tied"])
    shutil.copytree(TOKENIZER_DIR, base, dirs_exist_ok=True)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}")
    (base / "training_args.bin").write_bytes(b"")
    ours = load_ours(base, tmp_path).to(torch.bfloat16)
    HFCheckpointer(str(base), str(tmp_path / "out")).save_checkpoint({training.MODEL_KEY: ours.state_dict()}, epoch=3)
    saved = tmp_path / "out" / "epoch_3"
    names = {str(p.relative_to(base)) for p in base.rglob("*") if p.is_file()} - {"training_args.bin"}
    assert {str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file()} == names
    assert json.loads((saved / "config.json").read_text())["dtype"] == "bfloat16"
    assert transformers.AutoModelForCausalLM.from_pretrained(saved, dtype="auto").dtype is torch.bfloat16
    messages = [{"role": "user", "content": "Hello"}]
    expected = transformers.AutoTokenizer.from_pretrained(base).apply_chat_template(messages, tokenize=False)
    assert transformers.AutoTokenizer.from_pretrained(saved).apply_chat_template(messages, tokenize=False) == expected


def test_weights_with_adapters_are_not_a_folder_to_load(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_random(base, *CASES["llama"])
    saver = HFCheckpointer(str(base), str(tmp_path / "out"))
    with pytest.raises(UserError, match="Merge adapters before"):
        saver.save_checkpoint({training.MODEL_KEY: {"layers.0.attn.q_proj.lora_a.weight": torch.zeros(1)}}, epoch=0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_their_published_parameters(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = hf_model(str(PUBLISHED[name].save(tmp_path)))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == PUBLISHED[name].num_parameters
    assert total - sum(idle for _, idle in idle_weights(model)) == (PUBLISHED[name].num_active or total)
