"""The text form of calls: what is rendered is read back, and malformed text is reported, never raised."""

from typing import Any

import pytest

from torchtune_agent.toolworld import Call, Tool, parse_calls, render_call, strip_calls
from torchtune_agent.toolworld.tool import Usage, parameters

TOOL = Tool(
    name="save",
    description="Save values.",
    parameters=parameters(
        ("flag",), text="string", count="integer", share="number", flag="boolean", names="string[]", table="object"
    ),
    family="test",
    group="test",
    topic="tests",
    run=lambda state, arguments: "saved",
    usage=Usage(lambda rng, state: {}, ("", "", "", ""), "", ""),
)
TOOLS = {"save": TOOL}


def test_render_call_is_the_documented_form() -> None:
    assert render_call("get_price", {"item": "blue lamp", "quantity": 3}) == (
        "<function=get_price>\n<parameter=item>\nblue lamp\n</parameter>\n"
        "<parameter=quantity>\n3\n</parameter>\n</function>"
    )
    assert render_call("list_files", {}) == "<function=list_files>\n</function>"


@pytest.mark.parametrize(
    "arguments",
    [
        {"text": "Zoë 東京 🎉", "count": 3, "share": 2.5, "flag": True, "names": ["a", "b"], "table": {"blue lamp": 2}},
        {"text": "", "count": -1, "share": 1e300, "flag": False, "names": [], "table": {}},
        {"text": "3", "names": ["</function>"]},
        {"text": "  two\n\nlines \n"},
        {"text": "\n"},
        {"text": "</function>\n<function=save>"},
        {"text": "<parameter=count>"},
        {"text": "tab\tcarriage\r return"},
        {},
    ],
)
def test_round_trip(arguments: dict[str, Any]) -> None:
    text = f"I save it.\n{render_call('save', arguments)}"
    assert parse_calls(text, TOOLS) == [Call("save", arguments)]
    assert strip_calls(text) == "I save it."


def test_several_calls_are_read_in_order() -> None:
    first, second = render_call("save", {"text": "a"}), render_call("save", {"text": "b"})
    calls = parse_calls(f"Both.\n{first}\n{second}", TOOLS)
    assert [call.arguments["text"] for call in calls] == ["a", "b"]
    assert parse_calls("No call at all.", TOOLS) == []


def test_value_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(ValueError, match="</parameter>"):
        render_call("save", {"text": "a\n</parameter>"})
    with pytest.raises(ValueError, match="</parameter>"):
        render_call("save", {"text": "</parameter>"})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<function=save>\n<parameter=text>\nhello", "parameter 'text'"),
        ("<function=save>\n<parameter=text>\nhello\n</parameter>\n", "not closed by </function>"),
        ("<function=save>\nhello\n</function>", "not closed by </function>"),
        (
            "<function=save>\n<parameter=text>\na\n</parameter>\n<parameter=text>\nb\n</parameter>\n</function>",
            "given twice",
        ),
    ],
)
def test_malformed_calls_are_reported(text: str, problem: str) -> None:
    calls = parse_calls(text, TOOLS)
    assert len(calls) == 1
    assert problem in calls[0].error


def test_values_that_do_not_fit_stay_text() -> None:
    for value in ("three", "NaN", "[1,", "1" * 5000, "[" * 100_000):
        call = parse_calls(f"<function=save>\n<parameter=count>\n{value}\n</parameter>\n</function>", TOOLS)[0]
        assert call == Call("save", {"count": value})
    unknown = parse_calls("<function=other>\n<parameter=count>\n3\n</parameter>\n</function>", TOOLS)
    assert unknown == [Call("other", {"count": "3"})]


def test_key_ignores_argument_order_and_spelling_of_numbers() -> None:
    assert Call("f", {"a": 3, "b": [1.0]}).key() == Call("f", {"b": [1], "a": 3.0}).key()
    assert Call("f", {"a": True}).key() != Call("f", {"a": 1}).key()
    assert Call("f", {"a": "3"}).key() != Call("f", {"a": 3}).key()
