"""Which conversations are refused, with which reason, and which must not be."""

import math

import pytest

from torchtune_agent.data.conversation import Conversation, Message, Role, ToolCall
from torchtune_agent.data.reasons import REASON_CODES, BadRecord
from torchtune_agent.data.validate import check

U = Message(Role.USER, "hi")
A = Message(Role.ASSISTANT, "hello")
XML = Message(Role.ASSISTANT, "Look.\n<function=ls>\n</function>")


def call(*ids: str | None, content: str = "") -> Message:
    return Message(Role.ASSISTANT, content, tool_calls=[ToolCall(f"f{i}", "{}", id) for i, id in enumerate(ids)])


def result(id: str | None = None, content: str = "ok") -> Message:
    return Message(Role.TOOL, content, tool_call_id=id)


GOOD = {
    "plain": [Message(Role.SYSTEM, ""), U, A],
    "assistant first": [A, U, A],
    "assistant twice": [U, A, A],
    "result by id": [U, call("a"), result("a"), A],
    "parallel in any order": [U, call("a", "b"), result("b"), result("a"), A],
    "parallel without ids": [U, call(None, None), result(), result(), A],
    "results without ids": [U, call("a", "b"), result(), result(), A],
    "calls without ids": [U, call(None), result("x"), A],
    "one result for all": [U, call(None, None, None), result(), A],
    "same id twice": [U, call("a", "a"), result("a"), result("a"), A],
    "empty result": [U, call("a"), result("a", ""), A],
    "last call open": [U, call("a")],
    "last calls half answered": [U, call("a", "b"), result("a")],
    "text call, tool role": [U, XML, result(), result(), A],
    "text call, user turn": [U, XML, U, A],
    "python call as text": [U, Message(Role.ASSISTANT, "[f(a=1)]"), result(), A],
    "reasoning only": [U, Message(Role.ASSISTANT, reasoning="hm")],
    "some untrained": [U, Message(Role.ASSISTANT, "no", train=False), U, A],
    "arguments that are code": [U, Message(Role.ASSISTANT, tool_calls=[ToolCall("python", "l = [" * 300)])],
}


@pytest.mark.parametrize("name", GOOD)
def test_accepted(name):
    check(Conversation(GOOD[name]))


DEEP = "[" * 3000 + "]" * 3000
BAD = {
    "wrong_type": [
        [],
        [U, {"role": "assistant"}],
        [U, Message(Role.ASSISTANT, None)],  # pyright: ignore[reportArgumentType]
        [U, Message(Role.ASSISTANT, "x", weight=math.nan)],
        [U, Message(Role.ASSISTANT, "x", train="yes")],  # pyright: ignore[reportArgumentType]
        [U, Message(Role.ASSISTANT, tool_calls=[ToolCall("f", {})])],  # pyright: ignore[reportArgumentType]
        [Message(Role.USER, "x", tool_calls=[ToolCall("f", "{}")]), A],
    ],
    "unknown_role": [[Message("critic", "x"), A]],  # pyright: ignore[reportArgumentType]
    "bad_tool_call": [[U, Message(Role.ASSISTANT, tool_calls=[ToolCall(" ", "{}")])]],
    "empty_turn": [
        [Message(Role.USER, " \n"), A],
        [U, Message(Role.ASSISTANT, "")],
        [U, Message(Role.ASSISTANT, "\t"), A],
    ],
    "orphan_tool_result": [
        [result(), A],
        [U, result(), A],
        [U, A, result(), A],
        [U, call("a"), result("b"), A],
        [U, call("a"), result("a"), result("a"), A],
        [U, call(None), result(), result(), A],
        [U, call("a"), result("a"), A, result("a"), A],
    ],
    "missing_tool_result": [
        [U, call("a"), A],
        [U, call("a"), U, A],
        [U, call("a"), call("b"), result("b"), A],
        [U, call("a", "b"), result("a"), A],
        [U, call(None), U, A],
        [U, call("a", content="<function=x>"), U, A],
    ],
    "nothing_to_train": [
        [U],
        [U, Message(Role.ASSISTANT, "x", train=False)],
        [U, Message(Role.ASSISTANT, "x", weight=0.0)],
    ],
    "nul": [
        [U, Message(Role.ASSISTANT, "a\0")],
        [U, Message(Role.ASSISTANT, tool_calls=[ToolCall("f", '{"a": "\\u0000"}')])],
    ],
    "lone_surrogate": [
        [Message(Role.USER, "\ud800"), A],
        [U, Message(Role.ASSISTANT, "x", reasoning="\udfff")],
        [U, Message(Role.ASSISTANT, tool_calls=[ToolCall("f", '{"a": "\\ud800"}')])],
    ],
    "too_deep": [[U, Message(Role.ASSISTANT, tool_calls=[ToolCall("f", DEEP)])]],
}


@pytest.mark.parametrize(("code", "messages"), [(code, messages) for code, cases in BAD.items() for messages in cases])
def test_refused(code, messages):
    with pytest.raises(BadRecord) as error:
        check(Conversation(messages))
    assert error.value.code == code
    assert error.value.detail and str(error.value) == f"{code}: {error.value.detail}"


def test_tools_are_looked_into():
    deep: dict = {}
    for _ in range(3000):
        deep = {"a": deep}
    for tools, code in (
        ([deep], "too_deep"),
        ([{"a": ["\0"]}], "nul"),
        ([{"\ud800": 1}], "lone_surrogate"),
        (["f"], "wrong_type"),
    ):
        with pytest.raises(BadRecord) as error:
            check(Conversation([U, A], tools))  # pyright: ignore[reportArgumentType]
        assert error.value.code == code


def test_codes_are_distinct_words():
    assert len(set(REASON_CODES)) == len(REASON_CODES) and all(code.replace("_", "").isalnum() for code in REASON_CODES)
