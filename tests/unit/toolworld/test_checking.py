"""`check` accepts what solves a task and names what does not."""

from dataclasses import replace
from typing import Any

import pytest

from torchtune_agent.toolworld import Call, Task, ToolWorld

WORLD = ToolWorld(200)
TASKS = [WORLD.task(split, index) for split in ("train", "test") for index in range(200)]
ACTING = [task for task in TASKS if task.gold]


def _first(kind: str) -> Task:
    return next(task for task in TASKS if task.kind == kind)


def _required(task: Task) -> list[Call]:
    return [call for turn in task.gold if turn.required for call in turn.calls]


def test_dropped_call_fails() -> None:
    for task in ACTING:
        for dropped in _required(task):
            calls = [call for call in task.calls if call is not dropped]
            result = WORLD.check(task, calls, task.answer)
            assert not result.solved
            assert any(dropped.key() in problem for problem in result.problems)


def test_changed_argument_fails() -> None:
    for task in ACTING:
        for wanted in _required(task):
            for name, value in wanted.arguments.items():
                changed = replace(wanted, arguments=wanted.arguments | {name: _changed(value)})
                calls = [changed if call is wanted else call for call in task.calls]
                assert not WORLD.check(task, calls, task.answer).solved


def _changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return f"{value}!"
    return value + 1 if isinstance(value, int | float) else type(value)()


def test_wrong_answer_fails() -> None:
    for task in TASKS:
        assert not WORLD.check(task, task.calls, "Done.").solved
        for fact in task.facts:
            wrong = task.answer.replace(fact, "something else")
            assert f"the answer lacks '{fact}'" in WORLD.check(task, task.calls, wrong).problems


def test_parallel_calls_in_any_order() -> None:
    task = _first("parallel")
    assert WORLD.check(task, task.calls[::-1], task.answer).solved


def test_chained_calls_only_in_their_order() -> None:
    for task in TASKS:
        if task.kind == "chain":
            assert not WORLD.check(task, task.calls[::-1], task.answer).solved


def test_recovering_before_the_slip_counts_too() -> None:
    task = _first("recover")
    result = WORLD.check(task, task.calls[-1:], task.answer)
    assert result.solved and result.num_extra_calls == 0
    assert WORLD.check(task, task.calls, task.answer).num_extra_calls == 2


def test_harmless_extra_calls_are_counted_and_harmful_ones_fail() -> None:
    seen = set()
    for task in ACTING:
        for tool in task.tools.values():
            environment = task.environment()
            name = tool.name.split("_")[0]
            if name == "list":
                extra, harmful = Call(tool.name, {}), False
            elif name == "write":
                extra, harmful = Call(tool.name, {"file": "extra.txt", "text": "x"}), True
            else:
                continue
            assert not environment.execute_call(extra).startswith("Error")
            result = WORLD.check(task, [extra, *task.calls], task.answer)
            assert result.solved is not harmful
            seen.add(name)
    assert seen == {"list", "write"}


@pytest.mark.parametrize("kind", ["no_call", "no_tool"])
def test_needless_call_fails(kind: str) -> None:
    task = _first(kind)
    assert WORLD.check(task, [], task.answer).solved
    assert not WORLD.check(task, [Call("add_numbers", {"a": 1, "b": 2})], task.answer).solved


def test_declining_in_other_words_is_accepted() -> None:
    task = _first("no_tool")
    assert WORLD.check(task, [], "I’m afraid I don’t have a tool for this.").solved
    assert not WORLD.check(task, [], "It is 42.").solved


@pytest.mark.parametrize(
    ("answer", "solved"),
    [
        ("It is 1200.", True),
        ("It is 1,200!", True),
        ("It costs $1200", True),
        ("1200.5", False),
        ("-1200", False),
        ("11200", False),
        ("1200a", False),
    ],
)
def test_numbers_in_answers_are_whole(answer: str, solved: bool) -> None:
    task = replace(_first("no_call"), facts=("1200",))
    assert WORLD.check(task, [], answer).solved is solved


def test_malformed_call_is_no_required_call() -> None:
    task = _first("single")
    broken = [replace(call, error="not closed") for call in task.calls]
    assert not WORLD.check(task, broken, task.answer).solved
