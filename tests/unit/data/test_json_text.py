"""JSON that keeps its spelling, and the reason given for every kind of broken line."""

import copy
import io
import json
import pickle
import random
import re

import pytest

from torchtune_agent.data.json_text import (
    MAX_DEPTH,
    SpelledFloat,
    check_depth,
    check_texts,
    dumps,
    loads,
    parse_line,
    parse_list,
)
from torchtune_agent.data.reasons import BadRecord
from torchtune_agent.errors import UserError


def code_of(line: bytes, *, last: bool = False, first: bool = False, max_bytes: int = 10**6) -> str:
    with pytest.raises(BadRecord) as error:
        parse_line(line, last=last, first=first, max_bytes=max_bytes)
    return error.value.code


@pytest.mark.parametrize(
    "text",
    [
        '{"b": 1.0, "a": 1e5, "c": 1E+5, "d": 1.10, "e": -0, "f": -0.0, "g": 0.1, "h": 1e400}',
        '{"big": 123456789012345678901234567890, "precise": 0.1234567890123456789012345}',
        '{"when": "2024-01-01T00:00:00Z", "null": null, "yes": [true, false], "empty": [{}, [], ""]}',
        '{"text": "é 👩‍🚀 \\" \\\\ / \\n \\t \\u001b \u2028"}',
        "[" + "7" * 5000 + "]",
        '[1, "a", {"a": {"z": 1, "b": 2}}]',
    ],
)
def test_reading_and_writing_gives_the_same_text(text):
    assert dumps(loads(text)) == text


def test_spacing_and_escapes_are_those_of_chat_templates():
    assert dumps(loads('{"a":1,"b":["\\u00e9","\\/"]}')) == '{"a": 1, "b": ["é", "/"]}'
    value = {"a": [1, 2.5, None, True, "é\n"], "b": {}}
    assert dumps(value) == json.dumps(value, ensure_ascii=False)


def test_random_values_are_written_as_json_does():
    rng = random.Random(0)

    def value(depth: int):
        kind = rng.randrange(7 if depth else 5)
        if kind == 5:
            return [value(depth - 1) for _ in range(rng.randrange(4))]
        if kind == 6:
            return {rng.choice('äb\n"c') + str(i): value(depth - 1) for i in range(rng.randrange(4))}
        plain = [
            rng.randrange(-(10**20), 10**20),
            rng.uniform(-1e9, 1e9),
            rng.choice([True, False, None]),
            "é\\\u0001",
            "",
        ]
        return plain[kind]

    for _ in range(500):
        one = value(4)
        text = json.dumps(one, ensure_ascii=False)
        assert dumps(one) == text and dumps(loads(text)) == text and loads(text) == one


def test_a_spelled_number_is_a_float_and_survives_copies():
    number = loads("1e5")
    assert isinstance(number, SpelledFloat) and number == 100000.0 and number + 1 == 100001.0
    assert json.dumps([number]) == "[100000.0]"
    assert type(loads("1.5")) is float and type(loads("15")) is int
    for twin in (copy.deepcopy(number), pickle.loads(pickle.dumps(number))):
        assert twin.text == "1e5" and twin == number


def test_dumps_refuses_what_json_has_no_text_for():
    for value in ({1: 2}, {"a": object()}, [b"x"]):
        with pytest.raises(TypeError):
            dumps(value)


def test_good_lines():
    for line in (b'{"a": 1}', b'{"a": 1}\n', b'{"a": 1}\r\n', b'  {"a": 1} '):
        assert parse_line(line, last=True) == {"a": 1}
    assert parse_line(b'\xef\xbb\xbf{"a": 1}\n', last=False, first=True) == {"a": 1}
    assert parse_line(b'{"a": "\\ud83d\\ude00 \\\\ud800 \\\\u0000"}', last=False) == {"a": "😀 \\ud800 \\u0000"}
    assert parse_line(b'{"a": "x"}', last=False, max_bytes=10) == {"a": "x"}


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"a": }\n', "broken_json"),
        (b'{"a": 1\n', "broken_json"),
        (b"{'a': 1}\n", "broken_json"),
        (b'{"a": 1} x\n', "broken_json"),
        (b'{"a": "\x01"}\n', "broken_json"),
        (b"   \n", "broken_json"),
        (b"", "broken_json"),
        (b'{"a": "\xff"}\n', "invalid_utf8"),
        (b'{"a": "\xe4\xbd"}\n', "invalid_utf8"),
        (b'{"a": "\xed\xa0\x80"}\n', "invalid_utf8"),
        (b'\xef\xbb\xbf{"a": 1}\n', "bom"),
        ('{"a": 1}'.encode("utf-16"), "bom"),
        (b'{"a": "\x00"}\n', "nul"),
        (b'{"a": "\\u0000"}\n', "nul"),
        (b'{"a": {"b\\u0000": 1}}\n', "nul"),
        (b'{"a": "\\ud800"}\n', "lone_surrogate"),
        (b'{"a": [["\\uDC00x"]]}\n', "lone_surrogate"),
        (b"[1, 2]\n", "wrong_type"),
        (b'"text"\n', "wrong_type"),
        (b"null\n", "wrong_type"),
        (b"7\n", "wrong_type"),
        (b'{"a": 1, "a": 2}\n', "duplicate_key"),
        (b'{"a": ' + b"[" * 3000 + b"]" * 3000 + b"}\n", "too_deep"),
        (b'{"a": ' + b'{"a":' * 3000 + b"1" + b"}" * 3000 + b"}\n", "too_deep"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "too_deep"),
        (b'{"a": ' + b"[" * 100_000, "too_deep"),
        (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}\n", "too_deep"),
    ],
    ids=lambda value: value[:24] if isinstance(value, bytes) else value,
)
def test_broken_lines(line, code):
    assert code_of(line) == code


def test_a_cut_last_line_is_told_from_a_broken_one():
    whole = '{"messages": [{"role": "user", "content": "né\\u00e9\\n"}], "id": 12.5, "ok": true}'.encode()
    for end in range(1, len(whole)):
        assert code_of(whole[:end], last=True) == "truncated_last_line", whole[:end]
        assert code_of(whole[:end] + b"\n", last=True) in ("broken_json", "invalid_utf8")
    assert code_of(b"{'a': 1}", last=True) == "broken_json"


def test_a_huge_line_is_never_parsed():
    assert code_of(b"[" * 1001, max_bytes=1000) == "too_long_line"
    with pytest.raises(BadRecord, match="too_long_line"):
        parse_line(b"x" * 100_000_001, last=False)


def test_values_that_were_not_read_from_text():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(BadRecord, match="too_deep"):
        check_depth(deep)
    check_depth([[[]]] * 1000)
    for value, code in (({"a": ["x\0"]}, "nul"), ({"\ud800": 1}, "lone_surrogate")):
        with pytest.raises(BadRecord, match=code):
            check_texts(value)


def random_value(rng: random.Random, depth: int = 0):
    kind = rng.randrange(7 if depth < 3 else 5)
    if kind == 5:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return {f"k{i}": random_value(rng, depth + 1) for i in range(rng.randrange(4))}
    return [rng.randint(-(10**6), 10**6), rng.random() * 1e5, 'é👩‍🚀x"\\' * rng.randrange(5), None, True][kind]


def test_a_list_is_read_element_by_element_wherever_its_blocks_end():
    rng = random.Random(0)
    for _ in range(1000):
        rows = [random_value(rng) for _ in range(rng.randrange(6))]
        text = json.dumps(rows, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))
        file = io.BytesIO(rng.choice([b"", b"\xef\xbb\xbf"]) + text.encode())
        assert list(parse_list(file, "f", rng.choice([1, 2, 3, 7, 50]))) == rows


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (b"[", "f[0]"),
        (b"[1", "f[1]"),
        (b"[1,", "f[1]"),
        (b"[1 2]", "f[1]"),
        (b"[1] x", "f[1]"),
        (b"[,1]", "f[0]"),
        (b"[1,]", "f[1]"),
        (b'["a", "\xff"]', "f[1]"),
        (b"[{}, [[[[}", "f[1]"),
        (b"[1, " + b"[" * 100_000, "f[1]"),
    ],
)
def test_a_list_that_is_broken_is_refused_where_it_is(text, place):
    with pytest.raises(UserError, match=re.escape(f"{place}: ")):
        list(parse_list(io.BytesIO(text), "f", 2))


def test_an_element_that_repeats_a_key_does_not_end_the_list():
    first, second, third = parse_list(io.BytesIO(b'[{"a": 1}, {"a": 1, "a": 2}, 3]'), "f")
    assert (first, third) == ({"a": 1}, 3) and second.code == "duplicate_key"
