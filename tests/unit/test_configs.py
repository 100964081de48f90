"""Every shipped config is read, checked, and each of its components is really made (weights are stand-ins)."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torchtune.modules import TransformerDecoder

from torchtune_agent._tune import RECIPES, config_path
from torchtune_agent.config import instantiate
from torchtune_agent.continual.config import take_arrivals, take_stream
from torchtune_agent.data import AgentSFTDataset, AgentSFTTransform
from torchtune_agent.toolworld import TOKENIZER_DIR
from torchtune_agent.training import Settings, parameter_setup
from torchtune_agent.training.data_check import CheckSettings
from torchtune_agent.training.sft import dataset_sections

NAMES = sorted({name for names in RECIPES.values() for name in names})
SHARDS = 32
QWEN3 = {"model_type": "qwen3", "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
QWEN3 |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40960}
CALL = "<function=f>\n</function>"
RECORD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": CALL}]}


@pytest.fixture
def checkpoint_dir(tmp_path: Path) -> Path:
    """A folder with every file a model's folder has, and next to nothing in them."""
    folder = tmp_path / "model"
    shutil.copytree(TOKENIZER_DIR, folder)
    tokens = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "vocab.json").write_text(json.dumps(tokens))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "config.json").write_text(json.dumps(QWEN3))
    weight = {"weight": torch.zeros(1)}
    save_file(weight, folder / "model.safetensors")
    for total in range(1, SHARDS):
        for shard in range(1, total + 1):
            save_file(weight, folder / f"model-{shard:05d}-of-{total:05d}.safetensors")
    return folder


@pytest.fixture
def config(request: pytest.FixtureRequest, tmp_path: Path, checkpoint_dir: Path) -> DictConfig:
    cfg = OmegaConf.load(config_path(request.param))
    assert isinstance(cfg, DictConfig)
    cfg.output_dir = str(tmp_path / "out")
    if "stream" in cfg:
        take_stream(cfg)
    if "arrivals" in cfg:
        take_arrivals(cfg)
    if "checkpoint_dir" in cfg.checkpointer:
        cfg.checkpointer.checkpoint_dir = str(checkpoint_dir)
    if "model_dir" in cfg.model:
        cfg.model_dir = str(checkpoint_dir)
    if "data_files" in cfg.dataset:
        data = tmp_path / "data.jsonl"
        data.write_text(json.dumps(RECORD))
        cfg.dataset.data_files = str(data)
    return cfg


@pytest.mark.parametrize("config", NAMES, indirect=True)
def test_every_component_can_be_made(config: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    made: set[str] = set()

    def make(key: str, *args: Any, **kwargs: Any) -> Any:
        made.add(key)
        return instantiate(config[key], key, *args, **kwargs)

    tokenizer = make("tokenizer")
    assert tokenizer.max_seq_len is not None
    for key in ("dataset", "dataset_val"):
        if key in config:
            made.add(key)
            for section in dataset_sections(config, key).values():
                dataset = instantiate(section, key, tokenizer)
                if key == "dataset" and "arrivals" in config:
                    assert isinstance(dataset, AgentSFTTransform)
                else:
                    assert isinstance(dataset, AgentSFTDataset) and len(dataset) > 0
    optimizer = make("optimizer", [torch.nn.Parameter(torch.zeros(2))])
    make("lr_scheduler", optimizer, num_training_steps=10)
    make("checkpointer")
    make("metric_logger").close()
    if "profiler" in config:
        make("profiler")
    made.add("model")  # made in the test below
    sections = {key: value[0] if OmegaConf.is_list(value) else value for key, value in config.items()}
    assert made == {key for key, value in sections.items() if OmegaConf.is_dict(value) and "_component_" in value}


@pytest.mark.parametrize("config", NAMES, indirect=True)
def test_settings_and_model_fit_together(config: DictConfig) -> None:
    config.device = "cpu"  # CI has no GPU
    settings = Settings.from_config(config)
    model = parameter_setup(config).build(config, settings)
    assert isinstance(model, TransformerDecoder)
    assert all(parameter.is_meta and parameter.dtype == settings.torch_dtype for parameter in model.parameters())
    assert config.tokenizer.max_seq_len <= model.max_seq_len
    modules = dict(model.named_modules())
    assert all(layer in modules for layer in settings.custom_sharded_layers or ())


def test_one_file_serves_training_and_the_data_check() -> None:
    config = OmegaConf.load(config_path("tiny/agent_sft"))
    assert isinstance(config, DictConfig)
    config.check = {"num_samples": 3}
    assert CheckSettings.from_config(config).check.num_samples == 3
    assert Settings.from_config(config).batch_size == config.batch_size
