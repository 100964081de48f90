"""Every format on hand-written records."""

import json
from itertools import islice
from typing import Any

import pytest

from torchtune_agent.data.conversation import Conversation, Message, Role, ToolCall
from torchtune_agent.data.formats import convert, detect, rename_columns
from torchtune_agent.data.json_text import parse_line
from torchtune_agent.data.reasons import REASON_CODES, BadRecord
from torchtune_agent.data.validate import check
from torchtune_agent.toolworld import ToolWorld

ASK = {"role": "user", "content": "hi"}
SYSTEM, USER, ASSISTANT, TOOL = Role


def chat(*messages: Any, **columns: Any) -> list[Message]:
    return convert({"messages": [ASK, *messages], **columns}).messages[1:]


def code_of(record: Any, format: str = "auto") -> str:
    with pytest.raises(BadRecord) as error:
        check(convert(record, format))
    assert error.value.code in REASON_CODES and error.value.detail
    return error.value.code


# openai


@pytest.mark.parametrize(
    ("spelled", "arguments"),
    [
        ('{"arguments": "{\\"b\\":1.0,  \\"a\\": null}"}', '{"b":1.0,  "a": null}'),
        ('{"arguments": {"b": 1.0, "a": null, "when": "2024-01-01", "n": 1e5, "x": 1.10}}',
         '{"b": 1.0, "a": null, "when": "2024-01-01", "n": 1e5, "x": 1.10}'),
        ('{"arguments": {"b":[1,{"z":2,"a":"\\u00e9"}]}}', '{"b": [1, {"z": 2, "a": "é"}]}'),
        ('{"arguments": ""}', ""),
        ('{"arguments": "l = [1]\\n"}', "l = [1]\n"),
        ('{"arguments": null}', "{}"),
        ('{"parameters": {"a": 1}}', '{"a": 1}'),
        ("{}", "{}"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("style", ["nested", "flat", "legacy", "call role"])
def test_arguments_keep_their_spelling(spelled, arguments, style):
    call = '{"name": "f", ' + spelled[1:] if spelled != "{}" else '{"name": "f"}'
    message = {
        "nested": f'"role": "assistant", "content": null, "tool_calls": [{{"id": "c", "function": {call}}}]',
        "flat": f'"role": "assistant", "content": "", "tool_calls": [{call}]',
        "legacy": f'"role": "assistant", "content": null, "function_call": {call}',
        "call role": f'"role": "function_call", "content": {json.dumps(call)}',
    }[style]
    line = f'{{"messages": [{{"role": "user", "content": "hi"}}, {{{message}}}]}}'
    conversation = convert(parse_line(line.encode(), last=True))
    expected = ToolCall("f", arguments, "c" if style == "nested" else None)
    assert conversation.messages[1] == Message(ASSISTANT, "", tool_calls=[expected])


def test_parallel_calls_and_results():
    calls = [{"id": str(i), "type": "function", "function": {"name": f"f{i}", "arguments": "{}"}} for i in range(3)]
    said = chat(
        {"role": "assistant", "content": "On it.", "tool_calls": calls},
        *({"role": "tool", "tool_call_id": str(i), "name": f"f{i}", "content": {"n": i}} for i in range(3)),
    )
    assert [call.name for call in said[0].tool_calls] == ["f0", "f1", "f2"] and said[0].content == "On it."
    assert said[2] == Message(TOOL, '{"n": 1}', tool_call_id="1", name="f1")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, ""),
        ("", ""),
        (" a\r\n\x1b[0m ", " a\r\n\x1b[0m "),
        ([], ""),
        ([{"type": "text", "text": "a\n"}, {"type": "text", "value": "b"}], "a\nb"),
    ],
)
def test_content_in_every_shape(content, expected):
    for role in ("assistant", "user", "system", "tool"):
        assert chat({"role": role, "content": content})[0].content == expected


def test_bare_texts_are_parts_but_a_tool_answers_with_values():
    assert chat({"role": "user", "content": ["a", {"text": "b"}]})[0].content == "ab"
    for value in (["a", "b"], [{"type": "cafe"}], {"a": 1.5}, 3, True):
        assert chat({"role": "tool", "content": value})[0].content == json.dumps(value)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_the_content(key):
    assert chat({"role": "assistant", "content": "x", key: " hm\n"})[0].reasoning == " hm\n"
    assert chat({"role": "assistant", "content": "x", key: None})[0].reasoning is None
    assert chat({"role": "assistant", "content": "x", key: ""})[0].reasoning == ""
    assert chat({"role": "assistant", "content": "x", "reasoning": "a", "reasoning_content": "a"})[0].reasoning == "a"


def test_typed_parts():
    parts = [
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "id": "t1", "name": "ls", "input": {"b": 1, "a": 2}},
        {"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1.50}}'},
    ]
    answer = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "a.py"}]}
    said = chat(
        {"role": "assistant", "content": parts},
        {"role": "user", "content": [answer, {"type": "text", "text": "go on"}]},
    )
    calls = [ToolCall("ls", '{"b": 1, "a": 2}', "t1"), ToolCall("f", '{"x": 1.50}')]
    assert said == [
        Message(ASSISTANT, "I look.", "hm", calls),
        Message(TOOL, "a.py", tool_call_id="t1"),
        Message(USER, "go on"),
    ]


FLAT = {"name": "f", "description": "d", "parameters": {"type": "object"}}
WRAPPED = {"type": "function", "function": FLAT}


@pytest.mark.parametrize(
    ("columns", "tools"),
    [
        ({"tools": [WRAPPED]}, [WRAPPED]),
        ({"tools": json.dumps([WRAPPED])}, [WRAPPED]),
        ({"tools": json.dumps([FLAT])}, [WRAPPED]),
        ({"functions": [FLAT]}, [WRAPPED]),
        ({"tools": None, "functions": json.dumps([FLAT])}, [WRAPPED]),
        ({"tools": ""}, []),
        ({"tools": "[]"}, []),
        ({"tools": None}, []),
        ({}, []),
    ],
)
def test_tools(columns, tools):
    assert convert({"messages": [ASK], **columns}).tools == tools


def test_train_and_weight():
    said = chat(
        {"role": "assistant", "content": "a", "train": False, "weight": 0},
        {"role": "assistant", "content": "b", "train": True, "weight": 0.5},
        {"role": "assistant", "content": "c", "metadata": {"masked": True}},
        {"role": "assistant", "content": "d", "train": None, "weight": None},
    )
    assert [(m.train, m.weight) for m in said] == [(False, 0.0), (True, 0.5), (False, 1.0), (None, 1.0)]


def test_metadata_holds_the_small_things():
    record = {
        "messages": [ASK],
        "id": "r1",
        "task": 3,
        "reward": 0.5,
        "label": True,
        "long": "x" * 2000,
        "obj": {"a": 1},
    }
    record |= {"metadata": {"source": "web", "id": "inner", "list": [1]}}
    assert convert(record).metadata == {"source": "web", "id": "r1", "task": 3, "reward": 0.5, "label": True}


def test_a_logged_request_ends_with_its_response():
    answer = {"message": {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}}
    assert chat(response={"choices": [answer]}) == [Message(ASSISTANT, tool_calls=[ToolCall("f", "{}")])]


@pytest.mark.parametrize(
    ("code", "record"),
    [
        ("wrong_type", {"messages": {"role": "user"}}),
        ("wrong_type", {"messages": "hello"}),
        ("wrong_type", {"messages": []}),
        ("wrong_type", {"messages": ["hi"]}),
        ("wrong_type", {"messages": [{"content": "x"}]}),
        ("wrong_type", {"messages": [{"role": "user", "text": "x"}]}),
        ("wrong_type", {"messages": [{"role": "user", "content": 5}]}),
        ("wrong_type", {"messages": [ASK, {"role": "assistant", "content": "x", "train": 1}]}),
        ("wrong_type", {"messages": [ASK, {"role": "assistant", "content": "x", "weight": 10**400}]}),
        ("wrong_type", {"messages": [ASK, {"role": "assistant", "content": "x", "weight": -1}]}),
        ("wrong_type", {"messages": [ASK], "tools": "{"}),
        ("wrong_type", {"messages": [ASK], "tools": ["f"]}),
        ("wrong_type", {"messages": [ASK | {"tool_calls": [{"name": "f"}]}]}),
        ("wrong_type", {"messages": [ASK, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": 3}]}]}),
        ("wrong_type", {"messages": [ASK, {"role": "assistant", "reasoning": "a", "thinking": "b"}]}),
        ("unknown_role", {"messages": [{"role": "critic", "content": "x"}]}),
        ("unsupported_content", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}]}),
        ("unsupported_content", {"messages": [{"role": "assistant", "content": [FLAT | {"type": "tool_use"}, "x"]}]}),
        ("bad_tool_call", {"messages": [ASK, {"role": "assistant", "tool_calls": [{"arguments": "{}"}]}]}),
        ("bad_tool_call", {"messages": [ASK, {"role": "function_call", "content": "ls -la"}]}),
        ("bad_tool_call", {"messages": [ASK, {"role": "function_call", "content": "[]"}]}),
        ("empty_turn", {"messages": [ASK, {"role": "assistant", "content": None}]}),
        ("nothing_to_train", {"messages": [ASK]}),
        ("unknown_format", {"question": "q", "answer": "a"}),
        ("unknown_format", {}),
        ("unknown_format", {"conversations": [], "chosen": {}, "rejected": {}}),
    ],
)  # fmt: skip
def test_refused(code, record):
    assert code_of(record) == code


def test_an_unknown_format_names_the_keys_it_saw():
    with pytest.raises(BadRecord, match="question, answer"):
        detect({"question": 1, "answer": 2})


def test_deep_objects_in_memory_are_refused():
    deep: dict[str, Any] = {}
    for _ in range(3000):
        deep = {"a": deep}
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": deep}]}
    assert code_of({"messages": [ASK, call]}) == "too_deep"
    assert code_of({"messages": [ASK, {"role": "assistant", "content": "x"}], "tools": [deep]}) == "too_deep"
    assert code_of({"messages": [ASK], "tools": "[" * 3000}) == "too_deep"


# sharegpt, alpaca


@pytest.mark.parametrize(
    ("names", "role"),
    [
        (["system", "developer"], SYSTEM),
        (["human", "user", "Human"], USER),
        (["gpt", "assistant", "model", "bing", "chatgpt"], ASSISTANT),
        (["tool", "observation", "function_response", "function", "ipython"], TOOL),
    ],
)
def test_sharegpt_roles(names, role):
    for name in names:
        record = {"conversations": [{"from": "human", "value": "q"}, {"from": name, "value": " x "}]}
        assert detect(record) == "sharegpt"
        assert convert(record).messages[1] == Message(role, " x ")


def test_sharegpt_calls_join_the_turn_they_end():
    turns = [
        ("human", "q"),
        ("gpt", "I look."),
        ("function_call", '{"name": "f", "arguments": {"b": 1, "a": 2.0}}'),
        ("function_call", '[{"name": "g", "arguments": "{ }"}, {"name": "h"}]'),
        ("observation", "1"),
        ("observation", "2"),
        ("observation", "3"),
        ("gpt", "Done."),
    ]
    record = {
        "conversations": [{"from": who, "value": what} for who, what in turns],
        "system": "Be kind.",
        "tools": json.dumps([FLAT]),
    }
    conversation = convert(record)
    check(conversation)
    calls = [ToolCall("f", '{"b": 1, "a": 2.0}'), ToolCall("g", "{ }"), ToolCall("h", "{}")]
    assert conversation.tools == [WRAPPED]
    assert conversation.messages[:3] == [
        Message(SYSTEM, "Be kind."),
        Message(USER, "q"),
        Message(ASSISTANT, "I look.", tool_calls=calls),
    ]
    assert [m.role for m in conversation.messages[3:]] == [TOOL, TOOL, TOOL, ASSISTANT]


def test_sharegpt_flags_and_shapes():
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "train": False, "weight": 0.5}]
    assert convert({"messages": turns}).messages[1] == Message(ASSISTANT, "a", train=False, weight=0.5)
    roles = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert [m.content for m in convert({"conversations": roles}).messages] == ["q", "a"]
    assert code_of({"conversations": [{"from": "narrator", "value": "x"}]}) == "unknown_role"


def test_alpaca():
    record = {
        "instruction": "Add.",
        "input": "1 2\n",
        "output": " 3",
        "system": "s",
        "history": [["q", "a"]],
        "source": "x",
    }
    assert detect(record) == "alpaca"
    conversation = convert(record)
    assert [(m.role.value, m.content) for m in conversation.messages] == [
        ("system", "s"),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "Add.\n1 2\n"),
        ("assistant", " 3"),
    ]
    assert conversation.metadata == {"source": "x"}
    assert convert({"instruction": "Add.", "input": "", "output": "3"}).messages[0].content == "Add."
    assert code_of({"instruction": "", "input": None, "output": "x"}) == "empty_turn"
    assert code_of({"instruction": "x", "output": ["a"]}) == "wrong_type"
    assert code_of({"instruction": "x", "output": "a", "history": [["q"]]}) == "wrong_type"


# react, xml, trajectories

RUN = (
    "Thought: look\nAction: search[x]\nObservation: found\nin 1990\n\nThought 2: more\nAction: calc\n"
    "Action Input: 1+1\nObservation 2: 2\nFinal Answer: 2\nObservation: Episode finished, reward = True\n"
)


def test_react_observations_are_the_users():
    for record in (
        {"messages": [ASK, {"role": "assistant", "content": RUN}]},
        {"traj": f"Question: q?\n{RUN}", "gt": "2"},
        {"traj": f"Below is a task.\n\n### Instruction:\nq?\n\n### Response:\n{RUN}"},
    ):
        assert detect(record) == "react"
        conversation = convert(record)
        check(conversation)
        turns = [m for m in conversation.messages if m.role is not SYSTEM][1:]
        assert [m.role for m in turns] == [ASSISTANT, USER] * 3
        assert "\n".join(m.content for m in turns) == RUN
        assert turns[1].content == "Observation: found\nin 1990\n" and conversation.metadata["reward"] == 1.0


def test_react_with_the_turns_apart():
    turns = [ASK, {"role": "assistant", "content": "Thought: t\nAction: finish[x]"}]
    last = {"role": "user", "content": "Observation: Episode finished, reward = 0.25"}
    conversation = convert({"messages": [*turns, last]})
    assert [m.content for m in conversation.messages] == [m["content"] for m in [*turns, last]]
    assert conversation.metadata == {"reward": 0.25}
    assert convert({"traj": turns, "reward": False}).metadata == {"reward": False}


def test_prose_with_observations_is_not_react():
    essay = "A lab report.\nAction: we heat it.\nObservation: it melts."
    record = {"messages": [ASK, {"role": "assistant", "content": essay}]}
    assert detect(record) == "openai" and convert(record).messages[1].content == essay


def test_xml_is_kept_to_the_byte():
    text = "Look.\r\n<function=bash>\n<parameter=command>\nls \x1b[0m\n</parameter>\n</function>\n"
    record = {"messages": [ASK, {"role": "assistant", "content": text}, {"role": "tool", "content": ""}]}
    assert detect(record) == "xml"
    conversation = convert(record)
    check(conversation)
    assert conversation.messages[1] == Message(ASSISTANT, text)
    call = {"role": "assistant", "content": text, "tool_calls": [{"name": "f"}]}
    assert detect({"messages": [call]}) == "openai"
    assert code_of({"messages": [call]}, "xml") == "wrong_type"


def test_toolworld():
    for record in islice(ToolWorld(num_tools=40, seed=1).conversations("train", 50), 50):
        assert detect(record) == "toolworld"
        conversation = convert(record)
        check(conversation)
        assert [(m.role.value, m.content) for m in conversation.messages] == [
            (m["role"], m["content"]) for m in record["messages"]
        ]
        assert conversation.metadata["task"] == record["kind"] and conversation.metadata["id"] == record["id"]
        assert conversation.metadata["tool_names"] == record["tools"]


def test_tau_bench():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    traj = [
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": ""},
    ]
    conversation = convert({"task_id": 4, "reward": 1.0, "trial": 2, "info": {}, "traj": traj})
    assert conversation.messages[1] == Message(ASSISTANT, tool_calls=[ToolCall("f", '{"a":1}', "c")])
    assert conversation.metadata == {"source": "tau_bench", "task": 4, "task_id": 4, "reward": 1.0, "trial": 2}


def test_swe_agent_variants():
    call = {"id": "c", "function": {"name": "ls", "arguments": "{}"}}
    demo = {"role": "assistant", "content": "shown", "agent": "main", "is_demo": True}
    act = {"role": "assistant", "content": "t", "thought": "t", "action": "ls", "agent": "main", "tool_calls": [call]}
    seen = {"role": "tool", "content": [{"type": "text", "text": "a\r\n"}], "agent": "main", "tool_call_ids": ["c"]}
    record = {
        "history": [ASK | {"agent": "main"}, demo, act, seen],
        "info": {"exit_status": "submitted", "model_stats": {}},
    }
    assert detect(record) == "swe_agent"
    conversation = convert(record)
    assert [m.train for m in conversation.messages] == [None, False, None, None]
    assert conversation.messages[2:] == [
        Message(ASSISTANT, "t", tool_calls=[ToolCall("ls", "{}", "c")]),
        Message(TOOL, "a\r\n", tool_call_id="c"),
    ]
    assert conversation.metadata == {"source": "swe_agent", "exit_status": "submitted"}
    assert code_of({"history": [ASK | {"agent": "main"}, demo | {"agent": "other"}]}) == "unsupported_content"

    steps = [{"response": f"r{i}", "observation": f"o{i}", "query": [ASK]} for i in range(2)]
    assert [m.content for m in convert({"trajectory": steps}).messages] == ["hi", "r0", "o0", "r1", "o1"]
    mini = {
        "messages": [ASK, {"role": "assistant", "content": "x"}],
        "trajectory_format": "mini-swe-agent-1",
        "info": {},
    }
    assert detect(mini) == "swe_agent" and convert(mini).messages[1] == Message(ASSISTANT, "x")
    thinking = [{"type": "thinking", "thinking": "hm"}]
    history = [ASK, {"role": "assistant", "content": "x", "thinking_blocks": thinking}]
    assert convert({"history": history}).messages[1].reasoning == "hm"


def test_column_map_and_own_formats():
    record = {"dialog": [ASK], "messages": "something else", "id": 1}
    assert rename_columns(record, {"messages": "dialog"}) == {"messages": [ASK], "id": 1}
    assert convert(record, "openai", {"messages": "dialog"}).messages == [Message(USER, "hi")]
    assert rename_columns(record, None) is record
    own = Conversation([Message(USER, "x")])
    assert convert(record, lambda record: own) is own
