"""`tune run agent_data_check` as users run it: what it prints, the page it writes, how it ends."""

import json
import os
import pty
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import tune
from torchtune_agent._tune import config_path, recipe_path

SHARED = Path(__file__).parents[3] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs the real templates and data in ../shared")

CALL = "<function=add>\n<parameter=a>\n1\n</parameter>\n</function>"
RECORD = {
    "messages": [
        {"role": "user", "content": "Add 1, \x1b[31mplease"},
        {"role": "assistant", "content": f"I add.\n{CALL}"},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "It is 1."},
    ]
}

Check = Callable[..., tuple[int, str, str]]


def data_file(folder: Path, num_good: int, num_bad: int) -> Path:
    path = folder / "data.jsonl"
    bad = ["{broken", json.dumps({"messages": [{"role": "user", "content": "<b>hi"}]})] * num_bad
    path.write_text("\n".join([json.dumps(RECORD)] * num_good + bad[:num_bad]) + "\n")
    return path


def from_file(path: Path) -> tuple[str, ...]:
    return (*tune.FROM_FILE, f"dataset.data_files={path}", "dataset_val.num_tasks=4", "dataset_val.num_tools=40")


def page(output: Path) -> dict[str, Any]:
    """What the page was given."""
    text = (output / "data_check.html").read_text()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(data)


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    """The recipe in this process, without colours: (exit code, stdout, stderr). It writes to tmp_path / "out"."""

    def run(*overrides: str, config: Path | None = None) -> tuple[int, str, str]:
        arguments = ["--config", str(config or config_path("tiny/agent_sft")), f"output_dir={tmp_path / 'out'}"]
        monkeypatch.setattr(sys, "argv", [str(recipe_path("agent_data_check")), *arguments, *overrides])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(sys.argv[0], run_name="__main__")
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int) and "Traceback" not in said.err
        return ended.value.code, said.out, said.err

    return run


def on_a_terminal(*command: str, cwd: Path) -> tuple[int, str]:
    """Run a program whose standard output is a terminal."""
    leader, follower = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    env.pop("NO_COLOR", None)
    process = subprocess.Popen(command, cwd=cwd, env=env, stdout=follower, stderr=subprocess.DEVNULL)
    os.close(follower)
    written = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # the other end was closed
            break
        written += piece
    os.close(leader)
    return process.wait(), written.decode().replace("\r\n", "\n")


def test_a_training_config_is_checked_without_its_model(tmp_path: Path) -> None:
    """Everything but data, tokenizer and output folder may be out of this machine's reach."""
    unreachable = ("model._component_=no.such.model", "optimizer._component_=no.such.optimizer", "device=cuda")
    overrides = (*tune.SMALL, *unreachable, f"output_dir={tmp_path / 'out'}", "check.num_samples=2")
    code, shown = on_a_terminal(
        str(tune.TUNE), "run", "agent_data_check", "--config", "tiny/agent_sft", *overrides, cwd=tmp_path
    )
    plain = re.sub(r"\x1b\[[\d;]+m", "", shown)
    assert code == 0 and plain != shown and "\x1b" not in plain
    assert re.search(r"^dataset +24 conversations", plain, re.M) and re.search(r"^dataset_val +8 conv", plain, re.M)
    assert plain.count("✓") == 8 and "!" not in re.findall(r"^ {14}(.)", plain, re.M)
    for row in ("lengths", "tokens", "tools", "dataset, sample 0", "dataset, sample 1"):
        assert re.search(rf"^{row}", plain, re.M), plain
    assert str(tmp_path / "out" / "data_check.html") in plain
    parts = page(tmp_path / "out")["parts"]
    assert [(part["key"], part["numSamples"], len(part["samples"])) for part in parts] == [
        ("dataset", 24, 24),
        ("dataset_val", 8, 8),
    ]
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.distributed
def test_refused_data_is_shown_all_the_same_and_once(tmp_path: Path) -> None:
    path = data_file(tmp_path, num_good=8, num_bad=2)
    command = ["run", "--nproc_per_node", "2", "agent_data_check", "--config", "tiny/agent_sft"]
    overrides = (f"output_dir={tmp_path / 'out'}", *from_file(path), "check.parity_samples=0")
    # A screen that cannot show all characters is no reason to fail.
    result = tune.run(*command, *overrides, cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "data.jsonl:9: broken_json" in said[0] and "1 of 10 records" in said[0]
    assert "Traceback" not in result.stderr
    assert len(re.findall(r"^dataset +8 conv", result.stdout, re.M)) == 1 and "training stops" in result.stdout
    part = page(tmp_path / "out")["parts"][0]
    assert part["numSamples"] == 8 and [row[1] for row in part["leftOut"]] == ["broken_json", "nothing_to_train"]
    assert "max_bad_fraction" in part["refusal"]
    listed = (tmp_path / "out" / "logs" / "quarantine_dataset.jsonl").read_text().splitlines()
    assert [json.loads(line)["where"] for line in listed] == [f"{path}:9", f"{path}:10"]


def test_a_few_bad_records_are_listed_and_fine(tmp_path: Path, check: Check) -> None:
    overrides = from_file(data_file(tmp_path, 8, 2))
    code, out, err = check(*overrides, "dataset.max_bad_fraction=0.5")
    assert code == 0 and "error" not in err
    assert "8 conversations" in out and "data.jsonl:9: broken_json" in out and "quarantine_dataset.jsonl" in out
    assert "· 2 of 10 records are left out: 1 broken_json, 1 nothing_to_train\n" in out
    assert "calls of 1 different tools: 8" in out and r"\x1b[31mplease" in out and "\x1b" not in out
    assert page(tmp_path / "out")["parts"][0]["refusal"] is None


def test_no_sample_at_all_is_refused(tmp_path: Path, check: Check) -> None:
    code, out, err = check(*from_file(data_file(tmp_path, 8, 0)), "tokenizer.max_seq_len=4")
    assert code == 1 and "dataset: no conversation with a token to train" in err
    assert "8 of 8 records left out: too_long" in out and page(tmp_path / "out")["parts"][0]["numSamples"] == 0


def test_lists_of_datasets_and_those_of_torchtune(tmp_path: Path, check: Check) -> None:
    plain = {"messages": [{"role": "user", "content": "Say hi"}, {"role": "assistant", "content": "hi there, friend"}]}
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(plain) for _ in range(8)))
    chat = {"_component_": "torchtune.datasets.chat_dataset", "source": "json", "conversation_column": "messages"}
    chat |= {"conversation_style": "openai", "data_files": str(tmp_path / "data.jsonl"), "split": "train"}
    toolworld = {"_component_": "torchtune_agent.data.toolworld_dataset", "num_tasks": 4}
    cfg = yaml.safe_load(config_path("tiny/agent_sft").read_text()) | {
        "dataset": [chat, toolworld],
        "dataset_val": chat,
    }
    (tmp_path / "mixed.yaml").write_text(yaml.safe_dump(cfg))
    code, out, _ = check(config=tmp_path / "mixed.yaml")
    assert code == 0
    assert re.search(r"dataset\[0\] +8 .*\n +dataset\[1\] +4 ", out) and out.count("not every dataset tells") == 2
    assert re.search(r"^dataset_val +8 samples", out, re.M)
    assert out.count("end of turn trained in 8 of 8 turns: <|im_end|> (id 2)") == 1  # of dataset_val, by its stop token
    assert [part["numSamples"] for part in page(tmp_path / "out")["parts"]] == [12, 8]


def test_samples_are_chosen_by_index(tmp_path: Path, check: Check) -> None:
    options = ("check.sample=7", "check.num_samples=2", "check.html=False", "check.parity_samples=0")
    code, out, _ = check(*tune.SMALL, *options)
    assert code == 0 and re.findall(r"^dataset, sample (\d+)", out, re.M) == ["7", "8"]
    assert "check.parity_samples is 0" in out and not (tmp_path / "out" / "data_check.html").exists()


MISTAKES = {
    "unknown option": (("check.num_sample=1",), "check.num_sample: unknown config key. Did you mean 'num_samples'?"),
    "unknown key": (("bacth_size=1",), "bacth_size: unknown config key"),
    "not a number": (("check.num_samples=many",), "check.num_samples='many'"),
    "below zero": (("check.parity_samples=-1",), "check.parity_samples=-1"),
    "no section": (("check=3",), "check=3: must be a section"),
    "no such sample": ((*tune.SMALL, "check.sample=24"), "check.sample=24: the last sample is 23"),
    "no data": (("dataset=null",), "dataset: no '_component_' given"),
    "no such file": (from_file(Path("nowhere.jsonl")), "no file 'nowhere.jsonl'"),
    "output folder": (("output_dir=/dev/null/x",), "output_dir=/dev/null/x: cannot be made"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_said(case: str, check: Check) -> None:
    overrides, message = MISTAKES[case]
    code, _, err = check(*overrides)
    assert code == 1 and f"error: {message}" in err or message in err.split("error: ")[1]


NUM_REAL = 60


def real_config(folder: Path, template: str | None, **options: Any) -> Path:
    """A config with a real model's tokenizer, real data, and one of the real templates."""
    model = folder / "model"
    model.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model / file).symlink_to(SHARED / "models" / "qwen2_5" / file)
    if template:
        (model / "chat_template.jinja").symlink_to(SHARED / "chat_templates" / template)
    cfg = yaml.safe_load(config_path("qwen2_5/0.5B_agent_sft").read_text())
    cfg["tokenizer"] |= {"path": str(model), **options}
    records = json.loads((SHARED / "data/llamafactory/data/glaive_toolcall_en_demo.json").read_text())[:NUM_REAL]
    (folder / "data.json").write_text(json.dumps(records))
    cfg["dataset"]["data_files"] = str(folder / "data.json")
    (folder / "real.yaml").write_text(yaml.safe_dump(cfg))
    return folder / "real.yaml"


@needs_shared
def test_a_real_template_has_the_tokens_of_transformers(tmp_path: Path, check: Check) -> None:
    pytest.importorskip("transformers")
    code, out, _ = check("check.parity_samples=100", config=real_config(tmp_path, None))
    assert code == 0 and re.search(r"✓ template parity with transformers [\d.]+: 60 of 60 conversations", out)
    assert "end of turn trained in" in out and "<|im_end|> (id 151645)" in out


@needs_shared
def test_the_first_difference_of_a_real_template_is_shown(tmp_path: Path, check: Check) -> None:
    """Llama's writes the day. Pinned for training, it is another one where the model is served."""
    pytest.importorskip("transformers")
    template = "meta-llama-Llama-3.2-3B-Instruct.jinja"
    code, out, _ = check(config=real_config(tmp_path, template, date="2020-01-31"))
    assert code == 0 and "50 of 50 conversations differ" in out
    assert re.search(r"first difference is at token \d+\n +both +….*Today Date: ", out)
    assert re.search(r"\n +ours +31 Jan 2020", out) and re.search(r"\n +theirs +\d\d \w\w\w 20[2-9]\d", out)
    assert len(page(tmp_path / "out")["parts"][0]["divergences"]) == 50
    # A Qwen tokenizer does not have Llama's control tokens, so the end of every turn is several ordinary ones.
    assert "turns end in plain text, not in a control token" in out and "<|eot_id|>" in out
