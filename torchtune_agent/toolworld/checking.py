"""Did these calls and this answer solve the task? What evaluation and reinforcement learning ask of ToolWorld.

The outcome counts: every required call in order (calls of one turn in any order),
nothing changed that the reference did
not change, and the facts in the answer. Extra calls that change nothing are counted, not punished.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torchtune_agent.toolworld.calls import Call
from torchtune_agent.toolworld.phrasing import DECLINED
from torchtune_agent.toolworld.tasks import Task


@dataclass(frozen=True)
class CheckResult:
    """`problems` says in words what was wrong; empty exactly when the task is solved."""

    problems: tuple[str, ...]
    num_missing_calls: int
    num_extra_calls: int

    @property
    def solved(self) -> bool:
        return not self.problems


def check(task: Task, calls: Sequence[Call], answer: str) -> CheckResult:
    missing, num_extra = _match(task, calls)
    problems = [f"missing call: {call.key()}" for call in missing]
    if calls and not task.gold:
        problems.append(f"called {calls[0].name} though no call was needed")
    if _changes(task, calls) != _changes(task, task.calls):
        problems.append("the calls left a different state than the reference")
    problems += _answer_problems(task, answer)
    return CheckResult(tuple(problems), len(missing), num_extra)


def _match(task: Task, calls: Sequence[Call]) -> tuple[list[Call], int]:
    """Required calls not made in their order, and how many of `calls` were none of the required ones."""
    turns = [list(turn.calls) for turn in task.gold if turn.required]
    num_extra = 0
    for call in calls:
        waiting = turns[0] if turns else []
        found = next((wanted for wanted in waiting if not call.error and wanted.key() == call.key()), None)
        if found is None:
            num_extra += 1
            continue
        waiting.remove(found)
        if not waiting:
            turns.pop(0)
    return [call for turn in turns for call in turn], num_extra


def _changes(task: Task, calls: Sequence[Call]) -> dict[str, dict[str, object]]:
    environment = task.environment()
    for call in calls:
        environment.execute_call(call)
    return environment.state.changes()


def _answer_problems(task: Task, answer: str) -> list[str]:
    if task.kind == "no_tool":
        return [] if DECLINED.search(answer.replace("’", "'")) else ["the answer does not decline"]
    return [f"the answer lacks '{fact}'" for fact in task.facts if not _contains(answer, fact)]


def _contains(answer: str, fact: str) -> bool:
    """Whole words and numbers only: 12 is not in 112, 12.5 or -12; 1200 may be written 1,200."""
    before = r"(?<![0-9A-Za-z])(?<![0-9][.,])(?<!-)" if fact[:1].isalnum() and fact[:1].isascii() else ""
    after = r"(?![0-9A-Za-z])(?![.,][0-9])" if fact[-1:].isalnum() and fact[-1:].isascii() else ""
    flags = re.IGNORECASE if fact in ("yes", "no") else 0
    pattern = re.compile(before + re.escape(fact) + after, flags)
    return any(map(pattern.search, (answer, re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer))))
