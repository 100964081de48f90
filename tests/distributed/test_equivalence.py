"""The real recipe, on one and two processes, against the plainest training loop there is.

Every run trains the same conversations in the same order from the same weights, cut differently: into micro-batches,
ranks, packs, shards. Losses, weights and metrics must not tell.
"""

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from torchtune.models.qwen2 import qwen2

from tests import reference, tokenizers
from torchtune_agent.data import AgentSFTDataset, TokenClass
from torchtune_agent.data.packing import pack
from torchtune_agent.metrics import read_rows
from torchtune_agent.training import ScratchCheckpointer

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "agent_sft_distributed.py"
MODEL = {
    "vocab_size": 384,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "intermediate_dim": 64,
    "max_seq_len": 256,
}
LEARNING_RATE, WEIGHT_DECAY, MAX_NORM = 3e-3, 0.1, 0.5
NUM_TRAIN, NUM_VAL, PER_STEP, PACK_TO = 157, 13, 8, 200  # 19 whole steps and one of 5 conversations
TOLERANCE = 1e-5
# A shift of all keys hardly changes attention, so a key bias has a gradient of rounding noise, which Adam blows up:
# the plain loop in fp32 is itself 6e-5 away from the plain loop in fp64 there, and below 2e-6 everywhere else.
TOLERANCE_OF_KEY_BIASES = 5e-4

# name: (processes, overrides). A tied model has no `output`; untied, its two big matrices are sharded on their own.
RUNS: dict[str, tuple[int, list[str]]] = {
    "one rank": (1, ["batch_size=8"]),
    "two ranks": (
        2,
        ["batch_size=2", "gradient_accumulation_steps=2", "batch_size_val=2", "log_detailed_metrics_every_n_steps=1"],
    ),
    "eight micro-batches": (
        1,
        ["batch_size=1", "gradient_accumulation_steps=8", "enable_activation_checkpointing=True"],
    ),
    "optimizer in backward": (2, ["batch_size=4", "optimizer_in_bwd=True"]),
    "packed": (1, ["batch_size=2", "gradient_accumulation_steps=2", "dataset.packed=True", "dataset_val.packed=True"]),
    "untied, sharded, clipped": (
        2,
        [
            "batch_size=4",
            "model.tie_word_embeddings=False",
            "custom_sharded_layers=[tok_embeddings,output]",
            f"clip_grad_norm={MAX_NORM}",
        ],
    ),
}
TRUTH_OF = {
    "one rank": "plain",
    "two ranks": "plain",
    "eight micro-batches": "plain",
    "optimizer in backward": "plain",
    "packed": "packed",
    "untied, sharded, clipped": "untied and clipped",
}


def conversation(rng: random.Random) -> dict:
    """A few to many tokens, some of them calls."""
    a, b = rng.randrange(100), rng.randrange(100)
    question = f"What is {a} + {b}? " + "Zoë 東京 " * rng.randrange(4)
    call = f"<function=add>\n<parameter=a>\n{a}\n</parameter>\n<parameter=b>\n{b}\n</parameter>\n</function>"
    thought = "I add the numbers. " * rng.randrange(1, 4)
    messages = [("user", question)]
    if rng.random() < 0.6:
        messages += [("assistant", thought + call), ("tool", str(a + b))]
    messages.append(("assistant", f"It is {a + b}." + " ok 👩‍🚀" * rng.randrange(3)))
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


@dataclass
class Result:
    losses: list[float]
    rows: list[dict[str, float]]
    weights: dict[str, torch.Tensor]


def write_data(folder: Path) -> None:
    rng = random.Random(0)
    for name, number in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        lines = [json.dumps(conversation(rng), ensure_ascii=False) for _ in range(number)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "tokenizer").mkdir()
    tokenizers.chat_template(folder / "tokenizer")


def write_config(folder: Path) -> None:
    dataset = "torchtune_agent.data.AgentSFTDataset"
    tokenizer = "torchtune_agent.data.chat_template_tokenizer"
    config = {
        "output_dir": "???",
        "seed": 0,
        "device": "cpu",
        "dtype": "fp32",
        "shuffle": False,
        "model": {"_component_": "torchtune.models.qwen2.qwen2", **MODEL, "tie_word_embeddings": True},
        "tokenizer": {"_component_": tokenizer, "path": str(folder / "tokenizer"), "max_seq_len": PACK_TO},
        "checkpointer": {
            "_component_": "torchtune_agent.training.ScratchCheckpointer",
            "output_dir": "${output_dir}/model",
        },
        "dataset": {"_component_": dataset, "data_files": str(folder / "train.jsonl")},
        "dataset_val": {"_component_": dataset, "data_files": str(folder / "val.jsonl")},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def launch(folder: Path, name: str) -> Result:
    processes, overrides = RUNS[name]
    output = folder / name.replace(",", "").replace(" ", "_")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(RECIPE)]
    command += ["--config", str(folder / "config.yaml"), f"output_dir={output}", *overrides]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_rows(output / "logs" / "metrics.jsonl")
    weights = load_file(output / "model" / "epoch_0" / "model.safetensors")
    return Result([row["loss"] for row in rows if "loss" in row], rows, weights)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("equivalence")
    write_data(folder)
    write_config(folder)
    return folder


@pytest.fixture(scope="module")
def results(folder) -> Iterator[Callable[[str], Result]]:
    """Every run, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        futures: dict[str, Future[Result]] = {name: pool.submit(launch, folder, name) for name in RUNS}
        yield lambda name: futures[name].result()
        for future in futures.values():
            future.cancel()


def samples(folder: Path, name: str) -> list[dict]:
    tokenizer = tokenizers.ChatTemplateTokenizer(folder / "tokenizer", max_seq_len=PACK_TO)
    dataset = AgentSFTDataset(tokenizer, data_files=str(folder / f"{name}.jsonl"))
    return [dataset[i] for i in range(len(dataset))]


def in_steps(conversations: list, per_step: int) -> list[list]:
    return [conversations[i : i + per_step] for i in range(0, len(conversations), per_step)]


def pairs(steps: list[list[dict]]) -> list[list[reference.Conversation]]:
    return [[(one["tokens"].tolist(), one["labels"].tolist()) for one in step] for step in steps]


def fresh_model(tied: bool = True) -> nn.Module:
    model = qwen2(**MODEL, tie_word_embeddings=tied)
    model.load_state_dict(ScratchCheckpointer("unused").initial_weights(model))
    return model


@dataclass
class Truth:
    """What a reference run gives: losses, trained model, and the statistics of every step's tokens."""

    losses: list[float]
    model: nn.Module
    metrics: list[dict[str, dict[str, float]]]


def rows_of(sample: dict, logits: torch.Tensor) -> list[tuple[list[float], int, TokenClass]]:
    labels, kinds = sample["labels"].tolist()[1:], sample["token_class"].tolist()[1:]
    return [
        (row, label, TokenClass(kind))
        for row, label, kind in zip(logits.double().tolist(), labels, kinds, strict=False)
        if label != reference.IGNORE_INDEX
    ]


def train_reference(
    steps: list[list[dict]], tied: bool = True, max_norm: float | None = None, measure: bool = False
) -> Truth:
    truth = Truth([], fresh_model(tied), [])

    def keep(number: int, logits: list[torch.Tensor]) -> None:
        step = zip(steps[number - 1], logits, strict=True)
        truth.metrics.append(reference.class_means([row for one, seen in step for row in rows_of(one, seen)]))

    truth.losses = reference.train(
        truth.model, pairs(steps), LEARNING_RATE, WEIGHT_DECAY, max_norm, on_step=keep if measure else None
    )
    return truth


@pytest.fixture(scope="module")
def truths(folder, results) -> Callable[[str], Truth]:
    """The reference run of a kind, made while the real ones train."""
    train = samples(folder, "train")
    packs = pack([len(one["tokens"]) for one in train], PACK_TO)
    packed_steps = [[train[i] for row in step for i in row] for step in in_steps(packs, 4)]
    steps = in_steps(train, PER_STEP)
    kinds: dict[str, Callable[[], Truth]] = {
        "plain": lambda: train_reference(steps, measure=True),
        "packed": lambda: train_reference(packed_steps),
        "untied": lambda: train_reference(steps, tied=False),
        "untied and clipped": lambda: train_reference(steps, tied=False, max_norm=MAX_NORM),
    }
    made: dict[str, Truth] = {}

    def get(kind: str) -> Truth:
        if kind not in made:
            made[kind] = kinds[kind]()
        return made[kind]

    return get


def test_the_data_is_uneven(folder):
    lengths = [len(one["tokens"]) for one in samples(folder, "train")]
    assert len(lengths) == NUM_TRAIN and len(lengths) % PER_STEP
    assert max(lengths) > 3 * min(lengths) and max(lengths) < PACK_TO


@pytest.mark.parametrize("name", RUNS)
def test_the_loss_of_every_step_is_that_of_the_plain_loop(results, truths, name):
    expected = truths(TRUTH_OF[name]).losses
    assert len(expected) >= 10 and expected[-1] < expected[0]  # it learns, so it is not the same number over and over
    assert results(name).losses == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("name", RUNS)
def test_the_final_weights_are_those_of_the_plain_loop(results, truths, name):
    expected = truths(TRUTH_OF[name]).model.state_dict()
    weights = results(name).weights
    start = fresh_model(tied="output.weight" not in weights).state_dict()
    assert set(weights) == set(expected)
    for key, value in expected.items():
        moved = (value - start[key]).norm()
        assert moved > 1e-3, key
        tolerance = TOLERANCE_OF_KEY_BIASES if key.endswith("k_proj.bias") else TOLERANCE
        assert (weights[key] - value).norm() <= tolerance * value.norm(), key


def test_clipping_was_at_work(results, truths):
    norms = [row["grad_norm"] for row in results("untied, sharded, clipped").rows if "grad_norm" in row]
    assert max(norms) > MAX_NORM
    assert truths("untied and clipped").losses[-1] != pytest.approx(truths("untied").losses[-1], rel=1e-3)


def named(split: str, means: dict[str, dict[str, float]]) -> dict[str, float]:
    total = sum(means[group]["nll"] * means[group]["num_tokens"] for group in ("overall", "stop"))
    for group, own in means.items():
        if group != "overall":
            own["loss_share"] = own["nll"] * own["num_tokens"] / total
    return {
        f"{split}_{name}" if group == "overall" else f"{split}_{group}_{name}": value
        for group, own in means.items()
        for name, value in own.items()
    }


def metrics_in(row: dict[str, float], split: str) -> dict[str, float]:
    """Those of tokens: not the loss of all, nor those of whole calls."""
    others = {
        "val_loss",
        *(f"{split}_{name}" for name in ("tool_call_exact", "tool_call_num_calls", "tool_name_exact")),
    }
    return {name: value for name, value in row.items() if name.startswith(f"{split}_") and name not in others}


def test_metrics_of_every_step_are_those_of_all_tokens_of_all_ranks(results, truths):
    rows = [row for row in results("two ranks").rows if "loss" in row]
    expected = truths("plain").metrics
    assert len(rows) == len(expected) == math.ceil(NUM_TRAIN / PER_STEP)
    for row, means in zip(rows, expected, strict=True):
        assert metrics_in(row, "train") == pytest.approx(named("train", means), rel=TOLERANCE, abs=TOLERANCE)
        assert {"train_reasoning_perplexity", "train_tool_call_top5_prob", "train_arg_value_nll"} <= set(row)


@pytest.mark.parametrize("name", ["one rank", "two ranks", "packed"])
def test_validation_metrics_are_those_of_the_whole_validation_set(results, truths, folder, name):
    model = truths(TRUTH_OF[name]).model
    with torch.no_grad():
        seen = [(one, model(torch.tensor(one["tokens"])[None].long())[0]) for one in samples(folder, "val")]
    validation = [row for one, logits in seen for row in rows_of(one, logits)]
    expected = named("val", reference.class_means(validation))
    (row,) = [row for row in results(name).rows if "val_loss" in row]
    assert metrics_in(row, "val") == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
    special_too = [reference.token_statistics(logits, label, 10)["nll"] for logits, label, _ in validation]
    assert row["val_loss"] == pytest.approx(sum(special_too) / len(special_too), rel=TOLERANCE)
