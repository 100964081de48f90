"""Real chat templates and tokenizers, conversations for them, and `transformers` to compare with."""

import copy
import functools
import json
import random
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from torchtune_agent.data import ChatTemplateTokenizer
from torchtune_agent.data.chat_template import ChatTemplate, RenderError
from torchtune_agent.data.conversation import Conversation, Message, Role, ToolCall
from torchtune_agent.data.tokenizer_folder import TokenizerFolder

SHARED = Path(__file__).parents[2] / "shared"
MODELS = ("qwen2_5", "qwen3")
DATE = "2026-01-31"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the folder `shared` is not beside this checkout")


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
    """The tokenizer of a model's folder; with a template, as if that was in the folder."""
    if name is None:
        return ChatTemplateTokenizer(SHARED / "models" / model, date=DATE)
    tokenizer = copy.copy(ours(model, None))  # reading the folder takes a second
    source = (SHARED / "chat_templates" / name).read_text()
    tokenizer._template = ChatTemplate(source, _named(model), datetime.fromisoformat(DATE))
    return tokenizer


@functools.cache
def _named(model: str) -> dict[str, str]:
    return TokenizerFolder(SHARED / "models" / model).special_tokens


@pytest.fixture(autouse=True)
def the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `strftime_now` tells templates in transformers."""
    try:
        from transformers.utils import chat_template_utils
    except ImportError:
        return

    class Day(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
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


def control_ids(tokenizer: ChatTemplateTokenizer, tokens: list[int]) -> list[int]:
    known = set(tokenizer.special_tokens.values())
    return [token for token in tokens if token in known]
