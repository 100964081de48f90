"""Records that arrive: from files that grow and from iterables, in order, once, read ahead no further than allowed."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from torchtune_agent.continual.arrivals import FromIterable, GrowingFiles, Reader
from torchtune_agent.errors import UserError


def append(path: Path, *numbers: int, text: str = "") -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps({"n": number}) + "\n" for number in numbers) + text)


def taken(reader: Reader, most: int, seconds: float = 5.0) -> list[Any]:
    return [a.data.get("n", a.problem and a.problem.code) for a in reader.take(most, seconds)]


def test_lines_come_when_they_are_whole_from_files_old_and_new(tmp_path: Path) -> None:
    append(tmp_path / "b.jsonl", 3, 4)
    append(tmp_path / "a.jsonl", 1, 2, text='{"n": ')
    reader = Reader(GrowingFiles(tmp_path), ahead=10, poll_seconds=0.01)
    reader.start({})
    assert taken(reader, 4) == [1, 2, 3, 4]
    assert taken(reader, 1, 0.1) == []
    append(tmp_path / "a.jsonl", text="5}\nno json\n")
    append(tmp_path / "c.jsonl", 6)
    late = reader.take(3, 5.0)
    reader.close()
    assert [a.data.get("n") for a in late] == [5, None, 6] and late[1].problem is not None
    again = Reader(GrowingFiles(tmp_path), ahead=10, poll_seconds=0.01)
    again.start(late[0].position)  # a run that had trained 1 to 5
    append(tmp_path / "b.jsonl", 7)
    assert sorted(map(str, taken(again, 3))) == ["6", "7", "broken_json"]
    again.close()


def test_a_producer_is_held_back_until_what_it_made_is_taken() -> None:
    made: list[int] = []

    def numbers() -> Iterator[dict[str, int]]:
        for n in range(100):
            made.append(n)
            yield {"n": n}

    reader = Reader(FromIterable(numbers, "numbers"), ahead=5, poll_seconds=0.01)
    reader.start({"numbers": 10})
    deadline = time.monotonic() + 5
    while len(made) < 16 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(made) == 10 + 5 + 1  # ten were trained before; five wait; one is in its hand
    assert taken(reader, 90) == list(range(10, 100))
    assert taken(reader, 1) == [] and reader.has_ended
    reader.close()


def test_an_iterable_that_fails_is_named() -> None:
    def broken() -> Iterator[Any]:
        yield 5
        raise OSError("the queue is gone")

    reader = Reader(FromIterable(broken, "my.queue"), ahead=5, poll_seconds=0.01)
    reader.start({})
    assert taken(reader, 1) == ["wrong_type"]
    with pytest.raises(UserError, match="reading failed: OSError: the queue is gone"):
        reader.take(1, 5.0)
    reader.close()
