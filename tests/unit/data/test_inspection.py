"""What `agent_data_check` counts and says, against naive counts and what is known of the records themselves."""

import json
import os
import random
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchtune.models.phi4._tokenizer import Phi4Tokenizer

from tests import tokenizers
from torchtune_agent.data import AgentSFTDataset, Collator, TokenClass, chat_template_tokenizer, toolworld_tokenizer
from torchtune_agent.data.conversation import Conversation, Message, Role
from torchtune_agent.data.inspection import Parity, TaggedTokens, check_parity
from torchtune_agent.data.inspection.ends import TurnEnds, turn_ends
from torchtune_agent.data.inspection.findings import CheckedData, Chosen, findings
from torchtune_agent.data.inspection.statistics import (
    Statistics,
    call_names,
    informative,
    length_histogram,
    percentiles,
    statistics,
)
from torchtune_agent.data.inspection.terminal import has_colours, sample_lines, tables, token_texts
from torchtune_agent.data.token_text import Vocabulary, vocabulary
from torchtune_agent.toolworld import TOKENIZER_DIR, ToolWorld

SHARED = Path(__file__).parents[4] / "shared"


@cache
def records() -> list[dict[str, Any]]:
    """ToolWorld's, without system prompts, which Mistral's tokenizer refuses."""
    made = ToolWorld(num_tools=40).conversations("train", 24)
    return [record | {"messages": [m for m in record["messages"] if m["role"] != "system"]} for record in made]


def dataset(tokenizer: Any, **options: Any) -> AgentSFTDataset:
    return AgentSFTDataset(tokenizer, source=options.pop("source", records()), **options)


def tagged(data: AgentSFTDataset, tokenizer: Any) -> list[TaggedTokens]:
    stop_ids = {tokenizer.eos_id, *tokenizer.stop_tokens}
    return [TaggedTokens.of(data[i], stop_ids) for i in range(len(data))]


def counted(tokenizer: Any, **options: Any) -> Statistics:
    stop_ids = {tokenizer.eos_id, *tokenizer.stop_tokens}
    return statistics(tagged(dataset(tokenizer, **options), tokenizer), vocabulary(tokenizer), stop_ids)


def assistant_texts() -> list[str]:
    return [m["content"] for record in records() for m in record["messages"] if m["role"] == "assistant"]


def names_called(text: str) -> list[str]:
    return re.findall(r"<function=([^>]+)>", text)


def num_turns() -> int:
    return len(assistant_texts())


# --- tokens and counts ---------------------------------------------------------------------------------------------


def test_targets_are_what_the_collator_trains() -> None:
    foreign = TaggedTokens.of({"tokens": [5, 6, 7, 2], "labels": [5, 6, -100, 2]}, {2})  # without classes
    assert foreign.is_target.tolist() == [False, True, False, True]
    assert foreign.classes.tolist() == [0, TokenClass.REASONING, 0, TokenClass.SPECIAL]
    tokenizer = toolworld_tokenizer()
    data = dataset(tokenizer, class_weights={"arg_value": 2.0, "think": 0.0})
    for i, tokens in enumerate(tagged(data, tokenizer)):
        batch = Collator(pad_id=tokenizer.pad_id)([[data[i]]])
        assert not tokens.is_target[0]
        for t in range(len(tokens.ids) - 1):  # the label at t is the token at t + 1, or nothing
            expected = tokens.ids[t + 1] if tokens.is_target[t + 1] else -100
            assert batch.labels[0, t] == expected
            assert batch.weights[0, t] == tokens.weights[t + 1]
            assert batch.call_index[0, t] == tokens.calls[t + 1]


@pytest.mark.parametrize("options", [{}, {"class_weights": {"call_name": 3.0}}, {"max_seq_len": 150}])
def test_counts_are_those_of_a_loop_over_tokens(options: dict[str, Any]) -> None:
    tokenizer = toolworld_tokenizer()
    data = dataset(tokenizer, **options)
    counts = statistics(tagged(data, tokenizer), vocabulary(tokenizer), {tokenizer.eos_id})
    classes: Counter[int] = Counter()
    weights = dict.fromkeys(range(len(TokenClass)), 0.0)
    for i in range(len(data)):
        sample = data[i]
        for t, kind in enumerate(sample["token_class"].tolist()):
            classes[kind] += 1
            weights[kind] += float(sample["weights"][t])
        assert counts.lengths[i] == len(sample["tokens"])
        assert counts.num_targets[i] == sum(label != -100 for label in sample["labels"])
        assert counts.num_calls[i] == len({call for call in sample["call_index"].tolist() if call >= 0})
    assert counts.classes.tolist() == [classes[kind] for kind in TokenClass]
    assert counts.weights.tolist() == [weights[kind] for kind in TokenClass]
    assert counts.classes.sum() == data.report.num_tokens
    assert counts.num_targets.sum() == data.report.num_supervised


@pytest.mark.parametrize("name", tokenizers.ALL)
def test_tools_are_those_the_records_call(name: str, tmp_path: Path) -> None:
    """In any tokenizer, also where a token holds a letter of the name and what stands before it."""
    tokenizer = tokenizers.ALL[name](tmp_path)
    data = dataset(tokenizer)
    expected = Counter(name for text in assistant_texts() for name in names_called(text))
    assert expected
    found = Counter(n for tokens in tagged(data, tokenizer) for n in call_names(tokens, vocabulary(tokenizer)).values())
    assert found == expected


def test_a_name_is_told_from_what_shares_its_tokens() -> None:
    """As in large vocabularies, where `="` or `>` is one token with letters; a call may also have lost its name."""
    known = Vocabulary(
        [b'="add', "_東".encode()[:2], "東".encode()[1:], b'">', b": get", b"x"].__getitem__, frozenset(), 6
    )
    kinds = np.array([TokenClass.CALL_NAME] * 5 + [TokenClass.ARG_VALUE])
    sample = TaggedTokens(np.arange(6), kinds > 0, kinds, np.array([0, 0, 0, 0, 3, 5]), kinds * 1.0)
    assert call_names(sample, known) == {0: "add_東", 3: "get", 5: ""}


@pytest.mark.parametrize("seed", range(30))
def test_every_length_is_in_one_row(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.concatenate([rng.integers(1, 10 ** rng.integers(1, 6), rng.integers(1, 300)), rng.integers(1, 9, 3)])
    rows = length_histogram(lengths)
    assert len(rows) <= 26 and sum(count for _, count in rows) == len(lengths)
    for label, count in rows:
        numbers = [int(n.replace(",", "")) for n in re.findall(r"[\d,]+", label)]
        high = np.inf if "more" in label else numbers[-1]
        assert count == sum(numbers[0] <= length <= high for length in lengths.tolist())


def test_percentiles_are_lengths_of_samples() -> None:
    lengths = np.array([5, 1, 9, 7, 3, 100])
    assert percentiles(lengths) == {"shortest": 1, "median": 7, "90 %": 100, "99 %": 100, "longest": 100}


def test_samples_to_look_at_are_different_and_hold_the_extremes() -> None:
    rng = np.random.default_rng(0)
    lengths, num_calls = rng.permutation(1000) + 5, rng.permutation(1000)
    ends = TurnEnds(examples=[700, 701])
    counts = Statistics(lengths, lengths, num_calls, np.zeros(8), np.zeros(8), Counter(), ends)
    why = informative(counts, 50, range(17, 20))
    assert len(why) == 50 and list(why)[:3] == [17, 18, 19]
    assert why[int(lengths.argmax())] == "longest" and why[int(lengths.argmin())] == "shortest"
    assert why[int(num_calls.argmax())] == "most calls" and why[700] == "end of a turn not trained"
    few = Statistics(lengths[:3], lengths[:3], num_calls[:3], np.zeros(8), np.zeros(8), Counter(), TurnEnds())
    assert set(informative(few, 50, range(0))) == {0, 1, 2}


# --- ends of turns -------------------------------------------------------------------------------------------------

ENDLESS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '\n\n' }}{% endfor %}"
NO_SPECIAL: dict[str, Any] = {"class_weights": {"special": 0.0}}


@pytest.mark.parametrize("name", sorted(tokenizers.ALL))
def test_every_end_of_turn_is_seen(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizers.ALL[name](tmp_path)
    ends = counted(tokenizer).ends
    assert ends.trained.total() == ends.num_turns == num_turns()
    assert {tokens[0] for tokens in ends.trained} <= vocabulary(tokenizer).special_ids


@pytest.mark.parametrize("options", [{"train_on_tool_calls_only": True}, {"train_on_reasoning_only": True}])
def test_a_turn_trained_in_parts_has_one_end(options: dict[str, Any]) -> None:
    texts = assistant_texts()
    with_calls = sum(bool(names_called(text)) for text in texts)
    ends = counted(toolworld_tokenizer(), **options).ends
    assert ends.num_turns == ends.trained.total()
    assert ends.num_turns == (with_calls if "train_on_tool_calls_only" in options else len(texts)) > 24


def test_ends_that_are_not_trained_are_told_from_those_that_are_cut() -> None:
    tokenizer = toolworld_tokenizer()
    ends = counted(tokenizer, **NO_SPECIAL).ends
    assert ends.untrained == {tokenizer.eos_id: num_turns()} and not ends.trained and not ends.num_open
    assert ends.examples[:3] == [0, 1, 2]
    data = dataset(tokenizer, max_seq_len=200)
    cut = counted(tokenizer, max_seq_len=200).ends
    assert data.report.num_cut >= cut.num_open > 0 and not cut.untrained


def test_a_dataset_without_classes_is_audited_by_stop_tokens(tmp_path: Path) -> None:
    """Its mask covers headers, ends and the line break after them; the stop token is what ends a turn."""
    tokenizer = tokenizers.qwen2_5(tmp_path)
    ends = counted(tokenizer, enable_token_classification=False).ends
    assert ends.trained == {(tokenizer.eos_id,): num_turns()} and ends.num_turns == num_turns()


def test_a_stretch_of_white_space_is_no_turn() -> None:
    known = vocabulary(toolworld_tokenizer())
    text = {known.text_of(i): i for i in range(2048)}
    ids = np.array([text[b"The"], 2, text[b"\n"], text[b"You"], 2, text[b"The"]])
    is_target = np.array([False, True, True, False, False, True])
    classes = np.where(is_target, TokenClass.REASONING, 0)
    ends = turn_ends(TaggedTokens(ids, is_target, classes, ids * 0 - 1, classes), known, {2})
    assert (ends.trained, ends.untrained, ends.num_open) == ({}, {}, 1)  # its first token is not a target


# --- findings ------------------------------------------------------------------------------------------------------


def checked(tokenizer: Any, parity: Parity | None = None, **options: Any) -> CheckedData:
    data = dataset(tokenizer, **options)
    samples = tagged(data, tokenizer)
    stop_ids = frozenset({tokenizer.eos_id, *tokenizer.stop_tokens})
    return CheckedData(
        key="dataset",
        report=data.report,
        has_token_classes=data.has_token_classes,
        limits=(640,),
        stop_ids=stop_ids,
        statistics=statistics(samples, vocabulary(tokenizer), stop_ids),
        parity=parity or Parity("not today"),
        datasets={"dataset": len(data)},
        sources=Counter(),
        samples=[Chosen(i, "first", f"d.jsonl:{i + 1}", tokens) for i, tokens in enumerate(samples)],
        refusal=None,
    )


def said(tokenizer: Any, level: str, **options: Any) -> str:
    found = findings(checked(tokenizer, **options), vocabulary(tokenizer))
    return "\n".join(finding.text for finding in found if finding.level == level)


def test_good_data_has_no_bad_news() -> None:
    tokenizer = toolworld_tokenizer(640)
    assert said(tokenizer, "bad") == ""
    assert "all 24 records" in said(tokenizer, "good") and "<|im_end|> (id 2)" in said(tokenizer, "good")


def test_bad_news_says_what_to_look_at(tmp_path: Path) -> None:
    words = said(toolworld_tokenizer(640), "bad", **NO_SPECIAL)
    assert f"{num_turns()} of {num_turns()} turns: <|im_end|> (id 2)" in words
    assert "class_weights.special" in words
    endless = said(tokenizers.chat_template(tmp_path, template=ENDLESS), "bad")
    assert "no end of turn after" in endless and "does not learn to stop" in endless


class EndlessTokenizer(Phi4Tokenizer):
    """Somebody's own, which ends the assistant's turns for nobody."""

    def tokenize_messages(self, messages: list[Any], **options: bool) -> tuple[list[int], list[bool]]:
        return super().tokenize_messages(messages)


def test_a_tokenizer_that_writes_no_end_of_turn_is_found(tmp_path: Path) -> None:
    tokenizer = tokenizers.phi4(tmp_path, EndlessTokenizer)
    assert not counted(tokenizer).ends.trained
    assert "does not learn to stop" in said(tokenizer, "bad")


def test_an_end_the_tokenizer_does_not_stop_at_is_said(tmp_path: Path) -> None:
    """A model's folder whose eos_token is not what its template ends turns with."""
    tokenizers.chat_template(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"eos_token": "<|im_end|>"', '"eos_token": "<|endoftext|>"'))
    words = said(chat_template_tokenizer(str(tmp_path)), "note")
    assert "<|im_end|> (id 2) ends turns, but the tokenizer stops at <|endoftext|> (id 0) only" in words


def test_an_end_in_plain_text_is_said(tmp_path: Path) -> None:
    """A template of another model, whose control tokens this tokenizer does not have."""
    template = tokenizers.CHATML.replace("<|im_end|>", "<|eot_id|>")
    words = said(tokenizers.chat_template(tmp_path, template=template), "bad")
    assert "turns end in plain text" in words and "<|eot_id|>" in words


# --- the terminal --------------------------------------------------------------------------------------------------

NASTY = "\x1b]0;owned\x07\x1b[31m red \u202eesrever\u2028 nbsp\u00a0 👩‍👩‍👧‍👦 東京"


def nasty_sample() -> tuple[Chosen, Any]:
    tokenizer = toolworld_tokenizer()
    call = f"<function={NASTY}>\n<parameter=a>\n{NASTY}\n</parameter>\n</function>"
    turns = [{"role": "user", "content": NASTY}, {"role": "assistant", "content": f"{NASTY}\n{call}"}]
    return checked(tokenizer, source=[{"messages": turns}]).samples[0], vocabulary(tokenizer)


def test_data_cannot_drive_the_terminal() -> None:
    sample, known = nasty_sample()
    plain = "\n".join(sample_lines(sample, "dataset", known, colours=False))
    assert all(c.isprintable() for c in plain.replace("\n", "")) and "東京" in plain and r"\x1b]0;owned" in plain
    coloured = "\n".join(sample_lines(sample, "dataset", known, colours=True))
    ours = re.sub(r"\x1b\[[\d;]+m", "", coloured)
    assert ours != coloured and all(c.isprintable() for c in ours.replace("\n", "")) and "東京" in ours
    data = checked(toolworld_tokenizer())
    data.statistics.tools[NASTY] += 100
    lines = [line for _, lines in tables(data) for line in lines]
    assert all(line.isprintable() for line in lines) and any("owned" in line for line in lines)


def test_tokens_keep_their_text_where_they_split_characters() -> None:
    sample, known = nasty_sample()
    ids = sample.tokens.ids.tolist()
    texts = token_texts(ids, known)
    assert "".join(texts) == known.spell(ids)[0].decode() and "" in texts and "京" in "".join(texts)


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    leader, follower = os.openpty()
    with os.fdopen(leader), os.fdopen(follower, "w") as terminal, open(os.devnull, "w") as file:
        assert has_colours(terminal) and not has_colours(file)
        monkeypatch.setenv("NO_COLOR", "1")
        assert not has_colours(terminal)
        monkeypatch.delenv("NO_COLOR")
        monkeypatch.setenv("TERM", "dumb")
        assert not has_colours(terminal)


# --- reading again, and parity -------------------------------------------------------------------------------------


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(*texts: str, **metadata: Any) -> dict[str, Any]:
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)], "metadata": metadata}


def test_sound_conversations_can_be_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", *[chat("hi", text) for text in ("a", "b", "", "d")])
    data = AgentSFTDataset(toolworld_tokenizer(), data_files=str(path), max_bad_fraction=1.0)
    again = [(where, conversation.messages[1].content) for where, conversation in data.conversations()]
    assert again == [(f"{path}:1", "a"), (f"{path}:2", "b"), (f"{path}:4", "d")]


def conversations(*texts: str) -> list[tuple[str, Conversation]]:
    made = (Conversation([Message(Role.USER, text), Message(Role.ASSISTANT, "ok")]) for text in texts)
    return [(f"record {i}", conversation) for i, conversation in enumerate(made)]


def test_parity_holds_and_differs_on_purpose_only_where_data_spells_control_tokens() -> None:
    pytest.importorskip("transformers")
    parity = check_parity(toolworld_tokenizer(), conversations("hi", "a<|im_end|>b", "東京", "<|im_start|>user\nhi"))
    assert (parity.num_equal, parity.num_on_purpose, parity.divergences) == (2, 2, [])


def folder(path: Path, template: str) -> Path:
    """ToolWorld's tokenizer with another template."""
    (path / "tokenizer.json").write_text((TOKENIZER_DIR / "tokenizer.json").read_text())
    settings = json.loads((TOKENIZER_DIR / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    return path


def test_a_day_that_is_pinned_is_found_as_the_first_difference(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = folder(tmp_path, "{{ 'It is ' + strftime_now('%Y') + '.\n' }}" + tokenizers.CHATML)
    parity = check_parity(chat_template_tokenizer(str(path), date="1999-12-31"), conversations("hi", "<|im_end|>"))
    assert parity.num_equal == parity.num_on_purpose == 0  # a control token is no excuse for another text
    first = parity.divergences[0]
    assert first.where == "record 0" and (first.before + first.ours).startswith("It is 1999.\n<|im_start|>user")
    assert re.match(r"It is 2\d\d\d.\n<\|im_start\|>user", first.before + first.theirs)


def test_a_template_edited_since_is_found(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    tokenizer = chat_template_tokenizer(str(folder(tmp_path, tokenizers.CHATML)))
    assert check_parity(tokenizer, conversations("hi")).num_equal == 1
    folder(tmp_path, tokenizers.CHATML.replace("message.role +", "message.role | upper +"))
    (difference,) = check_parity(tokenizer, conversations("hi")).divergences
    assert (difference.before, difference.position) == ("<|im_start|>", 1)
    assert difference.ours.startswith("user\n") and difference.theirs.startswith("USER\n")


def test_what_transformers_refuses_is_a_difference(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    tokenizer = chat_template_tokenizer(str(folder(tmp_path, tokenizers.CHATML)))
    folder(tmp_path, "{{ raise_exception('no users here') }}")
    (difference,) = check_parity(tokenizer, conversations("hi")).divergences
    assert difference.theirs == "refused: no users here"


def test_why_there_is_no_comparison_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "torchtune's own" in str(check_parity(tokenizers.qwen2_5(tmp_path), conversations("hi")).not_checked)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in str(check_parity(toolworld_tokenizer(), conversations("hi")).not_checked)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real templates in ../shared")
def test_parity_of_a_real_template_that_rewrites_history() -> None:
    pytest.importorskip("transformers")
    path = SHARED / "data/llamafactory/data/glaive_toolcall_en_demo.json"
    data = AgentSFTDataset(chat_template_tokenizer(str(SHARED / "models" / "qwen3")), data_files=str(path))
    sample = random.Random(0).sample(list(data.conversations()), 30)
    parity = check_parity(chat_template_tokenizer(str(SHARED / "models" / "qwen3")), sample)
    assert parity.num_equal == 30 and not parity.divergences
