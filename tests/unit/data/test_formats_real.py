"""Every record of the real files at hand, against counts and texts found without the code under test.

Nothing real is copied into the repository: the tests run where the files lie beside it.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.mutation import mutate, outcome
from torchtune_agent.data.conversation import Conversation, Role
from torchtune_agent.data.formats import convert, detect
from torchtune_agent.data.json_text import loads, parse_line
from torchtune_agent.data.reasons import BadRecord
from torchtune_agent.data.validate import check

REAL = Path(__file__).parents[4] / "shared" / "data"
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared/data next to the repository")


def read(name: str) -> list[Any]:
    text = (REAL / name).read_text(encoding="utf-8")
    if not name.endswith(".jsonl"):
        value = loads(text)
        return value if isinstance(value, list) else [value]
    return [parse_line(line.encode(), last=False) for line in text.split("\n") if line.strip()]


def files(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(REAL)) for path in REAL.glob(pattern))


def sources() -> Iterator[tuple[str, str, list[Any]]]:
    """(name, format, records) for everything at hand that is a conversation."""
    yield "tau-bench", "tau_bench", read("tau-bench/historical_trajectories/gpt-4o-airline.json")
    yield "swe-smith", "xml", read("swe-smith/tests/test_logs/ft_xml_example.jsonl")
    for folder in ("swe-smith", "swe-agent"):
        yield f"{folder} traj", "swe_agent", [read(name)[0] for name in files(f"{folder}/**/*.traj")]
    for name in files("mini-swe-agent/**/*.traj.json") + files("openhands-sdk/**/fncall-llm-message.json"):
        yield name.split("/")[0], "openai", [{"messages": read(name)}]
    yield "openhands-sdk logs", "openai", [read(name)[0] for name in files("openhands-sdk/**/llm-logs/*.json")]
    for name in files("functionary/tests/test_case*.json") + files("mistral-common/tests/**/sample.json"):
        yield name.split("/")[0], "openai", read(name)
    yield "fireact", "react", read("fireact/data/finetune/gpt_format/multitask_multimethod.jsonl")
    for name in files("fireact/trajs/*.json"):
        yield "fireact trajs", "react", list(read(name)[0].values())
    yield "llamafactory", "sharegpt", read("llamafactory/data/glaive_toolcall_en_demo.json")
    yield "llamafactory", "openai", read("llamafactory/data/kto_en_demo.json")
    yield "llamafactory", "openai", read("llamafactory/data/reason_tool_use_demo_50.jsonl")
    yield "llamafactory", "alpaca", read("llamafactory/data/identity.json")
    yield "toolrl", "alpaca", read("toolrl/dataset/rlla_4k_raw/rlla_sft.json")


def turns_of(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The raw turns, found without the code under test."""
    turns = next(record[k] for k in ("traj", "history", "messages", "conversations") if isinstance(record.get(k), list))
    response = record.get("response")
    return [*turns, *([response["choices"][0]["message"]] if response else [])]


def raw_texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value if isinstance(value, list) else []
    return ["".join(p.get("text") or p.get("value") or "" for p in parts if p["type"] == "text")]


def raw_calls(turn: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    calls = [c["function"] for c in turn.get("tool_calls") or []]
    calls += [turn["function_call"]] if turn.get("function_call") else []
    if turn.get("from") == "function_call":
        found = json.loads(turn["value"])
        calls += found if isinstance(found, list) else [found]
    if isinstance(turn.get("content"), list):
        for part in turn["content"]:
            if part["type"] == "tool_call":
                found = json.loads(part["value"])
                calls += found if isinstance(found, list) else [found]
    return calls


def is_own(turn: Mapping[str, Any]) -> bool:
    """A few observations of FireAct stand in turns of the assistant: they are not the model's own."""
    role = turn.get("role") or turn.get("from")
    return role in ("assistant", "gpt", "function_call") and not str(turn.get("content")).startswith("Observation:")


def check_against_raw(record: Mapping[str, Any], conversation: Conversation) -> int:
    """Texts and arguments to the byte, and the counts of turns and calls. Returns the number of calls."""
    ours = [call for m in conversation.messages for call in m.tool_calls]
    raws = [call for turn in turns_of(record) for call in raw_calls(turn)]
    assert [call.name for call in ours] == [call["name"] for call in raws]
    for call, raw in zip(ours, raws, strict=True):
        same = (
            raw["arguments"] if isinstance(raw["arguments"], str) else json.dumps(raw["arguments"], ensure_ascii=False)
        )
        assert call.arguments == same
    own = [turn for turn in turns_of(record) if is_own(turn)]
    said = [m for m in conversation.messages if m.role is Role.ASSISTANT]
    assert len(said) == len(own)
    for message, turn in zip(said, own, strict=True):
        if turn.get("from") != "function_call":
            assert [message.content] == raw_texts(turn.get("content", turn.get("value")))
    others = [turn for turn in turns_of(record) if not is_own(turn)]
    rest = [m.content for m in conversation.messages if m.role is not Role.ASSISTANT]
    assert rest == [text for turn in others for text in raw_texts(turn.get("content", turn.get("value")))]
    return len(raws)


def test_every_real_record():
    counts: Counter[tuple[str, str]] = Counter()
    refused: Counter[tuple[str, str]] = Counter()
    num_calls = 0
    for name, format, records in sources():
        for record in records:
            counts[name, format] += 1
            assert detect(record) == format
            try:
                conversation = convert(record)
                check(conversation)
            except BadRecord as error:
                refused[name, error.code] += 1
                continue
            if format == "alpaca":
                assert conversation.messages[-1].content == record["output"]
                assert conversation.messages[-2].content == f"{record['instruction']}\n{record['input']}".rstrip("\n")
            elif isinstance(record.get("traj"), str):
                run = record["traj"].split("### Response:\n")[1]
                turns = [m for m in conversation.messages if m.role is not Role.SYSTEM][1:]
                assert "\n".join(m.content for m in turns) == run
                assert not any(re.search("^Observation", m.content, re.M) for m in turns if m.role is Role.ASSISTANT)
            else:
                num_calls += check_against_raw(record, conversation)
    assert refused == {("functionary", "unsupported_content"): 1}  # an image
    assert counts["tau-bench", "tau_bench"] == 140 and counts["llamafactory", "sharegpt"] == 300
    assert counts["fireact", "react"] == 1439 and counts["swe-agent traj", "swe_agent"] == 16
    assert num_calls == 1285


def test_preference_pairs_and_displays_are_refused():
    for record in read("llamafactory/data/dpo_en_demo.json"):
        assert outcome(lambda record=record: record, "auto") == "unknown_format"
    for record in read("tau-bench/few_shot_data/MockRetailDomainEnv-few_shot.jsonl"):
        assert outcome(lambda record=record: record, "auto") == "unknown_format"


def test_mutated_real_records():
    rng = random.Random(1)
    pool = [record for _, _, records in sources() for record in records[:8] if len(json.dumps(record)) < 50_000]
    outcomes: Counter[str] = Counter()
    for _ in range(2_000):
        record = mutate(rng, mutate(rng, rng.choice(pool)))
        if isinstance(record, dict):
            outcomes[outcome(lambda record=record: record, "auto")] += 1
    assert outcomes["trained"] > 200 and len(outcomes) > 5
