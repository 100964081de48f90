"""Tokens on disk: made once, found again, by several processes, and never when something is no longer the same."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tokenizers
from torchtune_agent.data import AgentSFTDataset, fingerprint, sources
from torchtune_agent.data.cache import cache_folder, fetch
from torchtune_agent.data.encode import Encoded
from torchtune_agent.data.store import Part, TokenStore
from torchtune_agent.data.toolworld import toolworld_tokenizer
from torchtune_agent.errors import UserError
from torchtune_agent.toolworld import ToolWorld

ROWS = ToolWorld(num_tools=40, seed=0).conversations("train", 60)
BAD_LINE = "{broken"


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(row) for row in ROWS]
    path.write_text("\n".join([*lines[:17], BAD_LINE, *lines[17:]]) + "\n")
    return path


def dataset_of(path: Path, cache: Path, **options) -> AgentSFTDataset:
    tokenizer = options.pop("tokenizer", None) or toolworld_tokenizer()
    return AgentSFTDataset(tokenizer, data_files=str(path), cache_dir=str(cache), max_bad_fraction=0.1, **options)


def same(a: AgentSFTDataset, b: AgentSFTDataset) -> bool:
    return len(a) == len(b) and all(np.array_equal(a[i][key], b[i][key]) for i in range(len(a)) for key in a[i])


def made(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.is_dir() and path.name != "files")


def test_tokens_are_made_once_and_found_again(tmp_path, data, monkeypatch):
    cache = tmp_path / "cache"
    first = dataset_of(data, cache)
    monkeypatch.setattr("torchtune_agent.data.dataset.tokenize_source", None)  # calling it again would fail
    again = dataset_of(data, cache)
    assert len(made(cache)) == 1 and first.folder == again.folder == cache / made(cache)[0]
    assert same(first, again)
    assert first.report == again.report and first.report.left_out[0].where == f"{data}:18"
    assert again.where(0) == f"{data}:1" and again.where(17) == f"{data}:19"


def test_several_processes_make_what_one_makes(tmp_path, data, monkeypatch):
    alone = dataset_of(data, tmp_path / "alone")
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 3000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    together = dataset_of(data, tmp_path / "together")
    assert same(alone, together)
    assert alone.report == together.report
    assert [alone.where(i) for i in range(len(alone))] == [together.where(i) for i in range(len(together))]
    in_memory = AgentSFTDataset(toolworld_tokenizer(), source=ROWS)
    assert same(alone, in_memory) and in_memory.folder is None


CHANGES = {
    "format": "toolworld",
    "train_on": "last",
    "max_seq_len": 300,
    "over_long": "drop",
    "class_weights": {"arg_value": 2.0},
    "call_style": "xml",
    "enable_token_classification": False,
    "train_on_tool_calls_only": True,
    "train_on_reasoning_only": True,
    "column_map": {"messages": "messages"},
    "tool_call_start_token": "<call>",
}


def test_every_option_and_the_tokenizer_have_tokens_of_their_own(tmp_path, data):
    cache = tmp_path / "cache"
    dataset_of(data, cache)
    folder = tokenizers.TOKENIZER_DIR
    for number, (name, value) in enumerate(CHANGES.items(), start=2):
        dataset_of(data, cache, **{name: value})
        assert len(made(cache)) == number, name
    changes: list[dict[str, Any]] = [{"max_seq_len": 200}, {"template_args": {"x": 1}}, {"control_tokens": "refuse"}]
    for change in changes:
        dataset_of(data, cache, tokenizer=tokenizers.ChatTemplateTokenizer(folder, **change))
    assert len(made(cache)) == len(CHANGES) + 4


def test_a_change_of_the_file_is_seen_and_a_new_date_is_none(tmp_path, data):
    cache = tmp_path / "cache"
    before = dataset_of(data, cache)
    os.utime(data, (1, 1))
    assert dataset_of(data, cache).folder == before.folder
    content = data.read_text()
    data.write_text(content.replace("You", "Yow", 1))
    os.utime(data, (1, 1))
    changed = dataset_of(data, cache)
    assert changed.folder != before.folder and not same(before, changed)
    data.write_text(content)
    os.utime(data, (2, 2))
    assert dataset_of(data, cache).folder == before.folder


def test_a_damaged_store_is_made_again(tmp_path, data):
    cache = tmp_path / "cache"
    before = dataset_of(data, cache)
    assert before.folder is not None
    whole = [before[i] for i in range(len(before))]
    (before.folder / "tokens.bin").write_bytes(b"1234")
    after = dataset_of(data, cache)
    assert after.folder == before.folder
    assert all(np.array_equal(whole[i]["tokens"], after[i]["tokens"]) for i in range(len(whole)))


def test_the_same_tokenizer_has_the_same_fingerprint_in_another_process(tmp_path):
    code = (
        "import sys; from pathlib import Path; from tests import tokenizers\n"
        "from torchtune_agent.data import fingerprint\n"
        "for name, make in tokenizers.ALL.items():\n"
        "    folder = Path(sys.argv[1]) / name; folder.mkdir(exist_ok=True)\n"
        "    print('>', name, fingerprint.combine(fingerprint.of_tokenizer(make(folder))))"
    )
    said = []
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said.append([line for line in done.stdout.splitlines() if line.startswith(">")])
    assert said[0] == said[1] and len({line.split()[-1] for line in said[0]}) == len(tokenizers.ALL)


def test_what_cannot_be_known_again_is_not_kept(tmp_path, data):
    cache = tmp_path / "cache"
    local = type("Own", (), {"__call__": lambda self, sample: {"messages": []}})()
    with pytest.raises(fingerprint.Unknown):
        fingerprint.of_option({"message_transform": local})
    with pytest.raises(fingerprint.Unknown):
        fingerprint.of_option(lambda record: record)
    dataset = dataset_of(data, cache, tokenizer=tokenizers.qwen2_5(tmp_path), message_transform=local)
    assert len(dataset) == 0 and dataset.folder is None
    assert not cache.exists() or made(cache) == []


def write_slowly(place: Path) -> None:
    with (place.parent / "log").open("a") as log:
        log.write(f"{os.getpid()}\n")
    numbers = np.arange(5, dtype=np.int32)
    sample = Encoded(numbers, numbers.astype(np.uint8), numbers, numbers.astype(np.float32))

    def parts():
        for _ in range(5):
            time.sleep(0.1)
            yield Part.of([sample], [0])

    TokenStore.write(place, parts(), {})


def fetch_together(folder: Path, start, results) -> None:
    start.wait()
    results.put(len(fetch(folder, "key", write_slowly)))


def test_processes_that_start_together_make_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(5), context.Queue()
    workers = [context.Process(target=fetch_together, args=(tmp_path, start, results)) for _ in range(5)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=30) for _ in workers] == [5] * 5
    for worker in workers:
        worker.join()
    assert len((tmp_path / "log").read_text().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock", "log"]


def test_one_that_is_killed_leaves_nothing_that_is_found(tmp_path):
    context = multiprocessing.get_context("fork")
    worker = context.Process(target=fetch, args=(tmp_path, "key", write_slowly))
    worker.start()
    while not list(tmp_path.glob("key.writing-*/tokens.bin")):
        time.sleep(0.01)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert not (tmp_path / "key").exists()
    assert len(fetch(tmp_path, "key", write_slowly)) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock", "log"]


def test_processes_that_tokenize_end_with_the_one_that_asked(tmp_path, data):
    code = (
        "import os, sys, time; from torchtune_agent.data import AgentSFTDataset, sources, tokenizing\n"
        "from torchtune_agent.data.toolworld import toolworld_tokenizer\n"
        "sources._BLOCK_BYTES = 500; os.sched_getaffinity = lambda _: {0, 1}\n"
        "def slow(block):\n"
        "    print('child', os.getpid(), flush=True); time.sleep(60)\n"
        "tokenizing._tokenize_block = slow\n"
        "AgentSFTDataset(toolworld_tokenizer(), data_files=sys.argv[1], cache_dir=sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(data), str(tmp_path / "cache")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        said = (line.split() for line in process.stdout)
        children = [int(next(words for words in said if words[:1] == ["child"])[1]) for _ in range(2)]
        process.kill()
    ended_by = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < ended_by, "a child goes on without its parent"
        time.sleep(0.05)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, data):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache_dir=.*/file/cache: cannot write tokens there: Not a directory"):
        dataset_of(data, tmp_path / "file" / "cache")


def test_the_folder_is_the_configured_one_or_the_user_s(monkeypatch, tmp_path):
    assert cache_folder("/x/y") == Path("/x/y")
    monkeypatch.setenv("TORCHTUNE_AGENT_CACHE", "/x/z")
    assert cache_folder(None) == Path("/x/z")
    monkeypatch.delenv("TORCHTUNE_AGENT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x/cache")
    assert cache_folder(None) == Path("/x/cache/torchtune_agent")
