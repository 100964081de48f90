"""Byte tags of assistant turns against the naive tagger, on regular turns and on hostile ones."""

import random
from typing import Any

import numpy as np
import pytest

from tests.reference import tag_text
from torchtune_agent.data.tagging import CallMarkers, Tags, tag_turn, tags_per_token
from torchtune_agent.data.token_class import TokenClass

PIECES = [
    "<function=",
    "<function=get_weather>",
    "<function=søk\n>",
    "<function=>",
    "</function>",
    "<parameter=",
    "<parameter=city>",
    "<parameter=naïve key>",
    "<parameter=>",
    "</parameter>",
    "<tool_call>",
    "</tool_call>",
    "<func",
    "</func",
    "\n",
    "\n\n",
    " ",
    ">",
    "<",
    "/",
    "I look it up.",
    "Zoë — déjà vu e\u0301",
    "東京の天気は？",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    '{"a": [1, 2]}',
    "a<b>c",
]


def regular_turn(rng: random.Random) -> str:
    parts = []
    for _ in range(rng.randrange(4)):
        parts.append(rng.choice(["", "Thinking.\n", "考えます。", "👩‍🚀 ok\n\n"]))
        parts.append(f"<function={rng.choice(['add', 'get_weather', '検索'])}>\n")
        for _ in range(rng.randrange(4)):
            value = rng.choice(["", "7", "two\nlines", "\nkept\n", "Zoë 👩‍🚀", "a < b > c", "<parameter=x>"])
            parts.append(f"<parameter={rng.choice('abc')}>{rng.choice(['', chr(10)])}{value}\n</parameter>\n")
        parts.append("</function>")
    return "".join(parts) + rng.choice(["", "Done.", "完了"])


def hostile_turn(rng: random.Random) -> str:
    return "".join(rng.choices(PIECES, k=rng.randrange(1, 12)))


def expected_bytes(data: bytes, truncated: bool, **markers: Any) -> tuple[list[int], list[int]]:
    """The naive tags, one per byte; half a character at the end counts as a character."""
    whole = data.decode("utf-8", "ignore")
    rest = len(data) - len(whole.encode())
    tags, _ = tag_text(whole + ("\ufffd" if rest else ""), truncated, **markers)
    sizes = [len(char.encode()) for char in whole] + [rest]
    spread = [tag for tag, size in zip(tags, sizes, strict=False) for _ in range(size)]
    return [int(kind) for kind, _ in spread], [call for _, call in spread]


def check(data: bytes, truncated: bool) -> None:
    tags, _ = tag_turn(data, truncated=truncated)
    classes, calls = expected_bytes(data, truncated)
    assert tags.classes.tolist() == classes, (data, truncated)
    assert tags.calls.tolist() == calls, (data, truncated)


@pytest.mark.parametrize("make", [regular_turn, hostile_turn])
def test_a_thousand_turns_are_tagged_as_the_naive_tagger_does(make):
    rng = random.Random(0)
    for _ in range(1000):
        data = make(rng).encode()
        check(data, truncated=False)
        check(data, truncated=True)


def test_a_turn_cut_at_any_byte_is_tagged_as_the_naive_tagger_does():
    rng = random.Random(1)
    for _ in range(12):
        data = regular_turn(rng).encode()
        for cut in range(len(data) + 1):
            check(data[:cut], truncated=True)
            check(data[:cut], truncated=False)


def test_a_cut_never_changes_what_is_a_call_before_it():
    rng = random.Random(2)
    for _ in range(20):
        data = regular_turn(rng).encode()
        whole, _ = tag_turn(data)
        in_call = whole.calls >= 0
        for cut in range(len(data)):
            tags, _ = tag_turn(data[:cut], truncated=True)
            start_tag_is_cut = any(data[:cut].endswith(b"<function="[:n]) for n in range(1, 10))
            if not start_tag_is_cut:
                assert ((tags.calls >= 0) == in_call[:cut]).all(), data[:cut]
                assert (tags.calls == whole.calls[:cut]).all(), data[:cut]


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("ok", "rr"),
        ("<function=f></function>", "s" * 10 + "n" + "s" * 12),
        ("<function=f>x", "r" * 13),
        ("</function>x<function=", "r" * 22),
        ("<parameter=a>1</parameter>", "r" * 26),
        ("<function=f><parameter=a>\n1\n</parameter></function>", "s" * 10 + "ns" + "s" * 11 + "ass" + "v" + "s" * 24),
        ("<function=f><parameter=a>12</function>", "s" * 10 + "ns" + "s" * 11 + "as" + "vv" + "s" * 11),
    ],
)
def test_tags_written_out_by_hand(text, kinds):
    names = dict(zip("rsnav", ("REASONING", "CALL_SYNTAX", "CALL_NAME", "ARG_NAME", "ARG_VALUE"), strict=True))
    tags, _ = tag_turn(text.encode())
    assert [TokenClass(int(c)).name for c in tags.classes] == [names[k] for k in kinds]
    assert [k.name for k, _ in tag_text(text, False)[0]] == [names[k] for k in kinds]  # the truth is checked too


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("<function=fg</function>", "s" * 10 + "nn" + "s" * 11),
        ("<function=f><parameter=ab</function>", "s" * 10 + "ns" + "s" * 11 + "aa" + "s" * 11),
    ],
)
def test_an_unclosed_name_does_not_swallow_the_closing_tag(text, kinds):
    tags, _ = tag_turn(text.encode())
    order = {TokenClass.CALL_SYNTAX: "s", TokenClass.CALL_NAME: "n", TokenClass.ARG_NAME: "a"}
    assert "".join(order[TokenClass(int(c))] for c in tags.classes) == kinds


def test_only_an_open_block_of_a_cut_turn_is_a_call():
    text = b"Hm. <function=f>\n<parameter=a>\n1"
    assert (tag_turn(text, truncated=False)[0].calls == -1).all()
    calls = tag_turn(text, truncated=True)[0].calls
    assert (calls[:4] == -1).all() and (calls[4:] == 0).all()


def test_calls_are_numbered_through_the_conversation():
    text = b"<function=f></function> and <function=g></function>"
    tags, following = tag_turn(text, first_call=5)
    assert following == 7
    assert sorted(set(tags.calls.tolist())) == [-1, 5, 6]
    assert tags.calls[0] == 5 and tags.calls[-1] == 6


def test_other_markers_open_and_close_blocks():
    rng = random.Random(3)
    markers = CallMarkers("<tool_call>", "</tool_call>")
    calls = ['<tool_call>\n{"name": "é"}\n</tool_call>', "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>"]
    for _ in range(500):
        text = "".join(rng.choices(PIECES + calls * 3, k=rng.randrange(1, 9)))
        for truncated in (False, True):
            tags, _ = tag_turn(text.encode(), truncated=truncated, markers=markers)
            classes, numbers = expected_bytes(text.encode(), truncated, start="<tool_call>", end="</tool_call>")
            assert tags.classes.tolist() == classes, (text, truncated)
            assert tags.calls.tolist() == numbers, (text, truncated)


def test_an_unclosed_value_does_not_swallow_the_closing_marker():
    text = "<tool_call><function=f><parameter=a>1</tool_call>"
    tags, _ = tag_turn(text.encode(), markers=CallMarkers("<tool_call>", "</tool_call>"))
    values = [char for char, kind in zip(text, tags.classes, strict=True) if kind == TokenClass.ARG_VALUE]
    assert "".join(values) == "1"


def test_a_function_tag_inside_other_markers_is_told_apart():
    text = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
    tags, _ = tag_turn(text.encode(), markers=CallMarkers("<tool_call>", "</tool_call>"))
    assert tags.classes.tolist() == expected_bytes(text.encode(), False, start="<tool_call>", end="</tool_call>")[0]
    assert (tags.classes == TokenClass.CALL_NAME).sum() == 1
    assert (tags.classes == TokenClass.ARG_VALUE).sum() == 1


def test_an_empty_turn_has_no_tags():
    tags, following = tag_turn(b"", first_call=3)
    assert len(tags.classes) == len(tags.calls) == 0 and following == 3


class Reads(bytes):
    """Bytes that count how many of them every search may have looked at."""

    seen = 0

    def find(self, what, start=0, end=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        end = len(self) if end is None else end
        found = super().find(what, start, end)
        Reads.seen += (found if found >= 0 else end) - start
        return found

    def rfind(self, what, start=0, end=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        end = len(self) if end is None else end
        found = super().rfind(what, start, end)
        Reads.seen += end - max(found, start)
        return found

    def __getitem__(self, key):  # pyright: ignore[reportIncompatibleMethodOverride]
        found = super().__getitem__(key)
        Reads.seen += len(found) if isinstance(found, bytes) else 1
        return found


@pytest.mark.parametrize(
    "pattern",
    [
        b"<function=",
        b"</function>",
        b"<function=f>",
        b"<function=f><parameter=a>",
        b"<function=f></function>",
        b"x<think></think>",
    ],
)
@pytest.mark.parametrize("truncated", [False, True])
def test_the_bytes_looked_at_grow_in_proportion_to_the_text(pattern, truncated):
    def cost(repeats: int, tail: bytes) -> int:
        Reads.seen = 0
        tag_turn(Reads(pattern * repeats + tail), truncated=truncated)
        return Reads.seen

    for tail in (b"", b"</function>"):
        small, large = cost(200, tail), cost(3200, tail)
        assert small > 0
        assert large <= 24 * small + 1000, "sixteen times the text took much more than sixteen times the search"


def test_a_token_takes_the_highest_class_and_the_call_of_the_bytes_it_covers():
    rng = random.Random(4)
    for _ in range(300):
        data = regular_turn(rng).encode() or b"x"
        tags, _ = tag_turn(data)
        starts = np.array(sorted({0, *rng.choices(range(len(data)), k=rng.randrange(1, 9))}))
        folded = tags_per_token(tags, starts)
        for token, (a, b) in enumerate(zip(starts, [*starts[1:], len(data)], strict=True)):
            assert folded.classes[token] == max(tags.classes[a:b])
            covered = {int(c) for c in tags.calls[a:b]} - {-1}
            assert int(folded.calls[token]) in (covered or {-1})


def test_folding_one_byte_per_token_changes_nothing():
    tags, _ = tag_turn(b"a<function=f><parameter=k>v</parameter></function>b")
    folded = tags_per_token(Tags(tags.classes, tags.calls), np.arange(len(tags.classes)))
    assert (folded.classes == tags.classes).all() and (folded.calls == tags.calls).all()
