"""Worlds and their tasks are pure, replayable, and kept apart by split."""

import os
import pickle
import subprocess
import sys
from collections import Counter, defaultdict
from hashlib import sha256
from random import Random

import pytest

from torchtune_agent.toolworld import KINDS, Call, Task, ToolWorld, parse_calls, strip_calls
from torchtune_agent.toolworld.families import ordered_tools
from torchtune_agent.toolworld.phrasing import FRAMES, PAIRS, SEQUENCES, SMALL_TALK, SPLITS, ask
from torchtune_agent.toolworld.tasks import split_of

SMALL, LARGE = ToolWorld(200), ToolWorld(2000)
TASKS = [world.task(split, index) for world in (SMALL, LARGE) for split in SPLITS for index in range(200)]

_DIGEST_PROGRAM = """
import hashlib
from torchtune_agent.toolworld import ToolWorld
records = [ToolWorld(300, seed=3).conversations(split, 40) for split in ("train", "test")]
print(hashlib.sha256(repr(records).encode()).hexdigest())
"""


def test_same_in_every_process() -> None:
    expected = [ToolWorld(300, seed=3).conversations(split, 40) for split in ("train", "test")]
    digests = {sha256(repr(expected).encode()).hexdigest()}
    for hash_seed in ("1", "2"):
        # The path as it is here: the tests also run where the package is not installed.
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run([sys.executable, "-c", _DIGEST_PROGRAM], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        digests.add(run.stdout.strip())
    assert len(digests) == 1


def test_first_tools_of_a_larger_world_are_the_smaller_world() -> None:
    assert list(LARGE.tools)[:200] == list(SMALL.tools)
    assert list(ToolWorld(100, first_tool=50).tools) == list(SMALL.tools)[50:150]
    assert list(ToolWorld(200, seed=1).tools) != list(SMALL.tools)


def test_random_access_gives_the_same_task() -> None:
    fresh = ToolWorld(200)
    assert [fresh.task("train", index).instruction for index in (9, 3, 9)] == [
        SMALL.task("train", index).instruction for index in (9, 3, 9)
    ]
    assert ToolWorld(200, seed=1).task("train", 3).instruction != SMALL.task("train", 3).instruction


def test_wrong_sizes_and_names_are_refused() -> None:
    with pytest.raises(ValueError, match=str(len(ordered_tools(0)))):
        ToolWorld(10_000)
    with pytest.raises(ValueError, match="num_tools=5"):
        ToolWorld(5)
    with pytest.raises(ValueError, match="split='dev'"):
        SMALL.task("dev", 0)
    with pytest.raises(ValueError, match="index=-1"):
        SMALL.task("train", -1)


def test_new_tools_after_old_ones() -> None:
    new = ToolWorld(200, first_tool=1000)
    kinds = Counter(new.task("train", index).kind for index in range(100))
    assert set(kinds) == set(KINDS)
    assert not set(new.tools) & set(ToolWorld(1000).tools)


@pytest.mark.parametrize("first_tool", range(0, 2700, 300))
def test_smallest_worlds_make_tasks(first_tool: int) -> None:
    world = ToolWorld(20, first_tool=first_tool)
    assert all(len(world.task("validation", index).tools) >= 3 for index in range(25))


def test_worker_processes_get_the_same_world() -> None:
    copy = pickle.loads(pickle.dumps(SMALL))
    assert copy.conversation(copy.task("test", 7)) == SMALL.conversation(SMALL.task("test", 7))


def test_kinds_come_in_fixed_shares() -> None:
    shares = {"single": 11, "chain": 5, "parallel": 3, "recover": 2, "no_call": 2, "no_tool": 2}
    for split in SPLITS:
        for start in (0, 250):
            assert Counter(LARGE.task(split, start + index).kind for index in range(25)) == shares


@pytest.mark.parametrize("world", [SMALL, LARGE])
def test_gold_conversations_replay(world: ToolWorld) -> None:
    for split in SPLITS:
        for index in range(100):
            task = world.task(split, index)
            record = world.conversation(task)
            environment = world.environment(task)
            made: list[Call] = []
            waiting: list[str] = []
            for message in record["messages"][2:]:
                if message["role"] == "assistant":
                    assert not waiting
                    calls = parse_calls(message["content"], task.tools)
                    waiting = [environment.execute_call(call) for call in calls]
                    made += calls
                    assert strip_calls(message["content"])
                else:
                    assert message["role"] == "tool"
                    assert message["content"] == waiting.pop(0)
            assert made == task.calls
            result = world.check(task, made, record["messages"][-1]["content"])
            assert result.solved, result.problems


def test_shape_of_records() -> None:
    record = SMALL.conversations("train", 2)[0]
    assert [message["role"] for message in record["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert record["id"] == "toolworld-0-0-200/train/0"
    assert record["kind"] == "single" and record["split"] == "train"
    for name in record["tools"]:
        assert SMALL.tools[name].spec() in record["messages"][0]["content"]


def test_kinds_are_what_they_say() -> None:
    for task in TASKS:
        results = _results(task)
        sizes = [len(turn.calls) for turn in task.gold]
        if task.kind == "single":
            assert sizes == [1] and not results[0].startswith("Error")
        elif task.kind == "chain":
            assert sizes in ([1, 1], [1, 1, 1])
            for earlier, call in zip(results, task.calls[1:], strict=False):
                values = [value if isinstance(value, str) else repr(value) for value in call.arguments.values()]
                assert earlier in values
                assert "{" not in task.instruction
        elif task.kind == "parallel":
            assert sizes in ([2], [3]) and not any(text.startswith("Error") for text in results)
        elif task.kind == "recover":
            assert sizes == [1, 1, 1]
            assert [text.startswith("Error") for text in results] == [True, False, False]
        else:
            assert sizes == []


def test_distractors_are_always_offered_and_shuffled() -> None:
    positions: Counter[int] = Counter()
    for task in TASKS:
        needed = {call.name for call in task.calls}
        assert needed <= set(task.tools)
        assert 3 <= len(task.tools) <= 5
        assert len(task.tools) > len(needed)
        if task.kind == "single":
            positions[list(task.tools).index(task.calls[0].name)] += 1
    assert min(positions[place] for place in range(3)) > 0.5 * max(positions.values())


def test_no_tool_tasks_offer_nothing_about_the_topic() -> None:
    for task in TASKS:
        if task.kind == "no_tool":
            assert not any(tool.topic in task.answer for tool in task.tools.values())


def test_splits_share_no_call() -> None:
    seen: dict[str, set[str]] = defaultdict(set)
    for task in TASKS:
        for turn in task.gold:
            for call in turn.calls:
                if call.arguments or turn.required:
                    seen[call.key()].add(task.split)
                    assert split_of(call) == task.split
    assert all(len(splits) == 1 for splits in seen.values())


def test_splits_share_no_wording() -> None:
    wordings = {split: {task.wording for task in TASKS if task.split == split} for split in SPLITS}
    texts = {split: {task.instruction for task in TASKS if task.split == split} for split in SPLITS}
    for sets in (wordings, texts):
        assert not sets["train"] & sets["validation"]
        assert not sets["train"] & sets["test"]
        assert not sets["validation"] & sets["test"]


def test_templates_of_splits_are_disjoint() -> None:
    for table in (FRAMES, SEQUENCES, PAIRS, {split: [line[0] for line in SMALL_TALK[split]] for split in SPLITS}):
        lines = [line for split in SPLITS for line in table[split]]
        assert len(set(lines)) == len(lines)
    for tool in ordered_tools(0):
        assert len(set(tool.usage.asks)) == 4, tool.name
        assert tool.usage.pipe is None or len(set(tool.usage.pipe.asks)) == 4, tool.name
    assert len(FRAMES["train"]) * 2 >= 6 and len(FRAMES["validation"]) >= 2 and len(FRAMES["test"]) >= 2


def test_clauses_of_a_split_are_used_in_that_split_only() -> None:
    asks = ("train a", "train b", "validation", "test")
    for split in SPLITS:
        used = {ask(Random(number), split, asks) for number in range(20)}
        assert used == {clause for clause in asks if clause.startswith(split)}


def _results(task: Task) -> list[str]:
    environment = task.environment()
    return [environment.execute_call(call) for call in task.calls]
