"""What a user gets wrong is said once, in words that help, before the first step, and the exit code is not zero."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tune
from torchtune_agent._tune import config_path, recipe_path

RECORD = {
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, I am here to help."}]
}


def lines(*records: object) -> str:
    return "\n".join(json.dumps(record) for record in records) + "\n"


# name: (content of data.jsonl or None, overrides, what the message must say)
FILES: dict[str, tuple[str | None, tuple[str, ...], tuple[str, ...]]] = {
    "missing file": (None, (), ("dataset.data_files", "no file", "data.jsonl")),
    "empty file": ("", (), ("data.jsonl has no records",)),
    "not JSON": (lines(RECORD) + "user: hi\n", (), ("data.jsonl:2", "broken_json", "1 of 2 records")),
    "no messages": (
        lines(RECORD, {"text": "hi"}),
        (),
        ("data.jsonl:2", "unknown_format", "no format has these keys: text"),
    ),
    "null content": (
        lines({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}]}),
        (),
        ("data.jsonl:1", "empty_turn", "messages[1]"),
    ),
    "fewer conversations than a step": (
        lines(*[RECORD] * 3),
        (),
        ("3 sequences", "batch_size 4", "data-parallel ranks"),
    ),
    "longer than the model": (
        lines(*[{"messages": [{"role": "user", "content": "word " * 2000}, RECORD["messages"][1]]}] * 8),
        ("tokenizer.max_seq_len=null",),
        ("longest conversation has", "the model takes 1024", "tokenizer.max_seq_len=1024"),
    ),
}

SETTINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "limit above the model's": (
        ("tokenizer.max_seq_len=4096",),
        ("tokenizer.max_seq_len=4096", "at most 1024", "Set tokenizer.max_seq_len=1024"),
    ),
    "tokenizer larger than the embedding": (("model.vocab_size=300",), ("the model's embedding has 300 rows",)),
    "world size not divisible": (
        (
            "tensor_parallel_dim=3",
            "tensor_parallel_plan._component_=torchtune.models.llama3.base_llama_tp_plan",
        ),
        ("tensor_parallel_dim=3", "does not divide", "--nproc_per_node"),
    ),
    "output folder cannot be made": (("output_dir=/dev/null/runs",), ("output_dir=/dev/null/runs", "cannot be made")),
    "unknown key": (("gradient_acumulation_steps=2",), ("unknown config key", "'gradient_accumulation_steps'")),
    "unknown option": (("optimizer.learning_rate=1",), ("optimizer.learning_rate", "torch.optim.AdamW")),
    "not a number": (("batch_size=many",), ("batch_size='many'", "integer")),
    "GPU feature on a CPU": (("fsdp_cpu_offload=True",), ("fsdp_cpu_offload=True", "device=cuda")),
    "clipping in backward": (("optimizer_in_bwd=True",), ("clip_grad_norm", "optimizer_in_bwd=True")),
}


def assert_said_once(code: int, stderr: str, phrases: tuple[str, ...]) -> None:
    said = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code != 0
    assert len(said) == 1, stderr
    for phrase in phrases:
        assert phrase in said[0]
    assert "Traceback" not in stderr
    assert "step/s" not in stderr  # the bar of the first step never appeared


def file_overrides(case: str, folder: Path) -> tuple[str, ...]:
    content, overrides, _ = FILES[case]
    data = folder / "data.jsonl"
    if content is not None:
        data.write_text(content, encoding="utf-8")
    return (*tune.FROM_FILE, f"dataset.data_files={data}", *overrides)


RunRecipe = Callable[..., tuple[int, str]]


@pytest.fixture
def run_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunRecipe:
    """Runs the recipe in this process; gives its exit code and what it wrote to stderr."""

    def run(*overrides: str) -> tuple[int, str]:
        output = f"output_dir={tmp_path / 'out'}"
        arguments = ["--config", str(config_path("tiny/agent_sft")), output, *overrides]
        monkeypatch.setattr(sys, "argv", [str(recipe_path("agent_sft_distributed")), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(sys.argv[0], run_name="__main__")
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


@pytest.mark.parametrize("case", FILES)
def test_bad_file_is_refused_before_the_first_step(case: str, tmp_path: Path, run_recipe: RunRecipe) -> None:
    code, stderr = run_recipe(*file_overrides(case, tmp_path))
    assert_said_once(code, stderr, FILES[case][2])


@pytest.mark.parametrize("case", SETTINGS)
def test_bad_setting_is_refused_before_the_first_step(case: str, run_recipe: RunRecipe) -> None:
    overrides, phrases = SETTINGS[case]
    code, stderr = run_recipe(*tune.SMALL, *overrides)
    assert_said_once(code, stderr, phrases)


@pytest.mark.distributed
def test_two_ranks_say_a_bad_file_once(tmp_path: Path) -> None:
    result = tune.train(*file_overrides("not JSON", tmp_path), cwd=tmp_path)
    assert_said_once(result.returncode, result.stderr, FILES["not JSON"][2])


@pytest.mark.distributed
def test_two_ranks_say_a_bad_setting_once(tmp_path: Path) -> None:
    overrides, phrases = SETTINGS["world size not divisible"]
    result = tune.train(*tune.SMALL, *overrides, cwd=tmp_path)
    assert_said_once(result.returncode, result.stderr, phrases)
