"""The recipe as users run it: the real `tune`, real processes, real loggers read back by their own readers."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from tests import tune, wandb_file
from tests.browser import Browser
from torchtune_agent._tune import config_path
from torchtune_agent.metrics import read_rows
from torchtune_agent.toolworld import ToolWorld

SPEC_METRICS = [
    f"{split}_{group}{metric}"
    for split in ("train", "val")
    for group in ("", "reasoning_", "tool_call_")
    for metric in ("entropy", "perplexity", "top1_prob", "top2_prob", "top5_prob", "top10_prob")
]


def rows_by_name(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    names: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "time"):
                names.setdefault(name, []).append((row["step"], value))
    return names


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run on two ranks with TensorBoard, from a folder that is not the checkout: (output folder, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("two_ranks")
    more = ["gradient_accumulation_steps=2", "log_peak_memory_stats=True"]
    result = tune.train(*tune.SMALL, *more, "log_by=[tool,source]", "log_sample_losses=True", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "out", result.stdout, result.stderr


@pytest.mark.distributed
def test_every_metric_of_the_spec_is_logged(two_ranks: tuple[Path, str, str]) -> None:
    logged = rows_by_name(read_rows(two_ranks[0] / "logs" / "metrics.jsonl"))
    missing = [name for name in [*SPEC_METRICS, "loss", "val_loss", "lr", "grad_norm"] if name not in logged]
    assert missing == []
    assert all(math.isfinite(value) for points in logged.values() for _, value in points)


@pytest.mark.distributed
def test_detailed_metrics_come_at_their_interval(two_ranks: tuple[Path, str, str]) -> None:
    logged = rows_by_name(read_rows(two_ranks[0] / "logs" / "metrics.jsonl"))
    assert [step for step, _ in logged["loss"]] == [1, 2, 3]  # 24 conversations, 8 a step
    assert [step for step, _ in logged["train_tool_call_entropy"]] == [1, 2]  # the first, and every second
    assert [step for step, _ in logged["val_loss"]] == [3]  # at the end of the epoch


@pytest.mark.distributed
def test_tensorboard_holds_every_row(two_ranks: tuple[Path, str, str]) -> None:
    (events,) = (two_ranks[0] / "logs").glob("run_0_*")
    reader = EventAccumulator(str(events)).Reload()
    for name, points in rows_by_name(read_rows(two_ranks[0] / "logs" / "metrics.jsonl")).items():
        read = [(event.step, float(make_ndarray(event.tensor_proto))) for event in reader.Tensors(name)]
        assert [step for step, _ in read] == [step for step, _ in points]
        assert [value for _, value in read] == pytest.approx([value for _, value in points], rel=1e-6)
    assert len(reader.Tensors("custom_scalars__config__")) == 1  # the classes in one chart


@pytest.mark.distributed
def test_losses_of_every_sample_class_and_step_are_kept(two_ranks: tuple[Path, str, str]) -> None:
    lines = parquet.read_table(two_ranks[0] / "logs" / "sample_losses").to_pylist()
    assert {line["sample"] for line in lines} == {f"record[{i}]" for i in range(24)}  # each is trained once
    assert len({(line["sample"], line["step"]) for line in lines}) == 24
    logged = rows_by_name(read_rows(two_ranks[0] / "logs" / "metrics.jsonl"))
    for step, loss in logged["loss"]:  # of all classes together, the ends of turns too
        own = [(line["tokens"], line["loss"]) for line in lines if line["step"] == step]
        assert sum(n * nll for n, nll in own) / sum(n for n, _ in own) == pytest.approx(loss, rel=1e-5)
    for step, nll in logged["train_tool_call_nll"]:
        names = ("call_syntax", "call_name", "arg_name", "arg_value")
        own = [(x["tokens"], x["loss"]) for x in lines if x["step"] == step and x["token_class"] in names]
        assert sum(n * nll for n, nll in own) / sum(n for n, _ in own) == pytest.approx(nll, rel=1e-5)


@pytest.mark.distributed
def test_tools_and_sources_are_told_apart(two_ranks: tuple[Path, str, str]) -> None:
    logs, stdout, _ = two_ranks[0] / "logs", *two_ranks[1:]
    logged = rows_by_name(read_rows(logs / "metrics.jsonl"))
    tools = [json.loads(line) for line in (logs / "by_tool.jsonl").read_text().splitlines()]
    validated = [row for row in tools if row["split"] == "val"]
    assert 0 < len(validated) <= 20 and validated == sorted(validated, key=lambda row: (-row["calls"], row["tool"]))
    assert all(row["loss"] > 0 and 0 <= row["exact"] <= row["name_exact"] <= 1 for row in tools)
    (source,) = [json.loads(x) for x in (logs / "by_source.jsonl").read_text().splitlines() if '"val"' in x]
    assert source["calls"] == logged["val_tool_call_num_calls"][-1][1]
    assert source["loss"] == pytest.approx(logged["val_nll"][-1][1], rel=1e-6)
    assert source["exact"] == pytest.approx(logged["val_tool_call_exact"][-1][1])
    assert "Validation by tool, step 3" in stdout and validated[0]["tool"] in stdout
    assert validated[0]["tool"] in (logs / "report.html").read_text()


@pytest.mark.distributed
def test_the_report_shows_every_class(two_ranks: tuple[Path, str, str], browser: Browser) -> None:
    with browser.open(two_ranks[0] / "logs" / "report.html") as page:
        lines = "[...document.querySelectorAll('figure[data-metric=\"nll\"] path.line')]"
        drawn = page.js(f"{lines}.map(line => line.dataset.class + ' ' + line.dataset.split)")
        classes = ["overall", "reasoning", "tool_call", "call_syntax", "call_name", "arg_name", "arg_value", "stop"]
        assert drawn == [f"{name} {split}" for split in ("train", "val") for name in classes]
        assert page.errors == [] and page.requests == []


@pytest.mark.distributed
def test_the_screen_ends_with_a_table_of_classes_and_where_things_are(two_ranks: tuple[Path, str, str]) -> None:
    output, stdout, stderr = two_ranks
    for row in ("overall", "reasoning", "tool call", "call syntax", "call name", "arg name", "arg value"):
        assert re.search(rf"^ *{row} +[\d,]+ +\d+\.\d+ → \d+\.\d+", stdout, re.M), stdout
    for path in (
        "logs/metrics.jsonl",
        "logs/config.yaml",
        "logs/report.html",
        "logs/metrics.png",
        "model",
        "checkpoints",
    ):
        assert str(output / path) in stdout
        assert (output / path).exists()
    bar = (
        r"100%\|█+\| 3/3 \[\d+:\d+<00:00, loss [\d.]+, reasoning ppl [\d.]+, tool calls ppl [\d.]+, tokens/s [\d.]+k?\]"
    )
    assert re.search(bar, stderr)
    assert stderr.count("conversations (") == 2  # training and validation data, said by one rank only


@pytest.mark.distributed
def test_call_syntax_becomes_certain_before_argument_values_do(tmp_path: Path) -> None:
    """The story the quickstart tells, at a sixth of its length."""
    result = tune.train("max_steps_per_epoch=25", "dataset.num_tasks=200", "dataset_val.num_tasks=16", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    last = read_rows(tmp_path / "out" / "logs" / "metrics.jsonl")[-1]
    assert last["val_call_syntax_exact_entropy"] < last["val_arg_value_exact_entropy"]
    assert last["val_call_syntax_perplexity"] < last["val_arg_value_perplexity"] / 10
    assert last["val_call_syntax_accuracy"] > last["val_arg_value_accuracy"] + 0.3


@pytest.mark.distributed
def test_a_checkpoint_is_written(two_ranks: tuple[Path, str, str]) -> None:
    weights = load_file(two_ranks[0] / "model" / "epoch_0" / "model.safetensors")
    assert weights["tok_embeddings.weight"].shape == (2048, 32)
    assert weights["layers.0.attn.q_proj.weight"].abs().sum() > 0


def test_wandb_offline_holds_every_row_and_no_secret(tmp_path: Path) -> None:
    secret = "0123456789abcdef0123456789abcdef01234567"
    result = tune.train(
        *tune.SMALL,
        "metric_logger=torchtune.training.metric_logging.WandBLogger",
        "metric_logger.project=test",
        "metric_logger.mode=offline",
        f"metric_logger.log_dir={tmp_path / 'wandb_logs'}",
        "metric_names=slash",
        cwd=tmp_path,
        processes=1,
        env={"WANDB_API_KEY": secret, "WANDB_SILENT": "true"},
    )
    assert result.returncode == 0, result.stderr
    (run_file,) = tmp_path.glob("wandb_logs/wandb/offline-run-*/run-*.wandb")
    expected = read_rows(tmp_path / "out" / "logs" / "metrics.jsonl")
    history = list(wandb_file.history(run_file))
    assert len(history) == len(expected)
    for row, read in zip(expected, history, strict=True):
        assert read["global_step"] == row["step"]
        for name in row.keys() - {"step", "time"}:
            assert read[name] == pytest.approx(row[name])
    assert any("val/tool_call/top5_prob" in row for row in expected)
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert not [p for p in written if secret.encode() in p.read_bytes()]


LOGGER = '''
class Broken:
    """A metric logger that fails at the second row."""

    def __init__(self, api_key: str) -> None:
        self.rows = 0

    def log_config(self, config) -> None:
        assert config.metric_logger.api_key == "***"

    def log_dict(self, payload, step) -> None:
        self.rows += 1
        if self.rows == 2:
            raise ConnectionError("the service is down")

    def close(self) -> None:
        raise AssertionError("a logger that failed must be left alone")
'''


def test_a_logger_that_raises_is_reported_once_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "broken_logger.py").write_text(LOGGER)
    result = tune.train(
        *tune.SMALL,
        "metric_logger=broken_logger.Broken",
        "trusted_components=[broken_logger]",
        "~metric_logger.log_dir",
        "metric_logger.api_key=hunter2-hunter2",
        cwd=tmp_path,
        processes=1,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("warning: ") == 1
    assert "Broken.log_dict raised ConnectionError: the service is down" in result.stderr
    assert len(rows_by_name(read_rows(tmp_path / "out" / "logs" / "metrics.jsonl"))["loss"]) == 12
    assert "hunter2" not in (tmp_path / "out" / "logs" / "config.yaml").read_text()


@pytest.mark.distributed
def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path: Path) -> None:
    common = (*tune.SMALL, "epochs=2", "save_every_n_steps=4", "resume_from_checkpoint=auto")
    whole = tune.train(*common, cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "out"
    weights = out / "model" / "epoch_1" / "model.safetensors"
    expected, losses = load_file(weights), rows_by_name(read_rows(out / "logs" / "metrics.jsonl"))["loss"]
    weights.unlink()
    shutil.rmtree(out / "checkpoints" / "step_12")  # as if it had been killed before
    again = tune.train(*common, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "step_8, after 1 whole epochs" in again.stderr
    resumed = load_file(weights)
    assert all(resumed[name].equal(expected[name]) for name in expected)
    assert rows_by_name(read_rows(out / "logs" / "metrics.jsonl"))["loss"] == losses


@pytest.mark.distributed
def test_tensor_parallel_ranks_train_as_one(tmp_path: Path) -> None:
    losses = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        split = ("tensor_parallel_plan._component_=torchtune.models.llama3.base_llama_tp_plan",)
        result = tune.train(
            *tune.SMALL,
            *(split if processes == 2 else ()),
            f"tensor_parallel_dim={processes}",
            "model.tie_word_embeddings=False",
            cwd=folder,
            processes=processes,
        )
        assert result.returncode == 0, result.stderr
        logged = rows_by_name(read_rows(folder / "out" / "logs" / "metrics.jsonl"))["loss"]
        losses.append([loss for _, loss in logged])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_bf16_with_selective_checkpointing_learns(tmp_path: Path) -> None:
    options = ("compile=True", "dtype=bf16", "ac_mode=selective", "ac_option=1", "optimizer.lr=1e-2")
    result = tune.train(*tune.SMALL, *options, cwd=tmp_path, processes=1)
    assert result.returncode == 0, result.stderr
    losses = [loss for _, loss in rows_by_name(read_rows(tmp_path / "out" / "logs" / "metrics.jsonl"))["loss"]]
    assert losses[-1] < losses[0] - 0.5


def test_class_weights_choose_what_is_learned(tmp_path: Path) -> None:
    """With no weight on anything but call syntax, that is all a run can be learning."""
    classes = ("special", "reasoning", "call_name", "arg_name", "arg_value")
    weights = "{" + ", ".join(f"{name}: 0.0" for name in classes) + "}"
    config = tmp_path / "weighted.yaml"
    text = config_path("tiny/agent_sft").read_text()
    data = "_component_: torchtune_agent.data.AgentSFTDataset\n  data_files: data.jsonl"
    text = re.sub(r"(?<=\ndataset:\n  ).*?(?=\ndataset_val)", f"{data}\n  class_weights: {weights}", text, flags=re.S)
    config.write_text(text)
    records = ToolWorld(num_tools=20).conversations("train", 8)
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    small = [override for override in tune.SMALL if not override.startswith("dataset.")]
    result = tune.train(*small, cwd=tmp_path, processes=1, config=str(config))
    assert result.returncode == 0, result.stderr
    logged = rows_by_name(read_rows(tmp_path / "out" / "logs" / "metrics.jsonl"))
    assert "train_call_syntax_nll" in logged and "train_reasoning_nll" not in logged
    assert logged["train_call_syntax_nll"][0][1] == pytest.approx(logged["loss"][0][1], rel=1e-5)


@pytest.mark.parametrize("key", ["enable_token_classification", "dataset.enable_token_classification"])
def test_without_classification_training_and_overall_metrics_go_on(key: str, tmp_path: Path) -> None:
    result = tune.train(*tune.SMALL, f"{key}=False", cwd=tmp_path, processes=1)
    assert result.returncode == 0, result.stderr
    logged = rows_by_name(read_rows(tmp_path / "out" / "logs" / "metrics.jsonl"))
    assert "train_top5_prob" in logged and "val_entropy" in logged
    assert not [name for name in logged if "reasoning" in name or "tool_call" in name]


def test_datasets_of_torchtune_and_lists_of_datasets_work(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    record = {"messages": [{"role": "user", "content": "Say hi"}, {"role": "assistant", "content": "hi there, friend"}]}
    data.write_text("\n".join(json.dumps(record) for _ in range(8)))
    chat = (
        "{_component_: torchtune.datasets.chat_dataset, source: json, conversation_column: messages, "
        f"conversation_style: openai, data_files: {data}, split: train, packed: True}}"
    )
    ours = "{_component_: torchtune_agent.data.toolworld_dataset, num_tasks: 8, packed: True}"
    config = tmp_path / "mixed.yaml"
    lines = config_path("tiny/agent_sft").read_text().splitlines()
    start = lines.index("dataset:")
    lines[start : start + 5] = ["dataset:", f"  - {chat}", f"  - {ours}"]
    config.write_text("\n".join(lines))
    small = [override for override in tune.SMALL if not override.startswith("dataset.")]
    result = tune.train(*small, cwd=tmp_path, processes=1, config=str(config))
    assert result.returncode == 0, result.stderr
    assert "metrics are overall only" in result.stderr
    assert math.isfinite(rows_by_name(read_rows(tmp_path / "out" / "logs" / "metrics.jsonl"))["loss"][-1][1])
