"""The files of active learning: records that wait for an answer, and answers that came back.

    active/round_1.jsonl    records that were picked; whoever labels them adds the assistant's messages to `messages`
    active/labelled.jsonl   all answers that came back and are sound, to train on

A record keeps what it was (`messages`, `tools`, ...) and gets an `id` where it had none.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchtune_agent.data.dataset import AgentSFTTransform
from torchtune_agent.data.reasons import BadRecord
from torchtune_agent.data.sources import Source
from torchtune_agent.errors import UserError

LABELLED = "labelled.jsonl"
_NUM_LISTED = 5


def read_records(key: str, files: str | Sequence[str]) -> dict[str, dict[str, Any]]:
    """Records with `messages`, by their ids, which are their own or else their places."""
    found: dict[str, dict[str, Any]] = {}
    for record in Source("json", files).records():
        if record.problem is not None:
            raise UserError(f"{key}={files}: {record.where}: {record.problem}. Mend the record, or take it out.")
        messages = record.data.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(one, Mapping) for one in messages):
            raise UserError(f"{key}={files}: {record.where}: has no 'messages'. Active learning needs such records.")
        name = str(record.data.get("id") or record.where)
        if name in found:
            raise UserError(f"{key}={files}: {record.where}: its id '{name}' is another record's too. Make ids differ.")
        found[name] = {"id": name, **record.data}
    if not found:
        raise UserError(f"{key}={files}: has no record.")
    return found


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    partial.write_text(content, encoding="utf-8", errors="backslashreplace")
    partial.replace(path)


def rounds(folder: Path) -> list[Path]:
    """The files of records that were picked, the first round first."""
    return sorted(folder.glob("round_*.jsonl"), key=lambda path: int(path.stem.rpartition("_")[2]))


def asked(folder: Path) -> dict[str, dict[str, Any]]:
    """All records that were picked in any round, by id."""
    return {name: record for path in rounds(folder) for name, record in read_records("active", str(path)).items()}


def read_answers(folder: Path, files: str | Sequence[str], transform: AgentSFTTransform) -> tuple[int, int]:
    """Take the answers in `files` into `labelled.jsonl`. Returns how many came, and how many are there now.

    Records that nobody has answered yet are passed over; answers that cannot be trained on are refused.
    """
    known, problems = asked(folder), []
    path = folder / LABELLED
    labelled = read_records("active", str(path)) if path.exists() else {}
    came = 0
    for name, record in read_records("active.answers", files).items():
        problem = _problem(known.get(name), record, transform)
        if problem is not None:
            problems.append(f"'{name}': {problem}")
        elif record["messages"] != known[name]["messages"]:
            labelled[name] = {key: value for key, value in record.items() if key != "active"}
            came += 1
    if problems:
        more = f"\n  and {len(problems) - _NUM_LISTED} more" if len(problems) > _NUM_LISTED else ""
        raise UserError(
            f"active.answers={files}: {len(problems)} of its records cannot be taken\n  "
            + "\n  ".join(problems[:_NUM_LISTED])
            + more
            + "\nMend them, or take them out; none was taken."
        )
    if came:
        write_records(path, list(labelled.values()))
    return came, len(labelled)


def _problem(question: Mapping[str, Any] | None, record: Mapping[str, Any], transform: AgentSFTTransform) -> str | None:
    if question is None:
        return "was never picked (is its id changed?)"
    before, messages = question["messages"], record["messages"]
    if messages[: len(before)] != before:
        return "its messages are not the ones that were asked about, with others behind them"
    if len(messages) == len(before):
        return None
    if messages[-1].get("role") != "assistant":
        return f"ends with a message of '{messages[-1].get('role')}', not of the assistant"
    try:
        transform.encode(record)
    except BadRecord as error:
        return str(error)
    return None
