"""Questions out, answers in: what comes back is taken only where it answers what was asked and can be trained on."""

import json
from pathlib import Path
from typing import Any

import pytest

from torchtune_agent.data.dataset import AgentSFTTransform
from torchtune_agent.data.toolworld import toolworld_tokenizer
from torchtune_agent.errors import UserError
from torchtune_agent.selection.active import calls_of, disagreement
from torchtune_agent.selection.labelling import LABELLED, read_answers, read_records, write_records

TRANSFORM = AgentSFTTransform(toolworld_tokenizer(640), train_on="last")
ANSWER = {"role": "assistant", "content": "Yes."}


def question(name: str) -> dict[str, Any]:
    return {"id": name, "messages": [{"role": "user", "content": f"Is it {name}?"}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_records(tmp_path / "active" / "round_1.jsonl", [question(name) | {"active": {"score": 1.0}} for name in "ab"])
    write_records(tmp_path / "active" / "round_2.jsonl", [question("c")])
    return tmp_path / "active"


def send(folder: Path, *records: dict[str, Any]) -> tuple[int, int]:
    path = folder.parent / "answers.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_answers(folder, str(path), TRANSFORM)


def answered(name: str, *messages: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "messages": [*question(name)["messages"], *(messages or [ANSWER])], "active": {"score": 1.0}}


def test_answers_of_several_rounds_are_gathered_and_may_be_mended(folder: Path) -> None:
    assert send(folder, answered("a"), question("b")) == (1, 1)  # nobody has answered b yet
    assert send(folder, answered("c"), answered("a", {"role": "assistant", "content": "No."})) == (2, 2)
    lines = [json.loads(line) for line in (folder / LABELLED).read_text().splitlines()]
    assert {line["id"]: line["messages"][-1]["content"] for line in lines} == {"a": "No.", "c": "Yes."}
    assert all("active" not in line for line in lines)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (answered("z"), "'z': was never picked"),
        ({"id": "a", "messages": [{"role": "user", "content": "Is it b?"}, ANSWER]}, "not the ones that were asked"),
        (answered("a", {"role": "user", "content": "Well?"}), "ends with a message of 'user'"),
        (answered("a", {"role": "assistant", "content": ""}), "empty_turn"),
        ({"id": "a", "prompt": "Is it a?"}, "has no 'messages'"),
    ],
)
def test_what_is_no_answer_is_refused_and_nothing_taken(folder: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        send(folder, answered("c"), record)
    assert not (folder / LABELLED).exists()


def test_pools_are_told_what_is_wrong_with_them(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    for content, message in (
        ("", "has no record"),
        (json.dumps(question("a")) + "\n" + json.dumps(question("a")), "its id 'a' is another record's too"),
        ("{", "broken_json|truncated"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_records("active.pool", str(path))


def test_answers_disagree_by_what_they_call() -> None:
    def calls(text: str) -> tuple[Any, ...]:
        return calls_of(question("a"), text, TRANSFORM)

    call = "<function=add>\n<parameter=a>\n{}\n</parameter>\n</function>"
    two, three = calls("I add. " + call.format(2)), calls(call.format(3))
    assert two == calls("Let me see.\n" + call.format(2)) and two != three
    assert calls("Yes.") == calls("No, never.") == calls("") == ()
    assert disagreement([two, two, three, ()]) == 5 / 6 and disagreement([two, two]) == 0.0
