"""Every call style against turns that were written together with their classes, cut turns, and hostile text."""

import json
import random
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from tests.tagged_turns import WRITERS, written_turn
from torchtune_agent import config
from torchtune_agent.data.tagging import STYLES, CallMarkers, Tags, tag_turn
from torchtune_agent.data.token_class import TokenClass
from torchtune_agent.errors import UserError

CUSTOM = CallMarkers("<<CALL>>", "<<END>>")
SHARED = Path(__file__).parents[4] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared folder of real data is not here")
LETTERS = dict(zip("rtsnav", ("REASONING", "THINK", "CALL_SYNTAX", "CALL_NAME", "ARG_NAME", "ARG_VALUE"), strict=True))


def tag(style: str, text: bytes, truncated: bool = False, first_call: int = 0) -> tuple[Tags, int]:
    markers = CUSTOM if style == "custom" else None
    return tag_turn(text, truncated=truncated, style=style, markers=markers, first_call=first_call)


@pytest.mark.parametrize("style", WRITERS)
def test_a_turn_has_the_classes_it_was_written_with(style):
    rng = random.Random(style)
    for number in range(1500):
        written = written_turn(style, rng)
        text, kinds, calls = written.bytes_of()
        tags, following = tag(style, text, first_call=number)
        assert tags.classes.tolist() == kinds, text
        assert tags.calls.tolist() == [call + number if call >= 0 else -1 for call in calls], text
        assert following == number + written.call + 1, text


@pytest.mark.parametrize("style", ["xml", "tool_call", "mistral", "pythonic", "react", "llama3"])
def test_auto_finds_the_style(style):
    rng = random.Random(style)
    for _ in range(300):
        text, kinds, calls = written_turn(style, rng).bytes_of()
        tags, _ = tag("auto", text)
        assert tags.classes.tolist() == kinds, text
        assert tags.calls.tolist() == calls, text


@pytest.mark.parametrize("style", ["xml", "tool_call", "custom", "fenced"])
def test_a_turn_cut_inside_a_block_is_a_call_to_its_end(style):
    rng = random.Random(style)
    for _ in range(400):
        text, _, calls = written_turn(style, rng).bytes_of()
        cut = rng.randrange(len(text) + 1)
        tags, _ = tag(style, text[:cut], truncated=True)
        last_safe = max(0, cut - 14)  # the last bytes may be the beginning of a marker
        assert (tags.calls >= 0).tolist()[:last_safe] == [call >= 0 for call in calls[:last_safe]], text[:cut]
        in_block = cut > 14 and all(call >= 0 for call in calls[cut - 14 : cut + 1]) and cut < len(text)
        if in_block:
            assert (tags.calls[cut - 14 :] >= 0).all(), text[:cut]


@pytest.mark.parametrize("style", [*STYLES, "custom"])
@pytest.mark.parametrize("truncated", [False, True])
def test_cut_and_mutated_turns_never_raise(style, truncated):
    rng = random.Random(f"{style}{truncated}")
    sources: list[str] = list(WRITERS) if style == "auto" else ["tool_call" if style == "hermes" else style]
    for _ in range(700):
        text = bytearray(written_turn(rng.choice(sources), rng).text.encode())
        for _ in range(rng.randrange(4)):
            if text:
                at, size = rng.randrange(len(text)), rng.randrange(4)
                text[at : at + size] = bytes(rng.choices(b"{}[]()\"'\\,:=<>/\n \xff`", k=rng.randrange(4)))
        data = bytes(text[: rng.randrange(len(text) + 1)])
        tags, following = tag(style, data, truncated)
        assert len(tags.classes) == len(tags.calls) == len(data)
        assert following == tags.calls.max(initial=-1) + 1, data
        in_call = tags.classes >= TokenClass.CALL_SYNTAX
        assert (in_call == (tags.calls >= 0)).all(), data


@pytest.mark.parametrize(
    ("style", "text", "truncated", "kinds"),
    [
        ("xml", "<think>a</think>b", False, "t" * 16 + "r"),
        ("xml", "<think>ab", False, "r" * 9),
        ("xml", "a<think>b", True, "r" + "t" * 8),
        ("xml", "</think>b", False, "r" * 9),
        ("xml", "<think><think></think></think>", False, "t" * 22 + "r" * 8),
        ("tool_call", "<tool_call>{}</tool_call>", False, "s" * 25),
        ("tool_call", '<tool_call>{"a', False, "r" * 14),
        ("tool_call", '<tool_call>{"name":"ab', True, "s" * 20 + "nn"),
        ("tool_call", "<tool_call>huh</tool_call>", False, "s" * 26),
        ("llama3", '{"name": "Al", "age": 3}', False, "r" * 24),
        ("llama3", "<|python_tag|>l\n", False, "s" * 14 + "vs"),
        ("pythonic", "[f] x", False, "r" * 5),
        ("pythonic", "[f(a=1", False, "r" * 6),
        ("pythonic", "[f(a=1", True, "snsasv"),
        ("pythonic", "see [f(a=1)]", False, "r" * 12),
        ("mistral", "[TOOL_CALLS]f{", False, "s" * 12 + "ns"),
        ("react", "Action: f\nmore", False, "r" * 14),
        ("react", "Action: f[12", True, "s" * 8 + "nsvv"),
        ("fenced", "```python\nx\n```", False, "r" * 15),
        ("fenced", "```\nx\n", False, "r" * 6),
        ("fenced", "```\nx\n", True, "ssssvv"),
        ("auto", "```\nx\n```", False, "r" * 9),
        ("auto", "<tool_call> or <function=f></function>", False, "r" * 15 + "s" * 10 + "n" + "s" * 12),
    ],
)
def test_tags_written_out_by_hand(style, text, truncated, kinds):
    tags, _ = tag(style, text.encode(), truncated)
    assert [TokenClass(int(kind)).name for kind in tags.classes] == [LETTERS[kind] for kind in kinds]


def test_a_prompt_that_opened_thinking():
    tags, _ = tag_turn(b"<function=f></function></think><function=g></function>", thinking=True)
    assert (tags.classes[:31] == TokenClass.THINK).all()
    assert (tags.calls[31:] == 0).all()


@pytest.mark.parametrize(
    "nested", ["[" * 900 + "]" * 900, '["[",' * 500 + "0" + "]" * 500, "[" + '"]\\"",' * 20000 + "1]"]
)
def test_deep_and_long_values_end_where_short_ones_do(nested):
    text = b'<tool_call>{"name": "f", "arguments": {"a": ' + nested.encode() + b', "b": 1}}</tool_call>'
    tags, _ = tag("tool_call", text)
    values = bytes(np.frombuffer(text, np.uint8)[tags.classes == TokenClass.ARG_VALUE])
    assert values == nested.encode() + b"1"
    python = b"[f(a=" + nested.encode() + b", b=1)]"
    tags, _ = tag("pythonic", python)
    assert bytes(np.frombuffer(python, np.uint8)[tags.classes == TokenClass.ARG_VALUE]) == nested.encode() + b"1"


def own_style(text: bytes, truncated: bool) -> list[tuple[int, int, TokenClass, int]]:
    return [(0, 1, TokenClass.CALL_NAME, 0), (1, 2, TokenClass.ARG_VALUE, 1)]


def wrong_style(text: bytes, truncated: bool) -> list[tuple[int, int, TokenClass, int]]:
    return [(0, len(text) + 1, TokenClass.CALL_NAME, 0)]


def test_a_style_of_ones_own(monkeypatch):
    own = types.SimpleNamespace(a=own_style, b=wrong_style)
    monkeypatch.setitem(sys.modules, "own_styles", own)
    monkeypatch.setattr(config, "_trusted_by_user", ["own_styles.a", "own_styles.b"])
    tags, following = tag_turn(b"xyz", style="own_styles.a", first_call=3)
    assert (tags.calls.tolist(), following) == ([3, 4, -1], 5)
    with pytest.raises(UserError, match="own_styles.b"):
        tag_turn(b"xyz", style="own_styles.b")


@pytest.mark.parametrize(
    ("style", "markers"), [("xlm", None), ("no.such.module", None), ("custom", None), ("react", CUSTOM)]
)
def test_a_wrong_style_is_refused_by_name(style, markers):
    with pytest.raises(UserError, match=style):
        tag_turn(b"", style=style, markers=markers)


def parts(text: str, kind: TokenClass, tags: Tags) -> list[str]:
    """The runs of bytes of one class, split where the call changes."""
    data, runs = text.encode(), []
    hits = np.flatnonzero(tags.classes == kind)
    for run in np.split(hits, np.flatnonzero(np.diff(hits) > 1) + 1):
        if len(run):
            runs.append(data[run[0] : run[-1] + 1].decode())
    return runs


@needs_shared
def test_real_xml_calls_have_the_names_and_values_a_parser_finds():
    lines = (SHARED / "swe-smith/tests/test_logs/ft_xml_example.jsonl").read_text().splitlines()
    turns = [m["content"] for line in lines for m in json.loads(line)["messages"] if m["role"] == "assistant"]
    texts = [turn if isinstance(turn, str) else "".join(part["text"] for part in turn) for turn in turns]
    assert len(texts) > 90
    for text in texts:
        tags, _ = tag_turn(text.encode(), style="auto")
        assert parts(text, TokenClass.CALL_NAME, tags) == re.findall(r"<function=([^>]+)>", text)
        assert parts(text, TokenClass.ARG_NAME, tags) == re.findall(r"<parameter=([^>]+)>", text)
        values = re.findall(r"<parameter=[^>]+>\n?(.*?)\n?</parameter>", text, re.DOTALL)
        assert parts(text, TokenClass.ARG_VALUE, tags) == [value for value in values if value]


@needs_shared
def test_real_hermes_calls_have_the_names_and_arguments_a_json_parser_finds():
    outputs = [
        record["output"] for record in json.loads((SHARED / "toolrl/dataset/rlla_4k_raw/rlla_sft.json").read_text())
    ]
    compared = 0
    for text in outputs:
        tags, _ = tag_turn(text.encode(), style="auto")
        body = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
        block = re.search(r"<tool_call>(.*?)</tool_call>", body, re.DOTALL)
        calls = [json.loads(line) for line in block.group(1).strip().splitlines()] if block else []
        compared += len(calls)
        names = [json.loads(f'"{name}"') for name in parts(text, TokenClass.CALL_NAME, tags)]
        assert names == [call["name"] for call in calls], text
        keys = [key for call in calls for key in call["parameters"]]
        assert [json.loads(f'"{key}"') for key in parts(text, TokenClass.ARG_NAME, tags)] == keys, text
        values = [value for call in calls for value in call["parameters"].values() if value != ""]
        found = parts(text, TokenClass.ARG_VALUE, tags)
        assert [
            json.loads(f'"{spelled}"' if isinstance(value, str) else spelled)
            for spelled, value in zip(found, values, strict=True)
        ] == values, text
        assert int(tags.calls.max(initial=-1)) + 1 == len(calls)
    assert compared > 500


@needs_shared
def test_real_commands_in_fences_are_values():
    folder = SHARED / "swe-agent/trajectories/demonstrations"
    texts = []
    for path in sorted(folder.rglob("*.traj")):
        history = json.loads(path.read_text())["history"]
        texts += [m["content"] for m in history if m["role"] == "assistant" and isinstance(m["content"], str)]
    texts = [text for text in texts if text.count("```") == 2]
    assert len(texts) > 50
    for text in texts:
        tags, _ = tag_turn(text.encode(), style="fenced")
        command = re.search(r"^```\n(.*?)\n?^```", text, re.DOTALL | re.MULTILINE)
        assert command is not None
        assert parts(text, TokenClass.ARG_VALUE, tags) == ([command.group(1)] if command.group(1) else [])
