"""What recipe the fields lead to, with what config, and what data and models are called."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from torchtune_agent import AgentSFTConfig, UserError, register_data
from torchtune_agent._tune import RECIPES
from torchtune_agent.api import references
from torchtune_agent.api.recipe_config import in_terms_of_fields, recipe_of, training_config, validation_config
from torchtune_agent.api.references import data_section, model_folder
from torchtune_agent.models.adapter import AdapterSettings
from torchtune_agent.training import Settings

COMPONENT = "torchtune_agent.data.AgentSFTDataset"
Config = Callable[..., AgentSFTConfig]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Makes configs in a folder that has data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(references, "_registered", {})
    for name in ("old", "new", "old_test", "new_test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"messages": []}))
    return lambda **fields: AgentSFTConfig(**{"base_model": "m", "train_data": "old.jsonl", "device": "cpu", **fields})


def plain(config: AgentSFTConfig) -> dict[str, Any]:
    cfg: Any = OmegaConf.to_container(training_config(config, Path("/models/m")), resolve=True)
    return cfg


def test_fields_become_the_recipe_s_keys(config: Config, tmp_path: Path) -> None:
    cfg = plain(
        config(seed=5, learning_rate=1e-4, max_seq_length=100, overrides=["dataset.packed=True", "log_by=[tool]"])
    )
    Settings.from_config(OmegaConf.create(cfg))  # knows every key
    assert cfg["optimizer"]["lr"] == 1e-4
    assert cfg["tokenizer"] == {
        "_component_": "torchtune_agent.data.chat_template_tokenizer", "path": "/models/m", "max_seq_len": 100,
    }  # fmt: skip
    assert cfg["dataset"] == {
        "_component_": COMPONENT, "source": "json", "data_files": str(tmp_path / "old.jsonl"), "packed": True,
    }  # fmt: skip
    keys = ("epochs", "batch_size", "gradient_accumulation_steps", "seed", "output_dir", "dtype", "log_by")
    assert [cfg[key] for key in keys] == [3, 8, 4, 5, ".sage/finetune", "fp32", ["tool"]]
    assert "dataset_val" not in cfg


def test_kinds_of_lora_reach_the_adapter_section(config: Config) -> None:
    def adapter(**fields: Any) -> AdapterSettings:
        return AdapterSettings.from_config(plain(config(**fields))["adapter"])

    assert adapter() == AdapterSettings(kind="lora", rank=16, alpha=32)
    made = adapter(use_dora=True, use_lora_plus=True, lora_rank=4, lora_alpha=8, lora_target_modules=["q_proj"])
    assert made == AdapterSettings(kind="dora", rank=4, alpha=8, targets=("q_proj",), lora_plus_lr_ratio=16.0)
    assert adapter(load_in_4bit=True, lora_plus_lr_ratio=2).quantize_base
    assert "adapter" not in plain(config(use_lora=False))
    for field in ("use_dora", "use_lora_plus", "quantize_base"):
        with pytest.raises(UserError, match=f"{field}=True: is a kind of LoRA"):
            plain(config(use_lora=False, **{field: True}))


def test_a_coreset_is_the_coreset_recipe_s(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = config(use_coreset_selection=True, coreset_strategy="loss_topk", coreset_target_size=50)
    monkeypatch.setitem(RECIPES, "agent_coreset_distributed", ())
    assert recipe_of(asked) == "agent_coreset_distributed"
    assert plain(asked)["coreset"] == {"strategy": "loss_topk", "target_size": 50}
    assert plain(config(use_coreset=True))["coreset"] == {"strategy": "hybrid"}  # the size is the recipe's own
    monkeypatch.delitem(RECIPES, "agent_coreset_distributed")
    with pytest.raises(UserError, match="use_coreset_selection=True: needs the recipe agent_coreset_distributed"):
        recipe_of(asked)


def test_a_list_of_data_is_a_stream(config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fields = {"train_data": ["old.jsonl", "new.jsonl"], "eval_data": ["old_test.jsonl", "new_test.jsonl"]}
    asked = config(use_online_continual=True, continual_buffer_size=10, num_epochs=2, **fields)
    monkeypatch.setitem(RECIPES, "agent_replay_distributed", ())
    assert recipe_of(asked) == "agent_replay_distributed"
    cfg = plain(asked)
    assert cfg["stream"] == ["phase_1", "phase_2"]
    assert cfg["phases"]["phase_2"] == {
        key: {"_component_": COMPONENT, "source": "json", "data_files": str(tmp_path / name)}
        for key, name in (("dataset", "new.jsonl"), ("dataset_val", "new_test.jsonl"))
    }
    assert cfg["continual"] == {"strategy": "replay", "buffer_size": 10, "replay_ratio": 0.25, "epochs_per_phase": 2}
    assert cfg["epochs"] == 1 and "dataset" not in cfg
    joined = plain(config(**fields))  # without a stream: one set of data
    assert [section["data_files"] for section in joined["dataset"]] == [str(tmp_path / n) for n in fields["train_data"]]
    later = {"use_online_continual": True, "eval_data": "old_test.jsonl"}
    with pytest.raises(UserError, match="train_data: .*Give two or more"):
        plain(config(**later))
    assert plain(config(**later, continual_replay_from="out"))["continual"]["replay_from"] == "out"
    with pytest.raises(UserError, match="eval_data: names 1, and train_data 2"):
        plain(config(use_online_continual=True, train_data=fields["train_data"], eval_data="old_test.jsonl"))
    with pytest.raises(UserError, match="cannot be combined"):
        recipe_of(config(use_online_continual=True, use_coreset_selection=True))


def test_measuring_leaves_out_what_belongs_to_training(config: Config) -> None:
    made = config(use_dora=True, overrides=["coreset.score_on=all", "enable_detailed_metrics=False"])
    cfg = validation_config(made, Path("/models/m"), "new.jsonl")
    assert not {"adapter", "coreset"} & set(cfg)
    assert cfg.dataset_val.data_files.endswith("/new.jsonl") and cfg.enable_detailed_metrics


def test_data_is_a_file_a_registered_name_or_a_data_set_of_the_hub(config: Config, tmp_path: Path) -> None:
    def files(reference: str) -> str:
        return data_section(reference, "train_data")["data_files"]

    (tmp_path / "folder" / "test").mkdir(parents=True)
    (tmp_path / "folder" / "train.jsonl.gz").touch()
    register_data("in_folder", "folder")
    register_data("mapped", {"train": tmp_path / "old.jsonl", "all": "*.jsonl"})
    register_data("computed", lambda split: f"{split}.jsonl")
    assert files("old.jsonl") == files("mapped:train") == files("computed:old") == str(tmp_path / "old.jsonl")
    assert files("o*.jsonl") == str(tmp_path / "o*.jsonl")
    assert files("mapped:all") == str(tmp_path / "*.jsonl")
    assert files("in_folder:train") == str(tmp_path / "folder" / "train.jsonl.gz")
    assert files("in_folder:test") == str(tmp_path / "folder" / "test")
    hub = data_section("org/name:test[:10%]", "train_data")
    assert hub == {"_component_": COMPONENT, "source": "org/name", "split": "test[:10%]"}
    for reference, message in {
        "agent_sft:train": r"no data is registered as 'agent_sft'. Registered: computed, in_folder, mapped",
        "in_folder:validation": "has no file or folder called 'validation'",
        "mapped:trian": "Did you mean 'train'",
        "computed:none": "none.jsonl is registered for it, and is not there",
        "nowhere.jsonl": "no such file .looked from",
    }.items():
        with pytest.raises(UserError, match=rf"^train_data={reference}: .*{message}"):
            files(reference)
    (tmp_path / "folder" / "train.json").touch()
    with pytest.raises(UserError, match="has more than one"):
        files("in_folder:train")


def test_a_model_that_is_not_there_is_named(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    for reference, message in {
        "./nowhere": "no such folder",
        ".": "has no config.json",
        "adapter": "holds an adapter alone",
    }.items():
        with pytest.raises(UserError, match=f"^base_model={reference}: {message}"):
            model_folder(reference, "base_model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^base_model=org/none: .*`tune download org/none --output-dir FOLDER`"):
        model_folder("org/none", "base_model")


def test_errors_name_the_field() -> None:
    error = in_terms_of_fields(UserError("tokenizer.max_seq_len=9: the model takes at most 8 tokens."))
    assert str(error).endswith("at most 8 tokens. (In AgentSFTConfig: max_seq_length.)")
    same = UserError("batch_size=3: no")
    assert in_terms_of_fields(same) is same
