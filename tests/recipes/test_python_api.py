"""The Python API as a program uses it: the documented examples as written, with stand-ins for model and data."""

import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torchtune._cli.tune import main as tune

from tests.hf_models import CASES, save_random
from torchtune_agent import AgentSFTConfig, AgentSFTTrainer, EvalResult, TrainingStopped, UserError
from torchtune_agent.api import references
from torchtune_agent.api.running import _raise
from torchtune_agent.data import AgentSFTDataset, TokenClass
from torchtune_agent.data.templates import ChatTemplateTokenizer
from torchtune_agent.metrics import read_rows
from torchtune_agent.toolworld import TOKENIZER_DIR
from torchtune_agent.training.run import say_mistake

DOCS = Path(__file__).parents[2] / "docs" / "python-api.md"
# The documented example, but for the module's name
EXAMPLE = """
from torchtune_agent import AgentSFTConfig, AgentSFTTrainer

config = AgentSFTConfig(
    base_model="Qwen/Qwen2.5-1.5B-Instruct",
    train_data="agent_sft:train",
)

trainer = AgentSFTTrainer(config)

# Train
result = trainer.train()
print(f"Final loss: {result.final_loss}")

# Evaluate
eval_result = trainer.evaluate("agent_sft:test")
print(f"Accuracy: {eval_result.accuracy}")

# Save
trainer.save_model("./my_agent_model")
"""
METHODS = """
config = AgentSFTConfig(
    base_model="Qwen/Qwen2.5-1.5B-Instruct",
    train_data="agent_sft:train",
    num_epochs=2,
    use_coreset_selection=True,
    coreset_strategy="hybrid",
    use_dora=True,
)
"""
FAST: dict[str, Any] = {
    "learning_rate": 1e-2,
    "num_epochs": 1,
    "lora_r": 4,
    "overrides": ["lr_scheduler.num_warmup_steps=1"],
}
DATA = {"train": 64, "test": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and a model at the place of its name on the hub."""
    folder = tmp_path_factory.mktemp("program")
    for name in ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"):
        sizes = {"vocab_size": 2048, "max_position_embeddings": 2048, "num_hidden_layers": 1, "eos_token_id": 1}
        save_random(folder / name, CASES["qwen2"][0], {**CASES["qwen2"][1], **sizes, "tie_word_embeddings": True})
        shutil.copytree(TOKENIZER_DIR, folder / name, dirs_exist_ok=True)
    for split, size in DATA.items():
        with (folder / f"{split}.jsonl").open("w") as file:
            for i in range(size):
                call = f"I look.\n<function=look>\n<parameter=at>\n{split}{i}\n</parameter>\n</function>"
                turns = [
                    ("user", f"Where is {i}?"),
                    ("assistant", call),
                    ("tool", "Here"),
                    ("assistant", "It is here."),
                ]
                file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    return folder


def states() -> Any:
    """Of all generators of random numbers."""
    numpy: Any = np.random.get_state()
    return random.getstate(), numpy[1].tolist(), torch.get_rng_state().tolist()


@pytest.fixture(autouse=True)
def program(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs in that folder, with the data registered, and leaves a test's process as it was."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(references, "_registered", {"agent_sft": folder})
    monkeypatch.setattr(sys, "argv", ["my_program", "--my", "token=own"])
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    before = states()
    yield
    assert sys.argv == ["my_program", "--my", "token=own"]
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    assert states() == before
    assert not torch.distributed.is_initialized()


def made(**fields: Any) -> AgentSFTTrainer:
    given = {"base_model": "Qwen/Qwen2.5-1.5B-Instruct", "train_data": "agent_sft:train", "device": "cpu", "seed": 7}
    return AgentSFTTrainer(AgentSFTConfig(**{**given, **fields}))


def rows(output_dir: Path) -> list[dict[str, Any]]:
    """What was logged, without what clocks and the machine say."""
    measured = re.compile(r"time|.*_per_second|peak_memory|checkpoint_stall|mfu")
    logged = read_rows(output_dir / "logs" / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not measured.match(name)} for row in logged]


def weights(model_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(model_dir / "model.safetensors")


def assert_as_transformers_says(result: EvalResult, model_dir: Path, data: Path) -> None:
    """Loss and accuracy by another implementation of the model, one conversation after the other."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    dataset = AgentSFTDataset(ChatTemplateTokenizer(str(model_dir)), data_files=str(data))
    loss = num_targets = num_right = num_tokens = 0.0
    for sample in (dataset[i] for i in range(len(dataset))):
        tokens, classes = torch.tensor(sample["tokens"]).long(), torch.tensor(sample["token_class"])[1:]
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, :-1].double()
        trained, counted = classes != TokenClass.IGNORED, classes > TokenClass.SPECIAL
        loss += float(torch.nn.functional.cross_entropy(logits[trained], tokens[1:][trained], reduction="sum"))
        num_targets += float(trained.sum())
        num_right += float((logits.argmax(-1) == tokens[1:])[counted].sum())
        num_tokens += float(counted.sum())
    assert result.loss == pytest.approx(loss / num_targets, rel=1e-5)
    assert result.accuracy == pytest.approx(num_right / num_tokens)
    assert result.num_tokens == num_tokens == result.classes["overall"]["num_tokens"]


def test_the_documented_example_runs_as_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(EXAMPLE, names)
    out = capsys.readouterr().out
    result, measured = names["result"], names["eval_result"]
    assert f"Final loss: {result.final_loss}" in out and f"Accuracy: {measured.accuracy}" in out
    assert result.num_steps == 3 * 2 and result.eval is None
    assert result.final_loss == rows(folder / ".sage" / "finetune")[-1]["loss"]
    assert result.model_dir == folder / ".sage" / "finetune" / "model" / "epoch_2"
    assert (result.adapter_dir / "adapter_config.json").exists()
    saved = folder / "my_agent_model"
    assert all(torch.equal(tensor, weights(result.model_dir)[name]) for name, tensor in weights(saved).items())
    assert_as_transformers_says(measured, saved, folder / "test.jsonl")
    assert measured.classes["call_name"]["num_tokens"] > 0 and "val_tool_call_exact" in measured.metrics


def test_the_page_s_example_runs_as_pasted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert found is not None
    exec(found[1], {})
    assert "call_name" in capsys.readouterr().out
    assert transformers.AutoModelForCausalLM.from_pretrained(folder / "my_agent")


def test_a_quantized_base_is_trained_measured_and_saved(folder: Path) -> None:
    trainer = made(**FAST, output_dir=folder / "quantized", load_in_4bit=True, use_dora=True)
    result = trainer.train()
    measured = trainer.evaluate("agent_sft:test")
    trainer.save_model(folder / "saved_quantized")
    assert_as_transformers_says(measured, folder / "saved_quantized", folder / "test.jsonl")
    again = made(load_in_4bit=True)
    again.load_model(folder / "saved_quantized")
    assert again.evaluate("agent_sft:test").loss == pytest.approx(measured.loss, abs=1e-5)
    assert result.adapter_dir is not None and (result.adapter_dir / "adapter_model.safetensors").exists()


def test_methods_of_recipes_that_are_there_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {"AgentSFTConfig": AgentSFTConfig}
    exec(METHODS, names)
    assert names["config"].use_dora and names["config"].num_epochs == 2
    monkeypatch.setattr("torchtune_agent.api.recipe_config.RECIPES", {})
    with pytest.raises(UserError, match="use_coreset_selection=True: needs the recipe"):
        AgentSFTTrainer(names["config"])


def test_runs_in_one_process_are_the_command_line_s(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails, two that are the same, and `tune run` with the config written by hand."""
    with pytest.raises(UserError, match=r"takes at most 2048 tokens.*In AgentSFTConfig: max_seq_length"):
        made(max_seq_length=4096).train()
    with pytest.raises(UserError, match=r"dataset.formt.*Did you mean 'format'"):
        made(overrides=["dataset.formt=openai"]).train()
    first, second = (made(**FAST, output_dir=folder / name, eval_data="agent_sft:test") for name in ("first", "second"))
    results = [first.train(), second.train()]
    given = f"""run agent_sft_distributed --config hf/agent_sft model_dir={folder}/Qwen/Qwen2.5-1.5B-Instruct
        output_dir={folder}/by_hand seed=7 device=cpu dtype=fp32 epochs=1 batch_size=8 gradient_accumulation_steps=4
        optimizer.lr=1e-2 optimizer.fused=False lr_scheduler.num_warmup_steps=1 tokenizer.max_seq_len=2048
        dataset.data_files={folder}/train.jsonl dataset_val._component_=torchtune_agent.data.AgentSFTDataset
        dataset_val.source=json dataset_val.data_files={folder}/test.jsonl adapter.rank=4 adapter.alpha=32
        metric_logger=torchtune.training.metric_logging.DiskLogger ~metric_logger.project"""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["tune", *given.split()])
        with torch.random.fork_rng():
            state = random.getstate(), np.random.get_state()
            try:
                tune()
            finally:
                random.setstate(state[0])
                np.random.set_state(state[1])
    assert ended.value.code == 0
    expected = rows(folder / "by_hand")
    assert len(expected) == 3 and rows(folder / "first") == rows(folder / "second") == expected
    trained = weights(folder / "by_hand" / "model" / "epoch_0")
    for result in results:
        assert all(torch.equal(tensor, trained[name]) for name, tensor in weights(result.model_dir).items())
        assert result.eval is not None and result.eval.loss == expected[-1]["val_loss"]
    # What was validated while it trained, with its adapter, and the merged weights afterwards
    assert first.evaluate().loss == pytest.approx(expected[-1]["val_loss"], rel=1e-5)


def test_a_loaded_model_is_measured_and_trained_further(folder: Path) -> None:
    trainer = made(**FAST, output_dir=folder / "further", use_lora=False)
    with pytest.raises(UserError, match="nothing is trained or loaded yet"):
        trainer.save_model(folder / "nothing")
    base = trainer.evaluate("agent_sft:test")
    assert_as_transformers_says(base, folder / "Qwen" / "Qwen2.5-1.5B-Instruct", folder / "test.jsonl")
    once = trainer.train()
    trainer.save_model(folder / "once")
    other = made(**FAST, output_dir=folder / "other", use_lora=False)
    other.load_model(folder / "once")
    better = other.evaluate("agent_sft:test")
    assert better.loss < base.loss
    twice = other.train()
    assert twice.adapter_dir is None and twice.final_loss < once.final_loss
    other.save_model(folder / "once")  # an earlier model may be replaced
    assert torch.equal(weights(folder / "once")["model.norm.weight"], weights(twice.model_dir)["model.norm.weight"])
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").touch()
    with pytest.raises(UserError, match="there is something else already"):
        other.save_model(folder / "full")


def test_a_signal_ends_the_run_and_not_the_program(folder: Path) -> None:
    trainer = made(**{**FAST, "num_epochs": 500}, output_dir=folder / "stopped")
    log = folder / "stopped" / "logs" / "metrics.jsonl"

    def ask() -> None:
        while not (log.exists() and log.stat().st_size):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    with pytest.raises(TrainingStopped, match="resume_from_checkpoint=auto"):
        trainer.train()
    thread.join()
    assert (folder / "stopped" / "checkpoints" / "latest").exists()


@pytest.mark.distributed
@pytest.mark.slow
def test_two_devices_train_what_one_does(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fields: dict[str, Any] = {**FAST, "use_lora_plus": True}
    one = made(**fields, output_dir=folder / "one").train()
    two = made(**fields, output_dir=folder / "two", num_devices=2, gradient_accumulation_steps=2).train()
    assert "on 2 x cpu" in capfd.readouterr().err
    assert two.num_steps == one.num_steps
    assert two.final_loss == pytest.approx(one.final_loss, rel=1e-4)


def test_what_several_processes_say_of_their_end_is_raised(capsys: pytest.CaptureFixture[str]) -> None:
    say_mistake(UserError("epochs=0: must be at least 1."))
    with pytest.raises(UserError, match="^epochs=0: must be at least 1.$"):
        _raise(1, f"progress\n{capsys.readouterr().err}")
    with pytest.raises(RuntimeError, match="^rank 1 .pid 4. was killed by SIGKILL at step 2$"):
        _raise(1, "10%\n\nerror: rank 1 (pid 4) was killed by SIGKILL at step 2\n")


def test_a_program_that_is_one_of_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="num_devices: this program is itself one of several"):
        made().train()
