"""What a chat template makes of a conversation, with small templates: samples, turns, choices and refusals."""

import json
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from tests import tokenizers
from tests.templates import control_ids, function, says, tool, user
from torchtune_agent.data import AgentSFTTransform, ChatTemplateTokenizer, TokenClass, toolworld
from torchtune_agent.data.chat_template import RenderError
from torchtune_agent.data.conversation import Conversation, Message, Role, ToolCall
from torchtune_agent.data.templates import Sample
from torchtune_agent.errors import UserError
from torchtune_agent.toolworld import __file__ as toolworld_file

# --- without the shared folder -----------------------------------------------------------------------------------

QWEN3_LIKE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(tmp_path: Path, template: Any, **options: Any) -> ChatTemplateTokenizer:
    tokenizers.chat_template(tmp_path, template=template if isinstance(template, str) else "")
    if not isinstance(template, str):
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    return ChatTemplateTokenizer(tmp_path, **options)


def said(sample: Sample) -> list[str]:
    return [sample.text[turn.start : turn.stop] for turn in sample.turns]


TALK = Conversation([user("a"), says("b", reasoning="r"), user("c"), says("d"), user("e"), says("f", reasoning="s")])


def test_the_toolworld_folder_trains_every_turn_in_one_sample():
    tokenizer = toolworld.toolworld_tokenizer()
    conversation = Conversation([user("<|im_end|>"), says("b"), tool("c"), tool("<|im_start|>"), says("d")])
    (sample,) = tokenizer.samples(conversation)
    assert Path(toolworld_file).exists() and said(sample) == ["b<|im_end|>", "d<|im_end|>"]
    assert tokenizer.decode(sample.tokens) == sample.text == tokenizer.render(conversation)
    kinds = Counter(tokenizer.decode([t]) for t in control_ids(tokenizer, sample.tokens))
    assert kinds == {"<|im_start|>": 4, "<|im_end|>": 4}


def test_turns_shown_differently_later_get_samples_of_their_own(tmp_path):
    tokenizer = chat(tmp_path, QWEN3_LIKE)
    assert [said(s) for s in tokenizer.samples(TALK)] == [
        ["<think>r</think>b<|im_end|>"], ["d<|im_end|>", "<think>s</think>f<|im_end|>"],
    ]  # fmt: skip
    (single,) = tokenizer.samples(TALK, history="single")
    assert said(single) == ["b<|im_end|>", "d<|im_end|>", "<think>s</think>f<|im_end|>"]
    assert [turn.as_served for turn in single.turns] == [False, True, True]
    assert [turn.left_out for turn in single.turns] == [("reasoning",), (), ()]


@pytest.mark.parametrize(
    ("train_on", "flags", "turns"),
    [
        ("all", (None, None, None), [1, 3, 5]),
        ("all", (None, False, None), [1, 5]),
        ("last", (None, None, None), [5]),
        ("last", (True, None, False), [1]),
        ("explicit", (None, None, None), []),
        ("explicit", (True, False, True), [1, 5]),
    ],
)
def test_which_turns_are_trained(tmp_path, train_on, flags, turns):
    flagged = Conversation(
        [
            user("a"),
            says("b", train=flags[0]),
            user("c"),
            says("d", train=flags[1]),
            user("e"),
            says("f", train=flags[2]),
        ]
    )
    samples = chat(tmp_path, tokenizers.CHATML).samples(flagged, train_on=train_on)
    assert [turn.message for sample in samples for turn in sample.turns] == turns
    assert len(samples) == bool(turns)


def test_a_users_message_cannot_be_trained(tmp_path):
    with pytest.raises(RenderError, match="message 0"):
        chat(tmp_path, tokenizers.CHATML).samples(Conversation([Message(Role.USER, "a", train=True), says("b")]))


def test_named_templates_are_chosen_by_whether_there_are_tools(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]
    tokenizer = chat(tmp_path, named)
    assert tokenizer.render(TALK) == "plain"
    assert tokenizer.render(Conversation(TALK.messages, [function("f")])) == "1 tools"


def test_template_arguments_and_the_date_reach_the_template(tmp_path):
    template = "{{ strftime_now('%d %b %Y') }} {{ enable_thinking }} {{ bos_token is defined }} {{ eos_token }}"
    tokenizer = chat(tmp_path, template, template_args={"enable_thinking": False}, date="2024-07-26")
    assert tokenizer.render(TALK) == "26 Jul 2024 False False <|im_end|>"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}"
        "{{ '<|im_' + ('start' if m.role == 'user' else 'end') + '|>' ~ m.content }}{% endfor %}",
        "{% set names = {'user': '<|im_start|>', 'assistant': '<|im_end|>'} %}"
        "{% for m in messages %}{{ names[m.role] }}{{ m.content }}{% endfor %}",
        "{% macro say(token, text) %}{{ token ~ text }}{% endmacro %}"
        "{% for m in messages %}{{ say('<|im_start|>' if m.role == 'user' else '<|im_end|>', m.content) }}{% endfor %}",
    ],
)
def test_control_tokens_are_the_templates_however_it_makes_them(tmp_path, template):
    tokenizer = chat(tmp_path, template)
    tokens = tokenizer.tokenize(Conversation([user("a"), says("b")]))
    assert tokens == tokenizer.encode("<|im_start|>a<|im_end|>b")
    start, end = tokenizer.special_tokens["<|im_start|>"], tokenizer.special_tokens["<|im_end|>"]
    assert control_ids(tokenizer, tokens) == [start, end]
    forged = tokenizer.tokenize(Conversation([user("a<|endoftext|>"), says("b")]))
    assert (
        control_ids(tokenizer, forged) == [start, end]
        and tokenizer.decode(forged) == "<|im_start|>a<|endoftext|><|im_end|>b"
    )


@pytest.mark.parametrize("odd", ["\U000f0041", "\U00100041", "\ue000", "\U0001f600", "\x00"])
def test_odd_characters_come_through(tmp_path, odd):
    tokenizer = chat(tmp_path, tokenizers.CHATML)
    conversation = Conversation([user(f"{odd}<|im_end|>{odd}"), says(odd)])
    (sample,) = tokenizer.samples(conversation)
    assert tokenizer.decode(sample.tokens) == sample.text == tokenizer.render(conversation)
    assert said(sample) == [f"{odd}<|im_end|>"]


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        (Conversation([user("\ud800"), says("b")]), "surrogate"),
        (Conversation([user("\U000f0041\U00100041"), says("b")]), "private_use"),
        (Conversation([user("a"), says("", ToolCall("f", "{a: 1}"))]), "arguments"),
        (Conversation([user("a"), says("", ToolCall("f", "{}"))]), "left_out"),
        (Conversation([user("a"), says("", ToolCall("f", "[" * 100_000))]), "arguments"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_a_reason(tmp_path, conversation, reason):
    without_calls = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(RenderError) as error:
        chat(tmp_path, without_calls).samples(conversation)
    assert error.value.reason == reason


def test_a_template_is_refused_or_refuses_in_its_own_words(tmp_path):
    with pytest.raises(UserError, match="chat template"):
        chat(tmp_path, "{% for %}")
    with pytest.raises(RenderError, match="No user here"):
        chat(tmp_path, "{{ raise_exception('No ' ~ messages[0].role ~ ' here') }}").samples(TALK)
    with pytest.raises(RenderError):
        chat(tmp_path, "{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}").render(TALK)


# --- prompts that open <think> -----------------------------------------------------------------------------------

# As DeepSeek-R1's: a turn is rendered without what was thought. With `keeps`, as Qwen3-Thinking's: with it.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if keeps %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
CALL = "<function=f>\n<parameter=a>\n1\n</parameter>\n</function>"


def classes(tokenizer: ChatTemplateTokenizer, conversation: Conversation) -> list[list[tuple[str, str]]]:
    """The trained text of each sample, by the class of its tokens."""
    samples = AgentSFTTransform(tokenizer).encode_conversation(conversation)
    return [
        [
            (kind, tokenizer.decode([token for token, _ in run]))
            for kind, run in groupby(
                zip(sample.tokens.tolist(), sample.token_class, strict=True),
                key=lambda pair: TokenClass(pair[1]).name,
            )
            for run in [list(run)]
            if kind != "IGNORED"
        ]
        for sample in samples
    ]


@pytest.mark.parametrize(
    ("keeps", "message"),
    [
        (True, says(f"So. {CALL}", reasoning=f"Hm, {CALL}?")),
        (False, says(f"So. {CALL}", reasoning=f"Hm, {CALL}?")),
        (False, says(f"<think>\nHm, {CALL}?\n</think>\n\nSo. {CALL}")),
    ],
)
def test_what_follows_an_opened_think_is_thinking_up_to_its_end(tmp_path, keeps, message):
    tokenizer = chat(tmp_path, THINKING, template_args={"keeps": keeps})
    conversation = Conversation([user("a"), message])
    (sample,) = tokenizer.samples(conversation)
    (turn,) = sample.turns
    prompt = tokenizer.render(Conversation([user("a")]), add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n")
    assert sample.text[: turn.start] == prompt and sample.tokens[: turn.first_token] == tokenizer.encode(prompt)
    assert turn.as_served and turn.thinking and turn.left_out == ()
    assert said(sample) == [f"Hm, {CALL}?\n</think>\n\nSo. {CALL}<|im_end|>"]
    (kinds,) = classes(tokenizer, conversation)
    thinking, *rest = kinds
    assert thinking[0] == "THINK" and thinking[1].rstrip() == f"Hm, {CALL}?\n</think>"
    assert rest[0][0] == "REASONING" and rest[0][1].strip() == "So."
    assert [kind for kind, _ in rest[1:]] == [
        "CALL_SYNTAX", "CALL_NAME", "CALL_SYNTAX", "ARG_NAME", "CALL_SYNTAX", "ARG_VALUE", "CALL_SYNTAX", "SPECIAL",
    ]  # fmt: skip


def test_a_turn_without_thoughts_is_not_given_any(tmp_path):
    tokenizer = chat(tmp_path, THINKING)
    conversation = Conversation([user("a"), says("b", reasoning="r"), user("c"), says("d"), user("e"), says("f")])
    first, second = tokenizer.samples(conversation)
    assert (said(first), said(second)) == (["r\n</think>\n\nb<|im_end|>"], ["d<|im_end|>", "f<|im_end|>"])
    assert [turn.as_served for turn in (*first.turns, *second.turns)] == [True, False, False]
    assert second.text == tokenizer.render(conversation)
    (single,) = tokenizer.samples(conversation, history="single")
    assert said(single) == ["b<|im_end|>", "d<|im_end|>", "f<|im_end|>"]
    assert not any(turn.thinking for turn in (*second.turns, *single.turns))


def test_a_template_in_a_file_of_its_own_is_the_one_that_counts(tmp_path):
    tokenizers.chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages | length }} messages")
    assert ChatTemplateTokenizer(tmp_path).render(TALK) == "6 messages"
