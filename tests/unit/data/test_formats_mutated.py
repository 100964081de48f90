"""Broken records: each is converted or refused with a reason, and never anything else."""

import json
import random
from collections import Counter
from typing import Any

from tests.mutation import mutate, outcome
from torchtune_agent.data.formats import FORMATS
from torchtune_agent.data.json_text import parse_line
from torchtune_agent.toolworld import ToolWorld

ASK = {"role": "user", "content": "hi"}
FLAT = {"name": "f", "parameters": {"type": "object"}}
RUN = (
    "Thought: look\nAction: search[x]\nObservation: found\nThought: done\nAction: finish[x]\nObservation: reward = 1\n"
)


def seeds() -> list[dict[str, Any]]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": [1.0, "é"]}'}}
    turns = [
        {"role": "system", "content": "s"},
        ASK,
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "x"}],
            "reasoning": "hm",
            "tool_calls": [call, call],
        },
        {"role": "tool", "tool_call_id": "c", "content": "1"},
        {"role": "tool", "tool_call_id": "c", "content": "2"},
        {"role": "assistant", "content": "done 👩‍🚀", "train": True, "weight": 0.5},
    ]
    shared = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
    ]
    xml = {"role": "assistant", "content": "<function=f>\n</function>"}
    return [
        {"messages": turns, "tools": [{"type": "function", "function": FLAT}], "id": 1},
        {"messages": turns, "response": {"choices": [{"message": turns[-1]}]}, "metadata": {"a": 1.0}},
        {"messages": [ASK, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": {}}}]},
        {"conversations": [*shared, {"from": "observation", "value": "1"}], "tools": json.dumps([FLAT]), "system": "s"},
        {"instruction": "i", "input": "j", "output": "o", "history": [["q", "a"]], "system": "s"},
        {"messages": [ASK, {"role": "assistant", "content": RUN}]},
        {"traj": f"q\n{RUN}", "reward": True},
        {"messages": [ASK, xml], "id": "x"},
        {
            "history": [*turns[:3], {"role": "tool", "content": "1", "tool_call_ids": ["c"]}],
            "info": {"exit_status": "x"},
        },
        {"trajectory": [{"response": "r", "observation": "o", "query": [ASK]}], "environment": "e"},
        {"task_id": 1, "traj": turns, "reward": 1.0, "trial": 0},
        next(iter(ToolWorld(num_tools=20, seed=0).conversations("train", 1))),
    ]


def test_ten_thousand_mutated_records():
    rng = random.Random(0)
    records = seeds()
    outcomes: Counter[str] = Counter()
    for i in range(10_000):
        record = mutate(rng, records[i % len(records)])
        for _ in range(rng.randrange(3)):
            record = mutate(rng, record)
        if i % 2 and isinstance(record, dict):
            outcomes[outcome(lambda record=record: record, rng.choice(["auto", *FORMATS]))] += 1
            continue
        line = bytearray(json.dumps(record, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass"))
        for _ in range(rng.choice([0, 0, 1, 2, 5])):
            line[rng.randrange(len(line))] = rng.randrange(256)
        if rng.random() < 0.2:
            del line[rng.randrange(len(line)) :]
        last = rng.random() < 0.5
        outcomes[outcome(lambda line=line, last=last: parse_line(bytes(line), last=last), "auto")] += 1
    assert sum(outcomes.values()) == 10_000
    assert len(outcomes) >= 14 and 500 < outcomes["trained"] < 8000
