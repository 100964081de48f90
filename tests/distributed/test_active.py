"""agent_active_distributed: what the model is least sure of is picked, the same on one rank and two; answers return."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchtune.models.qwen2 import qwen2

from tests.training_runs import Left, launch
from torchtune_agent.data import AgentSFTDataset
from torchtune_agent.data.toolworld import toolworld_tokenizer
from torchtune_agent.toolworld import ToolWorld
from torchtune_agent.training import ScratchCheckpointer

pytestmark = pytest.mark.distributed

NUM, DRAWN, LONGEST = 9, 2, 6
SIZES = {"num_heads": 4, "num_kv_heads": 2, "max_seq_len": 1024, "vocab_size": 2048, "tie_word_embeddings": True}
SMALL = ("active.num_answers=2", "active.max_new_tokens=6", "active.batch_size=4", "active.num_records=4")


def run(folder: Path, *overrides: str, size: int = 1) -> Left:
    return launch(folder, *SMALL, *overrides, size=size, recipe="agent_active_distributed")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = ToolWorld(num_tools=30, seed=0)
    path = tmp_path_factory.mktemp("pool") / "pool.jsonl"
    records = [{"id": f"q{i}", "messages": world.task("train", i).prompt()} for i in range(NUM)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def first(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Left:
    left = run(tmp_path_factory.mktemp("one"), f"active.pool={pool}")
    assert left.codes == [0] and "4 of 9 records picked by uncertainty" in left.output, left.output
    return left


def entropy_of(prompt: list[int], row: int, model: Any, stops: set[int]) -> float:
    """The mean entropy of the answers to one prompt, token by token, from all logits."""
    means = []
    for answer in range(DRAWN):
        numbers = np.random.default_rng([0, row, answer]).random(LONGEST)
        text, entropies = list(prompt), []
        for number in numbers:
            p = torch.softmax(model(torch.tensor([text]))[0, -1].double(), 0)
            entropies.append(float(-(p * p.log()).sum()))
            token = int((p.cumsum(0) < number).sum())
            if token in stops:
                break
            text.append(token)
        means.append(np.mean(entropies))
    return float(np.mean(means))


def test_the_most_unsure_are_picked(first: Left, pool: Path) -> None:
    model = qwen2(num_layers=1, embed_dim=32, intermediate_dim=64, **SIZES).eval()
    model.load_state_dict(ScratchCheckpointer("unused").initial_weights(model))
    tokenizer = toolworld_tokenizer(640)
    expected = {}
    with torch.no_grad():
        for row, record in enumerate(lines(pool)):
            prompt = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in record["messages"])
            tokens = tokenizer.encode(prompt + "<|im_start|>assistant\n")
            stops = {tokenizer.eos_id, *tokenizer.stop_tokens}
            expected[record["id"]] = entropy_of(tokens, row, model, stops)
    picked = lines(first.out / "active" / "round_1.jsonl")
    assert [one["id"] for one in picked] == sorted(expected, key=lambda name: -expected[name])[:4]
    for one in picked:
        assert one["active"]["score"] == pytest.approx(expected[one["id"]], rel=1e-4)
        assert len(one["active"]["answers"]) == DRAWN
    assert not (first.out / "weights").exists()


def test_two_ranks_pick_the_same_to_the_last_bit(first: Left, pool: Path, tmp_path: Path) -> None:
    left = run(tmp_path, f"active.pool={pool}", size=2)
    assert left.codes == [0, 0], left.output
    written = [(one.out / "active" / "round_1.jsonl").read_bytes() for one in (first, left)]
    assert written[0] == written[1]


def test_the_next_round_asks_for_others_and_answers_come_back(first: Left, pool: Path, tmp_path: Path) -> None:
    picked = lines(first.out / "active" / "round_1.jsonl")
    for one in picked[:3]:
        one["messages"].append({"role": "assistant", "content": "I cannot do that."})
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(one) + "\n" for one in picked))
    left = run(first.folder, f"active.pool={pool}", f"active.answers={answers}", "active.by=disagreement")
    assert left.codes == [0] and "3 answers read; 3 in" in left.output, left.output
    again = {one["id"] for one in lines(left.out / "active" / "round_2.jsonl")}
    assert len(again) == 4 and not again & {one["id"] for one in picked}
    labelled = AgentSFTDataset(
        toolworld_tokenizer(640), data_files=str(left.out / "active" / "labelled.jsonl"), cache_dir=str(tmp_path)
    )
    assert len(labelled) == 3 and not labelled.report.left_out


def test_mistakes_are_named(pool: Path, tmp_path: Path) -> None:
    left = run(tmp_path, f"active.pool={pool}", "active.num_records=10")
    assert left.codes == [1] and "active.num_records: target_size=10: the pool has 9 samples" in left.output
    left = run(tmp_path, f"active.pool={pool}", "active.max_new_tokens=2000")
    assert left.codes == [1] and "the longest prompt has" in left.output
