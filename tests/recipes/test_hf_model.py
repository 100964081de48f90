"""A model in a Hugging Face folder through the real recipe, and out again."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests import tune
from tests.hf_models import CASES, save_random
from tests.tune import train
from torchtune_agent.toolworld import TOKENIZER_DIR

CONFIG = Path(__file__).parents[2] / "configs" / "hf" / "agent_sft.yaml"
SMALL = (
    "dataset=torchtune_agent.data.toolworld_dataset",
    "~dataset.source",
    "~dataset.data_files",
    "~dataset.packed",
    "dataset.split=train",
    "dataset.num_tasks=16",
    "dataset.num_tools=40",
    "tokenizer.max_seq_len=512",
    "metric_logger=torchtune.training.metric_logging.DiskLogger",
    "~metric_logger.project",
    "log_peak_memory_stats=False",
    "optimizer.fused=False",
    "device=cpu",
    "dtype=fp32",
    "seed=1",
    "epochs=2",
    "max_steps_per_epoch=1",
    "lr_scheduler.num_warmup_steps=1",
)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_folder_is_trained_resumed_and_loaded_by_transformers(tmp_path: Path) -> None:
    """Two ranks write two epochs; one rank goes on from the first epoch, to the same weights."""
    base = tmp_path / "base"
    changes: dict[str, Any] = {"vocab_size": 2048, "max_position_embeddings": 1024, "eos_token_id": 1}
    make, options = CASES["qwen3_moe tied, some layers plain"]
    save_random(base, make, {**options, **changes, "attention_bias": True}, max_shard_size="100KB")
    shutil.copytree(TOKENIZER_DIR, base, dirs_exist_ok=True)
    given = (f"model_dir={base}", *SMALL)

    done = train(*given, cwd=tmp_path, config=str(CONFIG))
    assert done.returncode == 0, done.stderr[-3000:]
    weights = tmp_path / "out" / "model"
    expected = load_file(weights / "epoch_1" / "model.safetensors")
    first = load_file(weights / "epoch_0" / "model.safetensors")
    assert any(not torch.equal(expected[name], first[name]) for name in expected)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(weights / "epoch_1", output_loading_info=True)
    model, report = loaded
    assert not any(report.values()), report
    model.save_pretrained(tmp_path / "theirs")  # in memory it stacks experts in another way
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert theirs.keys() == expected.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in expected.items())

    first_epoch = tmp_path / "out" / "checkpoints" / "step_1"
    export = tune.run(
        "run",
        "agent_export",
        "--config",
        str(tmp_path / "out" / "logs" / "config.yaml"),
        "export.checkpoint=step_1",
        cwd=tmp_path,
    )
    assert export.returncode == 0, export.stderr[-3000:]
    for name, tensor in load_file(weights / "step_1" / "model.safetensors").items():  # of both ranks
        assert torch.equal(tensor, first[name])

    shutil.rmtree(weights / "epoch_1")
    again = train(
        *given, f"resume_from_checkpoint={first_epoch}", "batch_size=4", cwd=tmp_path, config=str(CONFIG), processes=1
    )
    assert again.returncode == 0, again.stderr[-3000:]
    resumed = load_file(weights / "epoch_1" / "model.safetensors")
    for name, tensor in resumed.items():
        if not name.endswith("k_proj.bias"):  # a gradient of nothing but rounding, which Adam blows up
            torch.testing.assert_close(tensor, expected[name], atol=2e-6, rtol=1e-5)
