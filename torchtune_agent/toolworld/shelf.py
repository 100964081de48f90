"""Which tools fit together: what can follow what in a chain, and which tools to offer beside the needed ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from random import Random
from typing import TypeVar

from torchtune_agent.toolworld.families import STATELESS
from torchtune_agent.toolworld.tool import Tool

_Item = TypeVar("_Item")
# How many tools a task offers; few, so that prompts stay short.
_NUM_OFFERED = (3, 3, 3, 4, 4, 5)


class Rejected(Exception):
    """This draw makes no task; draw again."""


class Shelf:
    """A world's tools, sorted by what tasks ask about them."""

    def __init__(self, tools: dict[str, Tool]) -> None:
        self.all = list(tools.values())
        self.by_group: dict[str, list[Tool]] = defaultdict(list)
        self._by_family: dict[str, list[Tool]] = defaultdict(list)
        self._givers: dict[str, list[Tool]] = defaultdict(list)
        self._takers: dict[str, list[Tool]] = defaultdict(list)
        for tool in self.all:
            self.by_group[tool.group].append(tool)
            self._by_family[tool.family].append(tool)
            for value in _readings(tool.usage.gives):
                self._givers[value].append(tool)
            if tool.usage.pipe:
                self._takers[tool.usage.pipe.takes].append(tool)
        self._chain_ends = [
            (takes, tool) for takes, takers in self._takers.items() if takes in self._givers for tool in takers
        ]
        self.fixable = [tool for tool in self.all if tool.usage.lookup and tool.usage.lookup.tool in tools]
        self.stateful = [tool for tool in self.all if tool.family not in STATELESS]

    def chain(self, rng: Random) -> list[Tool]:
        """Two or three tools, each of which takes what the one before it gives."""
        takes, second = choice(rng, self._chain_ends)
        tools = [choice(rng, self._givers[takes]), second]
        if rng.random() < 0.5:
            tools.append(
                choice(rng, [taker for value in _readings(second.usage.gives) for taker in self._takers[value]])
            )
        if len({tool.name for tool in tools}) < len(tools):
            raise Rejected
        return tools

    def offer(self, rng: Random, needed: Sequence[Tool]) -> dict[str, Tool]:
        """The needed tools, confusable ones of the last one's group or family, and others, shuffled."""
        offered = {tool.name: tool for tool in needed}
        count = max(rng.choice(_NUM_OFFERED), len(offered) + 1)
        if needed:
            near = self.by_group[needed[-1].group] if rng.random() < 0.6 else self._by_family[needed[-1].family]
            confusable = [tool for tool in near if tool.name not in offered and not _shortcut(tool, needed)]
            for tool in rng.sample(confusable, min(len(confusable), 1 + (count - len(offered) > 2))):
                offered[tool.name] = tool
        for tool in rng.sample(self.all, min(len(self.all), count + len(offered))):
            if len(offered) < count and not _shortcut(tool, needed):
                offered.setdefault(tool.name, tool)
        if len(offered) < max(3, len(needed) + 1):
            raise Rejected
        return _shuffled(rng, list(offered.values()))

    def lookalikes(self, rng: Random, tool: Tool) -> dict[str, Tool]:
        """Tools like `tool` that cannot do what it does, because they are about other things."""
        near = [other for other in self._by_family[tool.family] if other.topic != tool.topic]
        far = [other for other in rng.sample(self.all, min(12, len(self.all))) if other.topic != tool.topic]
        offered = rng.sample(near, min(2, len(near)))
        offered += [other for other in far if other not in offered][: rng.choice(_NUM_OFFERED) - len(offered)]
        if len(offered) < 3:
            raise Rejected
        return _shuffled(rng, offered)


def choice(rng: Random, items: Sequence[_Item]) -> _Item:
    if not items:
        raise Rejected
    return rng.choice(items)


def _readings(gives: str) -> tuple[str, ...]:
    """A result in metres is also just a number; ids, texts and dates are only themselves."""
    if not gives:
        return ()
    plain = gives in ("number", "text", "date") or "/" in gives
    return (gives,) if plain else (gives, "number")


def _shortcut(tool: Tool, needed: Sequence[Tool]) -> bool:
    """Would offering `tool` open another sound way to what a needed tool finds out?"""
    return tool.family not in STATELESS and any(
        tool.topic == other.topic and (tool.usage.gives == other.usage.gives != "" or not tool.parameters["properties"])
        for other in needed
    )


def _shuffled(rng: Random, tools: list[Tool]) -> dict[str, Tool]:
    rng.shuffle(tools)
    return {tool.name: tool for tool in tools}
