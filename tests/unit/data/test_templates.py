"""Chat templates against `transformers`: the same tokens, the same contexts, and no control token from data."""

import functools
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tokenizers
from torchtune_agent.data import ChatTemplateTokenizer, toolworld
from torchtune_agent.data.chat_template import RenderError
from torchtune_agent.data.conversation import Conversation, Message, Role, ToolCall
from torchtune_agent.data.templates import Sample
from torchtune_agent.errors import UserError
from torchtune_agent.toolworld import __file__ as toolworld_file

SHARED = Path(__file__).parents[4] / "shared"
MODELS = ("qwen2_5", "qwen3")
DATE = "2026-01-31"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the folder `shared` is not beside this checkout")

# What ends a turn, read off each template by hand. Mistral's is the eos token, which these tokenizers call <|im_end|>.
ENDS = {
    "deepseek": ["<｜end▁of▁sentence｜>"],
    "google-gemma": ["<end_of_turn>"],
    "meta-llama": ["<|eot_id|>"],
    "microsoft-Phi": ["<|end|>"],
    "openai-gpt-oss": ["<|return|>", "<|call|>"],
    "": ["<|im_end|>"],
}


def system(text: str) -> Message:
    return Message(Role.SYSTEM, text)


def user(text: str) -> Message:
    return Message(Role.USER, text)


def tool(text: str, call_id: str | None = None, name: str | None = None) -> Message:
    return Message(Role.TOOL, text, tool_call_id=call_id, name=name)


def says(text: str = "", *calls: ToolCall, reasoning: str | None = None, train: bool | None = None) -> Message:
    return Message(Role.ASSISTANT, text, reasoning=reasoning, tool_calls=list(calls), train=train)


def function(name: str, description: str = "It does.", **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


# --- conversations -----------------------------------------------------------------------------------------------


def from_openai(record: dict[str, Any], limit: int | None = None) -> Conversation:
    messages = []
    for m in record["messages"][:limit]:
        content = m.get("content") or ""
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
        calls = [
            ToolCall(c["function"]["name"], c["function"]["arguments"], c.get("id")) for c in m.get("tool_calls") or []
        ]
        messages.append(Message(Role(m["role"]), content, None, calls, m.get("tool_call_id"), m.get("name")))
    return Conversation(messages, record.get("tools") or [])


def from_sharegpt(record: dict[str, Any]) -> Conversation:
    roles = {"human": Role.USER, "gpt": Role.ASSISTANT, "observation": Role.TOOL}
    messages = []
    for turn in record["conversations"]:
        if turn["from"] == "function_call":
            call = json.loads(turn["value"])
            messages.append(says("", ToolCall(call["name"], json.dumps(call["arguments"]), "call00000")))
        else:
            answers = "call00000" if turn["from"] == "observation" else None
            messages.append(Message(roles[turn["from"]], turn["value"], tool_call_id=answers))
    return Conversation(
        messages, [{"type": "function", "function": f} for f in json.loads(record.get("tools") or "[]")]
    )


def read_json(path: str) -> Any:
    return json.loads((SHARED / "data" / path).read_text())


def real() -> Iterator[Conversation]:
    for record in read_json("tau-bench/historical_trajectories/gpt-4o-airline.json")[:16]:
        yield from_openai({"messages": [{**record["traj"][0], "content": "A policy."}, *record["traj"][1:]]}, 10)
    for record in read_json("llamafactory/data/glaive_toolcall_en_demo.json")[:20]:
        yield from_sharegpt(record)
    lines = (SHARED / "data/swe-smith/tests/test_logs/ft_xml_example.jsonl").read_text().splitlines()
    for line in lines:
        yield from_openai(json.loads(line), 7)
    yield from_openai(read_json("functionary/tests/test_case.json"), 10)  # then comes a call whose arguments are Python
    yield from_openai({"messages": read_json("openhands-sdk/tests/fixtures/llm_data/fncall-llm-message.json")})


TEXTS = [
    "",
    "ok",
    " two  spaces ",
    "\n\nlines\n",
    "東京 👩‍👩‍👧‍👦 Zoë",
    "e\u0301 and é",
    "مرحبا",
    "a < b | c > d",
    "\u00a0x\r\n",
    "1.10",
    '"q" \\n',
]
VALUES = [1, 1.5, True, None, "", "東京", [1, "二"], {"k": [{}]}, "</p>", "a\nb", -0.0, 10**20]


def generated(rng: random.Random) -> Conversation:
    """Two to four questions, parallel calls, with or without system, tools, reasoning."""
    tools = [
        function(f"f{i}", rng.choice(TEXTS), a={"type": "string", "description": "ä"}) for i in range(rng.randrange(3))
    ]
    messages = [system(rng.choice(TEXTS))] * rng.randrange(2)
    for _ in range(rng.randrange(2, 5)):
        messages.append(user(rng.choice(TEXTS)))
        for _ in range(rng.randrange(3)):
            ids = [f"call{rng.randrange(10**5):05}" for _ in range(rng.choice([1, 1, 2, 3]))]
            arguments = [json.dumps({f"a{j}": rng.choice(VALUES) for j in range(rng.randrange(3))}) for _ in ids]
            calls = [ToolCall(f"f{rng.randrange(3)}", a, i) for a, i in zip(arguments, ids, strict=True)]
            messages.append(says(rng.choice(TEXTS), *calls, reasoning=rng.choice([None, *TEXTS])))
            messages += [tool(rng.choice(TEXTS), i, call.name) for i, call in zip(ids, calls, strict=True)]
        messages.append(says(rng.choice(TEXTS), reasoning=rng.choice([None, *TEXTS])))
    return Conversation(messages, tools)


@functools.cache
def conversations() -> list[Conversation]:
    rng = random.Random(0)
    plain = [Conversation([user("hi"), says("hello"), user("東京?"), says("晴れ👩‍🚀\n")]) for _ in range(1)]
    plain += [
        from_openai({"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": t}]})
        for t in TEXTS
    ]
    return [*real(), *plain, *(generated(rng) for _ in range(28))]


# --- the oracle --------------------------------------------------------------------------------------------------


def as_openai(conversation: Conversation) -> list[dict[str, Any]]:
    messages = []
    for m in conversation.messages:
        message: dict[str, Any] = {"role": m.role.value, "content": m.content, "reasoning_content": m.reasoning}
        if m.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": c.name, "arguments": json.loads(c.arguments)}}
                | ({"id": c.id} if c.id else {})
                for c in m.tool_calls
            ]
        messages.append(message | {"tool_call_id": m.tool_call_id, "name": m.name})
    return messages


class Oracle:
    """`transformers` with one tokenizer and one template."""

    def __init__(self, model: str, source: str | None) -> None:
        self.tokenizer, self.source = _transformers(model), source

    def __call__(
        self, conversation: Conversation, stop: int | None = None, prompt: bool = False, tokenize: bool = False
    ) -> Any:
        return self.tokenizer.apply_chat_template(
            as_openai(conversation)[:stop],
            tools=conversation.tools or None,
            chat_template=self.source,
            add_generation_prompt=prompt,
            tokenize=tokenize,
            return_dict=False,
        )

    def own_text(self, through: str, start: int, ends: list[str]) -> str:
        return through[start : max(through.rfind(end) + len(end) for end in ends if end in through)]


@functools.cache
def _transformers(model: str) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(str(SHARED / "models" / model))


def sources() -> list[tuple[str, str | None]]:
    """(model, template) of every pairing; None is the folder's own."""
    names = sorted(path.name for path in (SHARED / "chat_templates").glob("*.jinja"))
    return [(model, name) for model in MODELS for name in [None, *names]] if SHARED.exists() else []


@functools.cache
def ours(model: str, name: str | None) -> ChatTemplateTokenizer:
    return _with_template(model, name, control_tokens="text")


def _with_template(model: str, name: str | None, **options: Any) -> ChatTemplateTokenizer:
    import tempfile

    if name is None:
        return ChatTemplateTokenizer(SHARED / "models" / model, date=DATE, **options)
    with tempfile.TemporaryDirectory() as folder:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (Path(folder) / file).symlink_to(SHARED / "models" / model / file)
        (Path(folder) / "chat_template.jinja").write_text((SHARED / "chat_templates" / name).read_text())
        return ChatTemplateTokenizer(folder, date=DATE, **options)


@pytest.fixture(autouse=True)
def _the_day(monkeypatch):
    """What `strftime_now` tells templates in transformers."""
    try:
        from transformers.utils import chat_template_utils
    except ImportError:
        return

    class Day(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.fromisoformat(DATE)

    monkeypatch.setattr(chat_template_utils, "datetime", Day)


def oracle_for(model: str, name: str | None) -> Oracle:
    return Oracle(model, (SHARED / "chat_templates" / name).read_text() if name else None)


def refusal(act: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, str | None]:
    """The result, or what the template said instead."""
    try:
        return act(*args, **options), None
    except RenderError as error:
        assert error.reason == "template", error
        return None, str(error).removeprefix("chat template: ")
    except Exception as error:  # transformers lets through whatever the template's code raises
        return None, str(error)


NUM_PAIRS: Counter[str] = Counter()


@needs_shared
@pytest.mark.parametrize(("model", "name"), sources())
def test_tokens_equal_those_of_transformers(model, name):
    tokenizer, oracle = ours(model, name), oracle_for(model, name)
    for conversation in conversations():
        expected, said = refusal(oracle, conversation, tokenize=True)
        found, we_said = refusal(tokenizer.tokenize, conversation)
        assert (found, we_said) == (expected, said)
        NUM_PAIRS["refused" if said else "equal"] += 1


@needs_shared
def test_there_are_at_least_2000_pairs():
    assert len(conversations()) * len(sources()) >= 2000
    assert not NUM_PAIRS or NUM_PAIRS["equal"] > 1000 or NUM_PAIRS.total() < 2000


@needs_shared
@pytest.mark.parametrize(("model", "name"), sources())
def test_every_turn_is_trained_once_in_the_context_a_server_shows(model, name):
    tokenizer, oracle = ours(model, name), oracle_for(model, name)
    ends = next(ends for prefix, ends in ENDS.items() if (name or "").startswith(prefix))
    num_checked = 0
    for conversation in conversations():
        try:
            samples = tokenizer.samples(conversation)
        except RenderError as error:
            assert error.reason in ("template", "left_out")
            continue
        check_samples(samples, conversation, oracle, ends, name or "")
        num_checked += 1
    assert num_checked


def check_samples(
    samples: list[Sample], conversation: Conversation, oracle: Oracle, ends: list[str], name: str
) -> None:
    turns = [i for i, m in enumerate(conversation.messages) if m.role is Role.ASSISTANT]
    assert [turn.message for sample in samples for turn in sample.turns] == turns
    num_samples, before = 0, None
    for sample in samples:
        encoding = oracle.tokenizer.backend_tokenizer.encode(sample.text, add_special_tokens=False)
        assert sample.tokens == encoding.ids
        starts, stops = np.array(encoding.offsets).T
        for turn in sample.turns:
            context, through = oracle(conversation, turn.message, prompt=True), oracle(conversation, turn.message + 1)
            assert turn.as_served == ("deepseek" not in name)
            if "deepseek" in name:  # its prompt opens <think>, which its renderings of a turn do not have
                context = context.removesuffix("<think>\n")
            assert sample.text[: turn.start] == context
            own = sample.text[turn.start : turn.stop]
            if through.startswith(context):
                assert own == oracle.own_text(through, len(context), ends)
            else:  # the turn changes what stands before it
                assert any(m in name for m in ("istral", "gpt-oss", "Hermes")) or "Qwen3" in name or not name
                assert oracle.own_text(through, 0, ends).endswith(own) and own.endswith(tuple(ends))
                assert not re.match(r"\S*<\|im_start\|>|<\|start\|>", own)
            assert own.endswith(tuple(ends))
            assert (num_samples > 0 and context.startswith(before or "")) == (turn is not sample.turns[0])
            num_samples, before = num_samples + (turn is sample.turns[0]), context + own
            inside = np.flatnonzero((starts >= turn.start) & (stops <= turn.stop))
            assert inside.tolist() == list(range(turn.first_token, turn.stop_token))
    assert num_samples == len(samples)


@needs_shared
def test_a_template_that_keeps_history_gives_one_sample_with_the_tokens_of_the_whole():
    tokenizer = ours("qwen2_5", None)
    for conversation in conversations():
        ends = max(i for i, m in enumerate(conversation.messages) if m.role is Role.ASSISTANT)
        (sample,) = tokenizer.samples(conversation)
        assert sample.tokens == tokenizer.tokenize(Conversation(conversation.messages[: ends + 1], conversation.tools))


@needs_shared
@pytest.mark.parametrize(("model", "name"), sources())
def test_one_text_trains_the_same_turns(model, name):
    tokenizer = ours(model, name)
    for conversation in conversations()[::5]:
        try:
            samples = tokenizer.samples(conversation, history="single")
        except RenderError:
            continue
        (sample,) = samples
        assert sample.text == tokenizer.render(conversation)
        spans = [(turn.start, turn.end, turn.stop) for turn in sample.turns]
        assert spans == sorted(spans) and all(a[2] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
        for turn in sample.turns:
            message = conversation.messages[turn.message]
            own = sample.text[turn.start : turn.stop]
            assert "content" in turn.left_out or message.content.strip() in own
            assert all(call.name in own for call in message.tool_calls)
            assert not any(header in own for header in ("<|im_start|>", "[INST]", "<tool_response>"))


# --- what data spells --------------------------------------------------------------------------------------------

# Templates look for </think> in what the assistant says, which is theirs to do: tested apart.
PLACES = (
    "system",
    "user",
    "assistant",
    "tool",
    "reasoning",
    "value",
    "key",
    "call id",
    "tool name",
    "description",
    "property",
)


def attacked(words: dict[str, str], name: str) -> Conversation:
    """A conversation with `words` in the places they are for; "" elsewhere."""
    get = words.get
    call = ToolCall(
        "f", json.dumps({f"k{get('key', '')}": get("value", ""), get("key", "k"): 1}), get("call id") or "call00001"
    )
    call.name += get("tool name", "")
    messages = [
        user(f"x{get('user', '')}"),
        says("", call),
        tool(get("tool", ""), call.id, call.name),
        says(f"ok{get('assistant', '')}", reasoning=f"r{get('reasoning', '')}"),
        user(get("user", "")),
        says(get("assistant", "")),
    ]
    properties = {"type": "string", "description": get("description", ""), "enum": [get("value", "")]}
    properties |= {get("key", "k"): "v"}
    tools = [function(call.name, get("description", ""), **{f"p{get('property', '')}": properties})]
    no_system = any(part in name for part in ("gemma", "DeepSeek"))
    return Conversation([*([] if no_system else [system(get("system", ""))]), *messages], tools)


def spellings(tokenizer: ChatTemplateTokenizer) -> list[str]:
    """Control tokens whole, doubled, cut, and without their brackets (a template may write those)."""
    whole = [text for text in tokenizer.special_tokens if "think" not in text]
    return [
        *whole,
        *(text[1:-1] for text in whole),
        *(text * 2 for text in whole),
        *(f"<|<{text[1:]}" for text in whole),
    ]


def control_ids(tokenizer: ChatTemplateTokenizer, tokens: list[int]) -> list[int]:
    known = set(tokenizer.special_tokens.values())
    return [token for token in tokens if token in known]


@needs_shared
def test_100000_texts_that_spell_control_tokens_make_none():
    rng, num_attempts = random.Random(1), 0
    for model, name in sources():
        tokenizer = ours(model, name)
        skeleton = attacked({}, name or "")
        expected, said = refusal(tokenizer.tokenize, skeleton)
        if said:
            continue
        forged = spellings(tokenizer)
        for _ in range(4):
            words = {
                place: "|".join(rng.choices(forged, k=110)) + rng.choice([" ", "\n", ""]) + rng.choice(forged)
                for place in PLACES
            }
            if "istral" in (name or ""):
                words["call id"] = rng.choice([text for text in forged if len(text) >= 9])[:9]
            conversation = attacked(words, name or "")
            tokens = tokenizer.tokenize(conversation)
            assert control_ids(tokenizer, tokens) == control_ids(tokenizer, expected)
            assert tokenizer.decode(tokens) == tokenizer.render(conversation)
            num_attempts += 111 * len(words)
    assert num_attempts >= 100_000


@needs_shared
@pytest.mark.parametrize("model", MODELS)
def test_each_control_token_in_each_place_alone(model):
    for name in (None, "vllm-qwen3coder.jinja"):
        tokenizer = ours(model, name)
        expected = control_ids(tokenizer, tokenizer.tokenize(attacked({}, "")))
        for place in PLACES:
            for text in spellings(tokenizer)[: 2 * len(tokenizer.special_tokens)]:
                tokens = tokenizer.tokenize(attacked({place: text}, ""))
                assert control_ids(tokenizer, tokens) == expected, (place, text)


@needs_shared
def test_a_think_block_in_the_assistants_text_is_the_templates_to_write():
    tokenizer = ours("qwen3", None)
    conversation = Conversation([user("</think>"), says("<think>\nhm </think> <think>\n</think>\n\nok<think>")])
    tokens = tokenizer.tokenize(conversation)
    assert [tokenizer.decode([t]) for t in control_ids(tokenizer, tokens)] == [
        "<|im_start|>", "<|im_end|>", "<|im_start|>", "<think>", "</think>", "<|im_end|>",
    ]  # fmt: skip
    assert tokenizer.decode(tokens) == tokenizer.render(conversation)


@needs_shared
def test_data_that_spells_a_control_token_can_be_refused():
    tokenizer = _with_template("qwen3", None, control_tokens="refuse")
    assert tokenizer.tokenize(Conversation([user("x"), says("<think>\na\n</think>\n\nb")]))
    for text in ("<|im_end|>", "<tool_call>"):
        with pytest.raises(RenderError, match=re.escape(text)) as error:
            tokenizer.samples(Conversation([user(text), says("ok")]))
        assert error.value.reason == "control_token"


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
