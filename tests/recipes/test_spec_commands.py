"""The commands of the metrics document as they are written there, on a stand-in for the 32B checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchtune.models.qwen2 import qwen2
from torchtune.models.qwen2._convert_weights import qwen2_tune_to_hf

from tests import tune
from tests.recipes.test_agent_sft import SPEC_METRICS
from torchtune_agent.metrics import read_rows
from torchtune_agent.toolworld import TOKENIZER_DIR, ToolWorld

SIZES = {
    "vocab_size": 151665,  # qwen2_5_tokenizer's control tokens have fixed ids up to here
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "embed_dim": 16,
    "intermediate_dim": 32,
    "max_seq_len": 32768,
}
# What a machine without eight GPUs must change
SMALLER = (
    "model=torchtune.models.qwen2.qwen2",
    *(f"model.{key}={value}" for key, value in SIZES.items()),
    "checkpointer.checkpoint_files.max_filename=00001",
    "device=cpu",
    "dtype=fp32",
    "optimizer.fused=False",
    "gradient_accumulation_steps=2",
    "metric_logger=torchtune.training.metric_logging.StdoutLogger",
    "~metric_logger.project",
    "~metric_logger.log_dir",
    "dataset_val._component_=torchtune_agent.data.AgentSFTDataset",
    "dataset_val.data_files=datasets/my_data.jsonl",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with datasets/my_data.jsonl and path/to/model, a Qwen checkpoint in Hugging Face format."""
    model_dir = tmp_path / "path" / "to" / "model"
    model_dir.mkdir(parents=True)
    bpe = json.loads((TOKENIZER_DIR / "tokenizer.json").read_text())["model"]
    (model_dir / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]]
    (model_dir / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 16, "tie_word_embeddings": False}
    (model_dir / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 151665, **heads}))
    torch.manual_seed(0)
    weights = qwen2_tune_to_hf(qwen2(**SIZES).state_dict(), num_heads=2, num_kv_heads=1, dim=16)  # pyright: ignore
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()}, model_dir / "model-00001-of-00001.safetensors"
    )
    (tmp_path / "datasets").mkdir()
    records = ToolWorld(num_tools=20).conversations("train", 10)
    (tmp_path / "datasets" / "my_data.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    return tmp_path


@pytest.mark.distributed
def test_the_documented_command_trains_and_logs_every_documented_metric(folder: Path) -> None:
    command = "run --nnodes 1 --nproc_per_node 2 agent_sft_distributed --config agent_sft_distributed".split()
    overrides = ("checkpointer.checkpoint_dir=path/to/model", "dataset.data_files=datasets/my_data.jsonl")
    result = tune.run(*command, *overrides, *SMALLER, cwd=folder)
    assert result.returncode == 0, result.stderr
    out = folder / "outputs" / "agent_sft_32B"
    logged = set().union(*read_rows(out / "logs" / "metrics.jsonl"))
    assert [name for name in SPEC_METRICS if name not in logged] == []
    assert "Step 1 | " in result.stdout  # torchtune's StdoutLogger
    (saved,) = (out / "model" / "epoch_0").glob("*.safetensors")
    before = load_file(folder / "path" / "to" / "model" / "model-00001-of-00001.safetensors")
    after = load_file(saved)
    assert after.keys() == before.keys()  # still in Hugging Face's format
    assert not after["model.layers.0.mlp.up_proj.weight"].equal(before["model.layers.0.mlp.up_proj.weight"])
