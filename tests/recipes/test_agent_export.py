"""`tune run agent_export`, and `export_every_n_steps`: what `transformers` and `peft` load is what was trained.

Runs are real, in this process and alone; a checkpoint of two ranks is exported in test_hf_model.py.
"""

import json
import re
import runpy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torchtune import training

from tests.hf_models import CASES, fill, save_random
from tests.recipes.test_hf_model import CONFIG, SMALL
from torchtune_agent.metrics import read_rows
from torchtune_agent.models import HFCheckpointer, hf_model
from torchtune_agent.models.adapter import AdapterSettings
from torchtune_agent.toolworld import TOKENIZER_DIR
from torchtune_agent.training.adapters import add_adapters
from torchtune_agent.training.card import Trained, adapter_card, model_card
from torchtune_agent.training.checkpoints import Manifest

RECIPES = Path(__file__).parents[2] / "recipes"
CHANGES: dict[str, Any] = {"vocab_size": 2048, "max_position_embeddings": 1024, "eos_token_id": 1}
RUN = (  # three steps of one epoch; validation, checkpoint and export after the second
    *(given for given in SMALL if not given.startswith(("epochs", "max_steps"))),
    "epochs=1",
    "max_steps_per_epoch=3",
    "optimizer.lr=0.01",
    "batch_size=1",
    "gradient_accumulation_steps=1",
    "dataset_val._component_=torchtune_agent.data.toolworld_dataset",
    "dataset_val.split=validation",
    "dataset_val.num_tasks=4",
    "dataset_val.num_tools=40",
    "run_val_every_n_steps=2",
    "save_every_n_steps=2",
    "export_every_n_steps=2",
)
LORA = (  # two epochs of two steps
    "adapter.kind=lora",
    "adapter.rank=4",
    "adapter.alpha=6",
    "epochs=2",
    "max_steps_per_epoch=2",
    "save_every_n_steps=1",
    "keep_last_n_checkpoints=4",
    "export_every_n_steps=1",
)


@dataclass
class Done:
    """A finished run, and the folder of the model it started from."""

    out: Path
    base: Path

    @property
    def config(self) -> str:
        return str(self.out / "logs" / "config.yaml")


def recipe(name: str, *arguments: str) -> int:
    """Run recipes/NAME.py in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code


def trained(folder: Path, case: str, *arguments: str) -> Done:
    base, out = folder / "base", folder / "out"
    save_random(base, CASES[case][0], {**CASES[case][1], **CHANGES})
    shutil.copytree(TOKENIZER_DIR, base, dirs_exist_ok=True)
    assert recipe("agent_sft_distributed", *command(base, out), *arguments) == 0
    return Done(out, base)


def command(base: Path, out: Path) -> tuple[str, ...]:
    return ("--config", str(CONFIG), f"model_dir={base}", f"output_dir={out}", *RUN)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Done:
    return trained(tmp_path_factory.mktemp("full"), "qwen3 tied")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Trained with a tokenizer that is not the base model's."""
    folder = tmp_path_factory.mktemp("lora")
    tokenizer = shutil.copytree(TOKENIZER_DIR, folder / "tokenizer")
    (tokenizer / "added_tokens.json").write_text("{}")
    return trained(folder, "llama", f"tokenizer.path={tokenizer}", *LORA)


def stored(checkpoint: Path, path: Path) -> dict[str, torch.Tensor]:
    """The model's tensors in a checkpoint, as torch's own converter reads them."""
    dcp_to_torch_save(checkpoint / "tensors", path)
    tensors = torch.load(path, weights_only=True)
    return {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}


def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(0, CHANGES["vocab_size"], (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(tokens)
    return found if isinstance(found, torch.Tensor) else found.logits


def theirs(folder: Path) -> Any:
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, report = loaded
    assert not any(report.values()), report
    return model.eval()


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def empty(base: Path) -> Any:
    with torch.device("meta"):
        return hf_model(str(base))


def card(folder: Path) -> tuple[dict[str, Any], str]:
    """Its front matter, and the rest."""
    text = (folder / "README.md").read_text()
    _, front, rest = text.split("---\n", 2)
    return yaml.safe_load(front), rest


def test_a_checkpoint_becomes_a_folder_that_transformers_loads(
    full: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (f"export.output_dir={tmp_path}", "export.checkpoint=step_2", "checkpointer.max_shard_gb=0.0002")
    assert recipe("agent_export", "--config", full.config, *given) == 0
    exported, at_step = tmp_path / "model" / "step_2", full.out / "model" / "step_2"
    assert str(exported) in capsys.readouterr().out

    ours = fill(empty(full.base), stored(full.out / "checkpoints" / "step_2", tmp_path / "stored.pt"))
    assert len(list(exported.glob("model-*-of-*.safetensors"))) > 1
    assert_close(logits(theirs(exported)), logits(ours))
    assert not torch.allclose(logits(ours), logits(theirs(full.base)), atol=1e-2)
    parts = [load_file(path) for path in exported.glob("*.safetensors")]
    written = load_file(at_step / "model.safetensors")  # while the run went on
    assert {name for part in parts for name in part} == written.keys()
    assert all(torch.equal(tensor, written[name]) for part in parts for name, tensor in part.items())

    names = {path.name for path in exported.iterdir() if not path.name.startswith("model")}
    assert names == {"config.json", "generation_config.json", "README.md", *(p.name for p in TOKENIZER_DIR.iterdir())}
    assert card(exported) == card(at_step)


def test_the_newest_checkpoint_is_the_end_of_the_run(full: Done) -> None:
    assert recipe("agent_export", "--config", full.config) == 0
    for name in ("model.safetensors", "config.json"):
        found, expected = (full.out / "model" / step / name for step in ("step_3", "epoch_0"))
        assert found.read_bytes() == expected.read_bytes()


def test_torchtunes_checkpointer_and_ours_export_the_same(full: Done, tmp_path: Path) -> None:
    checkpointer = "checkpointer=torchtune.training.FullModelHFCheckpointer"
    given = ("~checkpointer.model_dir", f"checkpointer.checkpoint_dir={full.base}", "checkpointer.model_type=QWEN2")
    assert recipe("agent_export", "--config", full.config, checkpointer, *given, f"export.output_dir={tmp_path}") == 0
    found, expected = tmp_path / "model" / "step_3", full.out / "model" / "epoch_0"
    assert (found / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def test_an_adapter_is_exported_for_peft_and_merged(lora: Done, tmp_path: Path) -> None:
    given = (f"export.output_dir={tmp_path}", "export.checkpoint=step_3")
    assert recipe("agent_export", "--config", lora.config, *given) == 0
    merged, adapter = tmp_path / "model" / "step_3", tmp_path / "lora_weights" / "step_3"
    for folder in ("model", "lora_weights"):  # while the run went on
        (written,) = (lora.out / folder / "step_3").glob("*.safetensors")
        assert written.read_bytes() == (tmp_path / folder / "step_3" / written.name).read_bytes()

    ours = empty(lora.base)
    add_adapters(ours, AdapterSettings(rank=4, alpha=6))
    base = HFCheckpointer(str(lora.base), str(tmp_path)).load_checkpoint()[training.MODEL_KEY]
    fill(ours, {**base, **stored(lora.out / "checkpoints" / "step_3", tmp_path / "stored.pt")})
    assert not torch.allclose(logits(ours), logits(theirs(lora.base)), atol=1e-2)
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(lora.base)
    assert_close(logits(peft.PeftModel.from_pretrained(theirs(lora.base), adapter).eval()), logits(ours))
    assert_close(logits(theirs(merged)), logits(ours))

    assert (
        recipe("agent_export", "--config", str(CONFIG), *command(lora.base, tmp_path)[2:], f"export.adapter={adapter}")
        == 0
    )
    again = tmp_path / "model" / "step_3_merged"
    assert (again / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()
    assert (again / "README.md").exists()


def test_the_tokenizer_is_the_one_that_was_trained_with(lora: Done) -> None:
    written = {"step_1", "epoch_0", "step_3", "epoch_1"}  # where an epoch ends, its own folder only
    for folder in ("model", "lora_weights"):
        assert {path.name for path in (lora.out / folder).iterdir()} == written
    for name in written:
        assert (lora.out / "model" / name / "added_tokens.json").exists()
        assert (lora.out / "model" / name / "generation_config.json").exists()
    assert not (lora.base / "added_tokens.json").exists()


def test_cards_say_what_was_trained_on_what(lora: Done) -> None:
    front, text = card(lora.out / "model" / "step_3")
    assert front["library_name"] == "transformers" and "base_model" not in front  # a folder is no name on the hub
    assert "agent" in front["tags"]
    of_adapter, same = card(lora.out / "lora_weights" / "step_3")
    assert of_adapter["library_name"] == "peft" and "lora" in of_adapter["tags"]
    assert same.partition("## Training")[2] == text.partition("## Training")[2]
    row = next(row for row in read_rows(lora.out / "logs" / "metrics.jsonl") if row["step"] == 2 and "val_loss" in row)
    for group, name in (("reasoning", "reasoning"), ("tool_call", "tool call"), ("arg_value", "arg value")):
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1:4] == [
            f"{row[f'val_{group}_num_tokens']:,.0f}",
            f"{row[f'val_{group}_nll']:.3f}",
            f"{row[f'val_{group}_perplexity']:.2f}",
        ]
    counts = json.loads((lora.out / "logs" / "counts_dataset.json").read_text())
    for said in (
        "step 2",
        "`agent_sft_distributed`",
        "`4, 6, 0`",
        "LoRA",
        f"{counts['num_tokens']:,} tokens",
        "torch ",
    ):
        assert said in text, said
    assert str(lora.out.parent) not in text and "tokenizer(max_seq_len=512, path=tokenizer)" in text


def test_a_config_cannot_make_a_card_say_more_than_text(tmp_path: Path) -> None:
    """Not markup, not front matter, no secret and no place on this machine."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "original_repo_id.json").write_text('{"repo_id": "owner/model-1"}')
    secret, wild = "hf_" + "a1" * 12, "`x`|<b>\x1b[31m\n---\nlicense: mit\n"
    data = {"_component_": "AgentSFTDataset", "data_files": [f"{tmp_path}/my.jsonl", wild], "format": secret}
    config = {"dataset": [data, {"_component_": "x.Hub", "source": "owner/data"}], "optimizer": {"_component_": wild}}
    config |= {"adapter": {"kind": "dora", "targets": [wild]}}
    said = Trained(Manifest(7, 0, 1, 8, "0", config, {}, recipe=wild), 1234, 567, logs=None)
    for text, relation in ((model_card(said, wild, base), "finetune"), (adapter_card(said, wild, base), "adapter")):
        _, front, rest = text.split("---\n", 2)
        known = yaml.safe_load(front)
        assert known["base_model"] == "owner/model-1" and known["base_model_relation"] == relation
        assert known["datasets"] == ["owner/data"] and "license" not in known
        assert "| tokens | `1,234, of which 567 were trained` |" in rest and "my.jsonl" in rest
        assert not {secret, str(tmp_path), "\x1b"} & {bad for bad in (secret, str(tmp_path), "\x1b") if bad in text}
        assert not any(line.startswith(("---", "license")) for line in rest.splitlines())
        for line in rest.splitlines():
            if "<b>" in line and line.startswith("|"):
                assert line.count("|") == 3 and line.count("`") == 2


def test_a_run_that_goes_on_writes_what_it_owes_and_counts_on(full: Done, tmp_path: Path) -> None:
    out = shutil.copytree(full.out, tmp_path / "out")
    shutil.rmtree(out / "model")
    given = (*command(full.base, out), f"resume_from_checkpoint={out / 'checkpoints' / 'step_2'}")
    assert recipe("agent_sft_distributed", *given) == 0
    for name in ("step_2", "epoch_0"):
        found, expected = (folder / "model" / name for folder in (out, full.out))
        assert load_file(found / "model.safetensors").keys() == load_file(expected / "model.safetensors").keys()
        assert card(found) == card(expected)  # with all tokens since the first step


def test_damaged_checkpoints_are_not_exported(full: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shutil.copytree(full.out, tmp_path / "out")
    (tensors,) = (out / "checkpoints" / "step_3" / "tensors").glob("*.distcp")
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1
    tensors.write_bytes(content)
    given = ("--config", full.config, f"output_dir={out}", f"export.output_dir={tmp_path}")
    assert recipe("agent_export", *given, "export.checkpoint=step_3") == 1
    said = capsys.readouterr().err
    assert f"step_3 is not a good checkpoint: tensors/{tensors.name} has changed" in said and "step_2" in said
    assert not (tmp_path / "model").exists()
    assert recipe("agent_export", *given) == 0
    assert f"warning: {out / 'checkpoints' / 'step_3'}: tensors/" in capsys.readouterr().out
    assert [folder.name for folder in (tmp_path / "model").iterdir()] == ["step_2"]
    (out / "checkpoints" / "step_2" / "manifest.json").unlink()
    assert recipe("agent_export", *given) == 1
    assert "has no good checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export.checkpoints=step_2",), "export.checkpoints: unknown config key. Did you mean 'checkpoint'?"),
        (("export=now",), "export=now: must be a section"),
        (("export.checkpoint=step_7",), "export.checkpoint=step_7: .*there is no such folder. In .*: step_4, step_3"),
        (("output_dir=elsewhere",), "elsewhere/checkpoints has no good checkpoint"),
        (("adapter.alpha=12",), "is of a run with another model\n  adapter.alpha: 6 → 12\n"),
        (("~adapter",), "with another model.*\n  adapter.rank: 4 → not given"),
        (("export.adapter={out}/lora_weights/step_3", "export.checkpoint=step_2"), "Use one of the two"),
        (("export.adapter=nowhere",), "adapter: cannot read nowhere/adapter_config.json"),
        (
            ("export.adapter={out}/lora_weights/step_3", "model_dir={heads}"),
            "attn.[qk]_proj.lora_b.weight' has (24|48) rows",
        ),
        (
            ("export.adapter={out}/lora_weights/step_3", "model_dir={wider}"),
            "for 'layers.0.mlp.w.' it has tensors of .*, and .* fit the base",
        ),
        (
            ("checkpointer=torchtune_agent.training.ScratchCheckpointer", "~checkpointer.model_dir"),
            "no folder with a config",
        ),
        (("export_every_n_steps=0",), "export_every_n_steps=0: must be at least 1"),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...], message: str, lora: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = {"{heads}": {"hidden_size": 96}, "{wider}": {"intermediate_size": 96}}
    for name in others.keys() & {argument.partition("=")[2] for argument in arguments}:
        save_random(tmp_path / name[1:-1], CASES["llama"][0], {**CASES["llama"][1], **CHANGES, **others[name]})
    places = {"out": lora.out, "heads": tmp_path / "heads", "wider": tmp_path / "wider"}
    given = [argument.format(**places) for argument in arguments]
    config = yaml.safe_load(Path(lora.config).read_text())
    config["checkpointer"] |= {"model_dir": "${model_dir}", "output_dir": str(tmp_path / "model")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert recipe("agent_export", "--config", str(tmp_path / "config.yaml"), *given) == 1
    said = capsys.readouterr().err
    assert re.search(message, said, re.S), said
    assert not (tmp_path / "model").exists()
