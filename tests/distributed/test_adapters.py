"""Adapters and frozen weights through the whole recipe: on any number of ranks, killed and resumed, out to peft."""

import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from tests.hf_models import save_random
from tests.training_runs import CONFIG, Left, launch
from torchtune_agent.models.adapter import PARTS
from torchtune_agent.toolworld import TOKENIZER_DIR
from torchtune_agent.training import sharded

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

AUTO = "resume_from_checkpoint=auto"
QDORA = (
    "adapter.kind=dora",
    "adapter.quantize_base=True",
    "adapter.rank=4",
    "adapter.dropout=0.1",
    "adapter.lora_plus_lr_ratio=4",
    "adapter.modules_to_save=[embed_tokens]",
)


def losses(run: Left) -> list[float]:
    return [row["loss"] for row in run.rows if "loss" in row]


def saved_names(run: Left) -> set[str]:
    layout = sharded.read_layout(run.out / "checkpoints" / f"step_{run.saved[0]}" / "tensors")
    return {name.removeprefix("model.") for name in layout.state_dict_metadata if name.startswith("model.")}


def test_quantized_base_with_adapters_killed_and_resumed(tmp_path: Path) -> None:
    whole = launch(tmp_path / "whole", *QDORA)
    assert whole.codes == [0, 0], whole.output
    killed = launch(tmp_path / "killed", *QDORA, AUTO, kill="step:8:1")
    assert -9 in killed.codes
    run = launch(tmp_path / "killed", *QDORA, AUTO)
    assert run.codes == [0, 0], run.output
    assert run.digests == whole.digests and run.rows == whole.rows
    names = saved_names(run) - {"tok_embeddings.weight"}  # of the adapters, and nothing else of the base
    assert len(saved_names(run)) == 7 * 3 + 1 and all(name.endswith(PARTS) for name in names)


def test_one_rank_equals_two(tmp_path: Path) -> None:
    options = [option for option in QDORA if "dropout" not in option]
    two = launch(tmp_path / "two", *options)
    one = launch(tmp_path / "one", *options, "gradient_accumulation_steps=4", size=1)
    assert one.codes == [0] and losses(one)[0] > losses(one)[-1]
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)


def test_frozen_weights_stay_and_are_in_no_checkpoint(tmp_path: Path) -> None:
    options = ("freeze=['layers.*', 'tok_embeddings.*']", "ac_mode=full")
    killed = launch(tmp_path / "run", *options, AUTO, kill="step:8:0")
    assert -9 in killed.codes
    run = launch(tmp_path / "run", *options, AUTO)
    assert run.codes == [0, 0], run.output
    assert saved_names(run) == {"norm.scale"}
    before, after = (load_file(run.out / "model" / f"epoch_{epoch}" / "model.safetensors") for epoch in (0, 1))
    assert {name for name, weight in after.items() if not torch.equal(weight, before[name])} == {"norm.scale"}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("freeze=[layer.*]", "freeze: no weight's name matches 'layer.*'"),
        ("freeze=['*']", "freeze: leaves nothing to train"),
        ("adapter=lora", "adapter=lora: must be a section"),
        ("adapter.rnak=4", "adapter.rnak: unknown key"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, option: str, message: str) -> None:
    run = launch(tmp_path, option, size=1)
    assert run.codes == [1] and "Traceback" not in run.output
    assert message in run.output


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ([], "base"),
        (
            ["adapter.modules_to_save=[embed_tokens]", "tool_call_special_tokens=['<plan>']"],
            "run/out/model_with_new_tokens",
        ),
    ],
    ids=["adapters", "and new tokens"],
)
def test_what_is_written_is_the_same_model_to_transformers_and_peft(
    tmp_path: Path, options: list[str], start: str
) -> None:
    base = tmp_path / "base"
    sizes = {"vocab_size": 2048, "hidden_size": 64, "max_position_embeddings": 1024, "tie_word_embeddings": True}
    save_random(base, transformers.Qwen2Config, sizes)
    shutil.copytree(TOKENIZER_DIR, base, dirs_exist_ok=True)
    config = yaml.safe_load(CONFIG.read_text())
    config["model_dir"] = str(base)
    config["model"] = {"_component_": "torchtune_agent.models.hf_model", "model_dir": str(base)}
    config["checkpointer"]["_component_"] = "torchtune_agent.models.HFCheckpointer"
    config["checkpointer"]["model_dir"] = str(base)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    options = ["adapter.rank=4", "epochs=1", "optimizer.lr=0.01", *options]
    run = launch(tmp_path / "run", *options, config=tmp_path / "config.yaml")
    assert run.codes == [0, 0], run.output
    load = transformers.AutoModelForCausalLM.from_pretrained
    before, after = load(tmp_path / start), load(run.out / "model" / "epoch_0")
    rows = before.config.vocab_size
    assert rows == (2048 if start == "base" else 2112)
    tokens = torch.randint(0, rows, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (after(tokens).logits - before(tokens).logits).abs().max() > 0.1  # it was trained
        adapted = peft.PeftModel.from_pretrained(before, str(run.out / "lora_weights" / "epoch_0"))(tokens).logits
        torch.testing.assert_close(after(tokens).logits, adapted, atol=1e-5, rtol=1e-5)
