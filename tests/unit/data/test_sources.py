"""Records from files and lists, and what the dataset says about those it cannot use."""

import gzip
import json

import pyarrow.parquet
import pytest
import zstandard

from tests import tokenizers
from torchtune_agent.data import AgentSFTDataset, sources
from torchtune_agent.data.sources import read_records
from torchtune_agent.errors import UserError

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Zoë 👩‍🚀"}]}


def data_of(path, **options) -> list[dict]:
    return [dict(record.data) for record in read_records("json", str(path), "train", **options)]


def test_json_lines_come_back_as_written(tmp_path):
    rows = [GOOD | {"when": "2024-01-01", "only_here": {"b": None, "a": [1, 2.5]}}, GOOD]
    path = tmp_path / "d.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    assert data_of(path) == rows
    assert list(data_of(path)[0]["only_here"]) == ["b", "a"]


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_a_list_or_lines_with_a_byte_order_mark_are_read(tmp_path, name):
    path = tmp_path / name
    text = json.dumps([GOOD, GOOD]) if name == "d.json" else f"{json.dumps(GOOD)}\r\n{json.dumps(GOOD)}"
    path.write_bytes(b"\xef\xbb\xbf" * (name == "d.jsonl") + text.encode())
    assert data_of(path) == [GOOD, GOOD]


def test_a_json_list_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "d.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([GOOD, GOOD]).encode())
    assert data_of(path) == [GOOD, GOOD]


def test_line_separators_inside_texts_do_not_split_lines(tmp_path):
    row = {"messages": [{"role": "assistant", "content": "a\u2028b\u0085c\x0bd"}]}
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert data_of(path) == [row]


def test_files_of_a_glob_are_read_in_name_order(tmp_path):
    for name in "bca":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"name": name}))
    assert [row["name"] for row in data_of(tmp_path / "*.jsonl")] == ["a", "b", "c"]
    files = [str(tmp_path / "c.jsonl"), str(tmp_path / "a.jsonl")]
    assert [record.data["name"] for record in read_records("json", files, "train")] == ["c", "a"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 1}\n{"b": \n{"a": 1}', ("d.jsonl:2", "broken_json")),
        (b'{"a": 1}\n{"b": "un', ("d.jsonl:2", "truncated_last_line")),
        (b'{"a": 1}\n\n{"b": "\xff"}\n', ("d.jsonl:3", "invalid_utf8")),
        (b"[1]\n", ("d.jsonl:1", "wrong_type")),
        (b"[" * 100_000, ("d.jsonl:1", "too_deep")),
    ],
)
def test_a_line_that_cannot_be_read_is_handed_on_with_its_place_and_reason(tmp_path, content, words):
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    (bad,) = [record for record in read_records("json", str(path)) if record.problem is not None]
    assert bad.problem is not None
    assert (bad.where.removeprefix(f"{tmp_path}/"), bad.problem.code) == words
    assert content.split(b"\n")[int(words[0][-1]) - 1].decode("utf-8", "replace").startswith(bad.excerpt[:20])


@pytest.mark.parametrize("block", [1, 5, 64, 1000])
def test_lines_are_the_same_wherever_blocks_end(tmp_path, monkeypatch, block):
    monkeypatch.setattr(sources, "_BLOCK_BYTES", block)
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\n\n{"a": 1}\n  \n{"b": "\xc3\xa9"}\r\n\n\n\n{"c": 3}\n\n{"d": \n \n\n')
    records = list(read_records("json", str(path)))
    assert [(record.number, dict(record.data)) for record in records] == [
        (3, {"a": 1}),
        (5, {"b": "é"}),
        (9, {"c": 3}),
        (11, {}),
    ]
    assert records[-1].problem is not None and records[-1].problem.code == "broken_json"


def test_a_line_too_long_to_read_is_left_out_and_the_rest_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 100)
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr("torchtune_agent.data.json_text.parse_line.__kwdefaults__", {"first": False, "max_bytes": 1000})
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps({"a": "x" * 5000}) + "\n" + json.dumps(GOOD) + "\n")
    good, bad, last = read_records("json", str(path))
    assert bad.problem is not None and (bad.where, bad.problem.code) == (f"{path}:2", "too_long_line")
    assert good.data == GOOD and last.data == GOOD and last.where == f"{path}:3"


def test_a_json_file_may_hold_one_record_a_conversation_or_lines(tmp_path):
    path = tmp_path / "d.json"
    for text in (json.dumps(GOOD, indent=1), json.dumps(GOOD["messages"], indent=1)):
        path.write_text(text)
        assert data_of(path) == [{"messages": GOOD["messages"]}]
    path.write_text("\n".join([json.dumps(GOOD)] * 3))
    assert data_of(path) == [GOOD] * 3


def test_a_file_without_records_is_refused(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n \n")
    with pytest.raises(UserError, match="no records"):
        data_of(path)


@pytest.mark.parametrize("suffix", ["gz", "zst", "parquet"])
def test_compressed_files_and_parquet_are_read(tmp_path, suffix):
    lines = f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}\n".encode()
    if suffix in ("gz", "zst"):
        path = tmp_path / f"d.jsonl.{suffix}"
        path.write_bytes(gzip.compress(lines) if suffix == "gz" else zstandard.compress(lines))
    else:
        path = tmp_path / "d.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD, GOOD]), path)
    assert data_of(path) == [GOOD, GOOD]
    assert data_of(tmp_path) == [GOOD, GOOD]  # as a folder


@pytest.mark.parametrize("files", [None, [], "no/such/*.jsonl"])
def test_missing_files_are_an_error_that_names_the_key(files):
    with pytest.raises(UserError, match="data_files"):
        list(read_records("json", files, "train"))


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hello", "messages"),
        ([{"role": "robot", "content": "hi"}], "robot"),
        ([{"role": "assistant", "content": None}], "empty_turn"),
        ([{"role": "assistant", "content": " \n"}], "empty"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]}], "tool_calls"),
        ([{"role": "user", "content": "half \ud83d"}, {"role": "assistant", "content": "ok"}], "surrogate"),
        ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "half \ud83d"}], "surrogate"),
        (["hi"], r"messages\[0\]"),
        ([{"content": "hi"}], "role"),
    ],
)
@pytest.mark.parametrize("make", [tokenizers.chat_template, tokenizers.qwen2_5, tokenizers.llama3, tokenizers.gemma])
def test_a_record_that_cannot_be_trained_is_named_with_file_and_line(tmp_path, make, messages, words):
    path = tmp_path / "d.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps({'messages': messages})}\n")
    with pytest.raises(UserError, match=words) as error:
        AgentSFTDataset(make(tmp_path), data_files=str(path))
    assert "d.jsonl:2" in str(error.value)


def test_a_system_prompt_the_template_does_not_know_is_named_with_file_and_line(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "system", "content": "Be brief."}, *GOOD["messages"]]}))
    with pytest.raises(UserError, match="d.jsonl:1"):
        AgentSFTDataset(tokenizers.mistral(tmp_path), data_files=str(path))


def test_records_without_a_token_to_train_are_counted_and_left_out(tmp_path):
    long = {"messages": [{"role": "user", "content": "word " * 200}, *GOOD["messages"]]}
    dataset = AgentSFTDataset(tokenizers.chat_template(tmp_path, max_seq_len=40), source=[GOOD, long, GOOD])
    assert len(dataset) == 2
    report = dataset.report
    assert (report.num_read, report.num_trained) == (3, 2)
    assert [(item.where, item.reason) for item in report.left_out] == [("record[1]", "too_long")]
    assert report.num_tokens == sum(dataset.lengths)
    assert report.num_supervised == sum(int((dataset[i]["labels"][1:] != -100).sum()) for i in range(2))


def test_cut_records_are_counted(tmp_path):
    whole = AgentSFTDataset(tokenizers.chat_template(tmp_path), source=[GOOD])
    length = whole.lengths[0]
    cut = AgentSFTDataset(tokenizers.chat_template(tmp_path), source=[GOOD, GOOD], max_seq_len=length - 3)
    assert (whole.report.num_cut, cut.report.num_cut) == (0, 2)
    assert cut.lengths.tolist() == [length - 3] * 2
    exact = AgentSFTDataset(tokenizers.chat_template(tmp_path), source=[GOOD], max_seq_len=length)
    assert exact.report.num_cut == 0 and exact.lengths.tolist() == [length]


def test_another_column_can_hold_the_messages(tmp_path):
    tokenizer = tokenizers.chat_template(tmp_path)
    moved = AgentSFTDataset(tokenizer, source=[{"chat": GOOD["messages"]}], column_map={"messages": "chat"})
    plain = AgentSFTDataset(tokenizer, source=[GOOD])
    assert list(moved[0]["tokens"]) == list(plain[0]["tokens"])


def test_training_only_calls_leaves_out_records_without_one(tmp_path):
    call = {"messages": [*GOOD["messages"], {"role": "assistant", "content": "<function=f>\n</function>"}]}
    tokenizer = tokenizers.chat_template(tmp_path)
    dataset = AgentSFTDataset(tokenizer, source=[GOOD, call], train_on_tool_calls_only=True)
    assert len(dataset) == 1 and dataset.report.num_trained == 1


def test_a_record_a_message_transform_cannot_read_is_named(tmp_path):
    transform = {"_component_": "torchtune.data.OpenAIToMessages"}
    with pytest.raises(
        UserError, match=r"record\[1\]: wrong_type: OpenAIToMessages cannot read it \(KeyError: 'role'\)"
    ):
        AgentSFTDataset(
            tokenizers.qwen2_5(tmp_path), source=[GOOD, {"messages": [{"content": "hi"}]}], message_transform=transform
        )
