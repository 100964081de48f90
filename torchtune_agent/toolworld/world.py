"""ToolWorld: a seeded universe of tools that really run, tasks over them, and gold conversations.

It is the default that makes everything in this package run with nothing downloaded: data for training, a ground for
evaluation, and an environment for reinforcement learning. Everything is a pure function of the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchtune_agent.toolworld import checking
from torchtune_agent.toolworld.calls import Call
from torchtune_agent.toolworld.environment import Environment
from torchtune_agent.toolworld.families import ordered_tools
from torchtune_agent.toolworld.maker import TaskMaker
from torchtune_agent.toolworld.phrasing import SPLITS
from torchtune_agent.toolworld.tasks import Task
from torchtune_agent.toolworld.tool import Tool

MIN_TOOLS = 20


class ToolWorld:
    """The `num_tools` tools from number `first_tool` on, in the order that `seed` gives.

    The first tools of a larger world are the smaller world's tools, so continual learning on 200 new tools after 1,000
    old ones is `ToolWorld(1000)` followed by `ToolWorld(200, first_tool=1000)`.
    """

    def __init__(self, num_tools: int = 200, seed: int = 0, first_tool: int = 0) -> None:
        available = ordered_tools(seed)
        if num_tools < MIN_TOOLS:
            raise ValueError(f"num_tools={num_tools} is too few for tasks with distractors; take at least {MIN_TOOLS}")
        if first_tool < 0 or first_tool + num_tools > len(available):
            raise ValueError(
                f"tools {first_tool} to {first_tool + num_tools} were asked for, but there are at most {len(available)}"
            )
        self.num_tools, self.seed, self.first_tool = num_tools, seed, first_tool
        self.tools: dict[str, Tool] = {tool.name: tool for tool in available[first_tool : first_tool + num_tools]}
        self._maker = TaskMaker(self.tools, f"toolworld-{seed}-{first_tool}-{num_tools}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Tools hold functions that cannot be pickled; a worker process rebuilds the same world instead.
        return ToolWorld, (self.num_tools, self.seed, self.first_tool)

    def task(self, split: str, index: int) -> Task:
        if split not in SPLITS:
            raise ValueError(f"split='{split}' is none of {', '.join(SPLITS)}")
        if index < 0:
            raise ValueError(f"index={index} is negative")
        return self._maker.task(split, index)

    def environment(self, task: Task) -> Environment:
        return task.environment()

    def check(self, task: Task, calls: Sequence[Call], answer: str) -> checking.CheckResult:
        return checking.check(task, calls, answer)

    def conversation(self, task: Task) -> dict[str, Any]:
        return task.conversation()

    def conversations(self, split: str, num_tasks: int) -> list[dict[str, Any]]:
        return [self.task(split, index).conversation() for index in range(num_tasks)]
