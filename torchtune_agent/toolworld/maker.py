"""Makes tasks: draws tools, arguments and wording for each kind of task, and runs the tools to get the gold results.

Random access without memory: a task is drawn from a generator seeded by its own id. A draw that does not work out (a
tool refuses, or the call belongs to another split) is thrown away and drawn again from the next seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from random import Random
from typing import Any

from torchtune_agent.toolworld.calls import Call
from torchtune_agent.toolworld.environment import Environment
from torchtune_agent.toolworld.phrasing import (
    DECLINES,
    PAIRS,
    SEQUENCES,
    ask,
    facts,
    fill,
    request,
    small_talk,
    spoken,
)
from torchtune_agent.toolworld.shelf import Rejected, Shelf, choice
from torchtune_agent.toolworld.tasks import Task, Turn, split_of
from torchtune_agent.toolworld.tool import Tool, ToolError

_ATTEMPTS = 120
# Calls of one turn have at most this many arguments together, which bounds the length of a conversation.
_MAX_VALUES = 8
# 44 % single, 20 % chain, 12 % parallel, 8 % recover, 8 % no_call, 8 % no_tool in every 25 tasks in a row.
_KIND_CYCLE = (
    "single", "chain", "single", "parallel", "recover", "single", "no_call", "single", "chain", "single", "no_tool",
    "parallel", "single", "single", "chain", "single", "single", "no_call", "chain", "single", "parallel", "recover",
    "single", "no_tool", "chain",
)  # fmt: skip
_THOUGHTS = (
    "I need {goal}. {tool} does that.",
    "I need {goal}, so I call {tool}.",
    "I need {goal}: {tool} fits, {other} does not.",
)


@dataclass
class Draw:
    """One attempt: its generator, its split, and a world whose state the calls are drawn from and run in."""

    rng: Random
    split: str
    seed: str
    environment: Environment

    def call(self, tool: Tool) -> Call:
        """A call of `tool` that belongs to the split."""
        for _ in range(12):
            call = Call(tool.name, tool.usage.sample(self.rng, self.environment.state))
            if split_of(call) == self.split:
                return call
        raise Rejected

    def fixed(self, call: Call) -> Call:
        """`call`, whose arguments cannot be drawn again, if it belongs to the split."""
        if split_of(call) != self.split:
            raise Rejected
        return call

    def run(self, call: Call) -> Any:
        try:
            return self.environment.value(call)
        except ToolError as error:
            raise Rejected from error


@dataclass(frozen=True)
class Draft:
    """What a kind's maker returns; the offer of tools and the ids are added for all kinds alike."""

    instruction: str
    wording: str
    gold: tuple[Turn, ...]
    answer: str
    facts: tuple[str, ...]
    offered: dict[str, Tool]


class TaskMaker:
    """Tasks over a fixed set of tools."""

    def __init__(self, tools: dict[str, Tool], world_name: str) -> None:
        self.tools = tools
        self.shelf = Shelf(tools)
        self.world_name = world_name
        self._makers: dict[str, Callable[[Draw], Draft]] = {
            "single": self._single,
            "chain": self._chain,
            "parallel": self._parallel,
            "recover": self._recover,
            "no_call": self._no_call,
            "no_tool": self._no_tool,
        }

    def task(self, split: str, index: int) -> Task:
        """A kind that these few tools cannot make (no two of them fit together) gives a single call instead."""
        task_id = f"{self.world_name}/{split}/{index}"
        for kind in (_KIND_CYCLE[index % len(_KIND_CYCLE)], "single"):
            for attempt in range(_ATTEMPTS):
                seed = f"{task_id}/{kind}/{attempt}"
                draw = Draw(Random(seed), split, seed, Environment(self.tools, seed))
                try:
                    draft = self._makers[kind](draw)
                except Rejected:
                    continue
                return Task(
                    id=task_id,
                    split=split,
                    kind=kind,
                    instruction=draft.instruction,
                    wording=draft.wording,
                    tools=draft.offered,
                    gold=draft.gold,
                    answer=draft.answer,
                    facts=draft.facts,
                    state_seed=seed,
                )
        raise ValueError(f"{self.world_name} has too few tools to make tasks from; take more")

    def _single(self, draw: Draw) -> Draft:
        tool = draw.rng.choice(self.shelf.all)
        call = draw.call(tool)
        result = draw.run(call)
        offered = self.shelf.offer(draw.rng, [tool])
        turn = Turn(_thought(draw.rng, tool, call, offered), (call,))
        clause = ask(draw.rng, draw.split, tool.usage.asks)
        text, wording = request(draw.rng, draw.split, [(clause, call.arguments)], PAIRS)
        return Draft(text, wording, (turn,), *_reply(tool, call, result), offered)

    def _chain(self, draw: Draw) -> Draft:
        """Each call takes the result of the one before it."""
        tools = self.shelf.chain(draw.rng)
        call = draw.call(tools[0])
        result = draw.run(call)
        offered = self.shelf.offer(draw.rng, tools)
        turns = [Turn(_thought(draw.rng, tools[0], call, offered), (call,))]
        clauses = [(ask(draw.rng, draw.split, tools[0].usage.asks), call.arguments)]
        for tool in tools[1:]:
            pipe = tool.usage.pipe
            assert pipe is not None
            arguments = tool.usage.sample(draw.rng, draw.environment.state) | {pipe.parameter: result}
            call = draw.fixed(Call(tool.name, arguments))
            thought = f"That gave {spoken(result)}. Now I need {fill(tool.usage.goal, arguments)}: {tool.name}."
            turns.append(Turn(thought, (call,)))
            clauses.append((ask(draw.rng, draw.split, pipe.asks), arguments))
            result = draw.run(call)
        text, wording = request(draw.rng, draw.split, clauses, SEQUENCES)
        return Draft(text, wording, tuple(turns), *_reply(tools[-1], call, result), offered)

    def _parallel(self, draw: Draw) -> Draft:
        """Calls that do not depend on each other: run in the opposite order they give the same results and state."""
        count = 3 if draw.rng.random() < 0.25 else 2
        first = draw.rng.choice(self.shelf.all)
        near = self.shelf.by_group[first.group] if draw.rng.random() < 0.5 else self.shelf.all
        same = draw.rng.random() < 0.5
        tools = [first] * count if same else [first, *(draw.rng.choice(near) for _ in range(count - 1))]
        calls = [draw.call(tool) for tool in tools]
        if len({call.key() for call in calls}) < count or sum(len(call.arguments) for call in calls) > _MAX_VALUES:
            raise Rejected
        results = [draw.run(call) for call in calls]
        backwards = Draw(draw.rng, draw.split, draw.seed, Environment(self.tools, draw.seed))
        if [backwards.run(call) for call in calls[::-1]][::-1] != results:
            raise Rejected
        if backwards.environment.state.changes() != draw.environment.state.changes():
            raise Rejected
        goals = [fill(tool.usage.goal, call.arguments) for tool, call in zip(tools, calls, strict=True)]
        thought = f"I need {'; '.join(goals)}. They are independent, so I call them at once."
        clauses = [
            (ask(draw.rng, draw.split, tool.usage.asks), call.arguments)
            for tool, call in zip(tools, calls, strict=True)
        ]
        text, wording = request(draw.rng, draw.split, clauses, PAIRS)
        replies = [_reply(tool, call, result) for tool, call, result in zip(tools, calls, results, strict=True)]
        answer = " ".join(reply for reply, _ in replies)
        must = tuple(dict.fromkeys(fact for _, reply_facts in replies for fact in reply_facts))
        return Draft(text, wording, (Turn(thought, tuple(calls)),), answer, must, self.shelf.offer(draw.rng, tools))

    def _recover(self, draw: Draw) -> Draft:
        """The user misspells a name: the first call fails, the list shows what exists, the second call is right.

        Only for calls that change nothing: an agent should not learn to delete or spend on a guess.
        """
        tool = choice(draw.rng, self.shelf.fixable)
        lookup = tool.usage.lookup
        assert lookup is not None
        right = draw.call(tool)
        good = right.arguments[lookup.parameter]
        listing = Call(lookup.tool, {})
        existing = draw.run(listing)
        bad = _misspelt(draw.rng, good)
        if bad in existing or get_close_matches(bad, existing, n=1, cutoff=0.5) != [good]:
            raise Rejected
        wrong = draw.fixed(Call(tool.name, right.arguments | {lookup.parameter: bad}))
        offered = self.shelf.offer(draw.rng, [tool, self.tools[lookup.tool]])
        gold = (
            Turn(_thought(draw.rng, tool, wrong, offered), (wrong,), required=False),
            Turn(f"There is no {bad}. I call {lookup.tool} to see what exists.", (listing,), required=False),
            Turn(f"The list has {good}, which is close to {bad}. I call {tool.name} again with it.", (right,)),
        )
        clause = ask(draw.rng, draw.split, tool.usage.asks)
        text, wording = request(draw.rng, draw.split, [(clause, wrong.arguments)], PAIRS)
        answer, must = _reply(tool, right, draw.run(right))
        if draw.environment.state.changes():
            raise Rejected
        return Draft(text, wording, gold, f"{answer} There is no {bad}, so I took {good}.", must, offered)

    def _no_call(self, draw: Draw) -> Draft:
        text, answer, fact, wording = small_talk(draw.rng, draw.split)
        return Draft(text, wording, (), answer, (fact,), self.shelf.offer(draw.rng, []))

    def _no_tool(self, draw: Draw) -> Draft:
        """A sound request for a tool that is not offered, among tools that look much like it."""
        tool = choice(draw.rng, self.shelf.stateful)
        call = draw.call(tool)
        offered = self.shelf.lookalikes(draw.rng, tool)
        clause = ask(draw.rng, draw.split, tool.usage.asks)
        text, wording = request(draw.rng, draw.split, [(clause, call.arguments)], PAIRS)
        answer = draw.rng.choice(DECLINES).format(topic=tool.topic)
        return Draft(text, wording, (), answer, (), offered)


def _thought(rng: Random, tool: Tool, call: Call, offered: Mapping[str, Tool]) -> str:
    other = rng.choice([name for name in offered if name != tool.name])
    return rng.choice(_THOUGHTS).format(goal=fill(tool.usage.goal, call.arguments), tool=tool.name, other=other)


def _reply(tool: Tool, call: Call, result: Any) -> tuple[str, tuple[str, ...]]:
    usage = tool.usage
    return fill(usage.reply, call.arguments, result), facts(usage.reply, call.arguments, result)


def _misspelt(rng: Random, word: str) -> str:
    """`word` with two neighbours swapped or one character lost."""
    if len(word) < 4:
        raise Rejected
    place = rng.randrange(1, len(word) - 1)
    if rng.random() < 0.5:
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    return word[:place] + word[place + 1 :]
