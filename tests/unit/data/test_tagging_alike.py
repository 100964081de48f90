"""Items written alike are tagged many at a time: the tags must be those of reading them one by one."""

import random
import re

import pytest

from torchtune_agent.data.tagging import CallMarkers, alike, tag_turn

# what a text may begin with, and what may then come over and over
REPEATED = {
    "": [
        "<function=f><parameter=a>1</parameter></function>\n",
        "<think>x</think>\n<function=f></function>",
        "<think>x</think>",
        '<tool_call>{"name": "f", "arguments": {"a": 1, "b": "x"}}</tool_call>',
        "<tool_call><function=f></function><function=g></function></tool_call>",
        '[TOOL_CALLS]f{"a": 1}',
        '[TOOL_CALLS][{"name": "f"}]\n',
        "<|python_tag|>f.call(a=1)\n",
        "Action: f[x]\n",
        "Action:\n",
        'Action: f\nAction Input: {"a": 1}\n',
        "Thought: x\nAction: f\nAction Input: x\nObservation: 1\n",
        "\n```\nls\n```",
        "\n```sh\nls\n```\n",
        "\n```py\n```",
        "<<CALL>>ls<<END>>",
        "CALL ls END",
        "[f(a=1)]<think>x</think>",
        '{"name": "f", "parameters": {}}',
    ],
    "<function=f>": ["<parameter=a>1</parameter>", "<parameter=a>\n1\n</parameter>\n"],
    "<tool_call>": ["<function=f><parameter=a>1</parameter></function>", '{"name": "f", "arguments": {"a": 1}}; '],
    '<tool_call>{"name": "f", "arguments": {"a": 1': [', "a": 1', ', "a": "x", "b": [2]'],
    '<tool_call>{"name": "f", "args": {}': [', "id": "x"', ', "args": {"a": 1}'],
    '[TOOL_CALLS][{"name": "f"}': [', {"name": "f", "arguments": {"a": 1}}'],
    '[{"name": "f", "parameters": {}}': [', {"name": "f", "parameters": {"a": 1}}', ',{"parameters":[],"name":"f"}'],
    "[": ["f(a=1), ", "f('x'), g(1), ", "f(),"],
    "[f(": ["a=1, ", "1,", "a='x',"],
    "CALL": ['{"name": "f"}'],
}
BETWEEN = [
    *(unit for units in REPEATED.values() for unit in units),
    "", "<function=f>", "</function>", "<think>", "</think>", "<tool_call>", "</tool_call>", "[", "]", "{", "}",
    ")", "'", '"', "\\", ",", "\n", "é", "word", "7", 'a"\\",',
]  # fmt: skip
MARKERS = {"custom": CallMarkers("<<CALL>>", "<<END>>"), "words": CallMarkers("CALL", "END")}


def other_words(text: str, rng: random.Random) -> str:
    """The text with other words and numbers in it, and now and then with something that is none."""
    words = ["f", "city", "_a1", "name", "call", "think", "xENDx", "x" * 40, "0", "42", "1a", "é", "a b"]
    return re.sub(r"\b(?:[a-gx]|\d|ls)\b", lambda m: rng.choice(words) if rng.random() < 0.1 else m[0], text)


def repeated(rng: random.Random) -> bytes:
    """One or two units over and over, with something else in between, perhaps cut."""
    opening, known = rng.choice([("", REPEATED[""]), *REPEATED.items()])
    units = rng.choices(known, k=rng.choice([1, 1, 1, 2]))
    parts = [opening]
    for _ in range(rng.randrange(1, 4)):
        parts += [other_words(unit, rng) for _ in range(rng.randrange(30)) for unit in units]
        parts += rng.choices(BETWEEN, k=rng.randrange(3))
    text = "".join(parts).encode()
    return text[: rng.randrange(len(text) + 1)] if rng.random() < 0.5 else text


@pytest.mark.parametrize(
    "style", ["xml", "tool_call", "llama3", "mistral", "pythonic", "react", "fenced", "auto", *MARKERS]
)
def test_repeated_items_are_tagged_as_one_by_one(style, monkeypatch):
    rng = random.Random(style)
    num_repeated, repeat = 0, alike._Unit.repeat

    def counted(*args):
        nonlocal num_repeated
        end, num_units = repeat(*args)
        num_repeated += num_units
        return end, num_units

    monkeypatch.setattr(alike._Unit, "repeat", counted)
    options = {"style": "custom" if style in MARKERS else style, "markers": MARKERS.get(style)}
    for where, name, value in ((alike, "_NUM_IN_UNIT", 2), (alike, "_WORTHWHILE", 0), (alike.Alike, "patience", 5)):
        monkeypatch.setattr(where, name, value)
    for _ in range(400):
        text = repeated(rng)
        for truncated in (False, True):
            monkeypatch.setattr(alike.Alike, "_left", len(text) + 2)  # no pattern is tried
            expected, following = tag_turn(text, truncated=truncated, first_call=2, **options)
            monkeypatch.setattr(alike.Alike, "_left", 3)
            tags, next_call = tag_turn(text, truncated=truncated, first_call=2, **options)
            assert (tags.classes == expected.classes).all() and (tags.calls == expected.calls).all(), text
            assert next_call == following, text
    assert num_repeated > 50
