"""A model with new tokens is a model like any other: to transformers, to our road, and after training."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from omegaconf import DictConfig, OmegaConf

from tests.hf_models import load_ours, save_random
from tests.training_runs import CONFIG, launch
from torchtune_agent.data import chat_template_tokenizer
from torchtune_agent.errors import UserError
from torchtune_agent.models.new_tokens import extend_folder, with_new_tokens
from torchtune_agent.toolworld import TOKENIZER_DIR
from torchtune_agent.training.export import export

TOKENS = {"<plan>": "the steps to take", "</plan>": None}


@pytest.fixture(scope="module", params=["tied", "untied, in shards"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tied = request.param == "tied"
    sizes: dict[str, Any] = {"vocab_size": 2048, "max_position_embeddings": 1024, "tie_word_embeddings": tied}
    save_random(folder, transformers.Qwen2Config, sizes, max_shard_size="5GB" if tied else "100KB")
    shutil.copytree(TOKENIZER_DIR, folder, dirs_exist_ok=True)
    return folder


def test_old_tokens_are_as_before_and_new_ones_start_from_their_description(base: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    extend_folder(base, TOKENS, made)
    tokenizer, old_tokenizer = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (made, base))
    plan, end = tokenizer.convert_tokens_to_ids(list(TOKENS))
    assert (plan, end) == (len(old_tokenizer), len(old_tokenizer) + 1)
    assert tokenizer("a<plan>b</plan>").input_ids == [
        *old_tokenizer("a").input_ids,
        plan,
        *old_tokenizer("b").input_ids,
        end,
    ]
    model, before = (transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (made, base))
    words = old_tokenizer(TOKENS["<plan>"]).input_ids
    assert len(words) > 1 and json.loads((made / "config.json").read_text())["vocab_size"] == 2048 + 64
    for get in ("get_input_embeddings", "get_output_embeddings"):
        new, old = (getattr(one, get)().weight for one in (model, before))
        assert new.shape == (2048 + 64, 48) and torch.equal(new[:2048], old)
        torch.testing.assert_close(new[plan], old[words].mean(0))
        torch.testing.assert_close(new[end], old.mean(0))
    tokens = torch.tensor([[plan, 5, 6, end]])
    with torch.no_grad():
        torch.testing.assert_close(load_ours(made, tmp_path)(tokens), model(tokens).logits, atol=1e-5, rtol=1e-5)


def test_rows_that_are_there_already_are_used(base: Path, tmp_path: Path) -> None:
    """Many models have more rows than tokens."""
    larger = tmp_path / "larger"
    shutil.copytree(base, larger, ignore=shutil.ignore_patterns("*.safetensors*"))
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(2112)
    model.save_pretrained(larger)
    extend_folder(larger, TOKENS, tmp_path / "made")
    assert json.loads((tmp_path / "made" / "config.json").read_text())["vocab_size"] == 2112


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(["<|im_end|>"], "is a token of this model already"), (["the "], "ends with a space"), ([""], "is empty")],
)
def test_what_is_no_new_token_is_refused(base: Path, tmp_path: Path, tokens: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"tool_call_special_tokens: .*{message}"):
        with_new_tokens(DictConfig({"model_dir": str(base)}), tokens, tmp_path)
    with pytest.raises(UserError, match="needs model_dir"):
        with_new_tokens(DictConfig({}), tokens, tmp_path)


@pytest.mark.distributed
@pytest.mark.slow
def test_they_are_trained_split_over_ranks_resumed_and_saved_with_the_tokenizer(base: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(CONFIG.read_text()) | {"model_dir": str(base)}
    config["tool_call_special_tokens"] = ["<function="]  # which the template writes at the head of every call
    config["model"] = {"_component_": "torchtune_agent.models.hf_model", "model_dir": "${model_dir}"}
    config["tokenizer"] = {"_component_": "torchtune_agent.data.chat_template_tokenizer", "path": "${model_dir}"}
    config["checkpointer"]["_component_"] = "torchtune_agent.models.HFCheckpointer"
    config["checkpointer"]["model_dir"] = "${model_dir}"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    killed = launch(tmp_path, "resume_from_checkpoint=auto", config=tmp_path / "config.yaml", kill="step:8:0")
    assert -9 in killed.codes, killed.output
    run = launch(tmp_path, "resume_from_checkpoint=auto", config=tmp_path / "config.yaml")
    assert run.codes == [0, 0] and "resuming" in run.output, run.output
    saved = run.out / "model" / "epoch_1"
    encoded = chat_template_tokenizer(str(saved)).encode("<function=", add_bos=False, add_eos=False)
    trained: Any = transformers.AutoModelForCausalLM.from_pretrained(saved).get_input_embeddings().weight
    began = load_ours(run.out / "model_with_new_tokens", tmp_path).tok_embeddings.weight
    token = transformers.AutoTokenizer.from_pretrained(saved).convert_tokens_to_ids("<function=")
    assert encoded == [token] and not torch.allclose(trained[token], began[token], atol=1e-3)
    given: Any = OmegaConf.load(run.out / "logs" / "config.yaml")
    assert given.model_dir == str(base)  # what the user gave
    export(given)
    exported: Any = transformers.AutoModelForCausalLM.from_pretrained(run.out / "model" / "step_12")
    assert torch.equal(exported.get_input_embeddings().weight, trained)
