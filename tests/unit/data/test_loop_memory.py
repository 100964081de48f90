"""Loops with a memory against jinja's own: the same text, or the same error, whatever a template looks at."""

import json
import random
from typing import Any

import pytest
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tests.tokenizers import CHATML
from torchtune_agent.data.chat_template import ChatTemplate, RenderError
from torchtune_agent.data.loop_memory import LoopMemory, Memory, remember_loops

PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"
EACH = "{% for m in messages %}"
END = "{% endfor %}" + PROMPT

REMEMBERED = {
    "plain": f"{EACH}<{{{{ m.role }}}}>{{{{ m.content }}}}{END}",
    "the end": EACH + "{{ m.content }}{% if loop.last %}.{% else %},{% endif %}" + END,
    "neighbours": EACH
    + "{% if loop.first or loop.previtem.role != m.role %}<{{ m.role }}>{% endif %}{{ m.content }}"
    + "{% if loop.last or loop.nextitem.role != m.role %}</>{% endif %}"
    + END,
    "neighbours by index": EACH
    + "{% if loop.index0 == 0 or messages[loop.index0 - 1].role != m.role %}<{{ m.role }}>{% endif %}"
    + "{{ m.content }}{% if loop.last or messages[loop.index0 + 1].role != m.role %}</>{% endif %}"
    + END,
    "before the first": EACH + "{{ messages[loop.index0 - 1].content }}-{{ m.content }} " + END,
    "past the last": EACH + "{{ messages[loop.index].content }}{{ messages[loop.index + 1] is defined }} " + END,
    "past the last fails": EACH + "{{ messages[loop.index].content.upper() }}" + END,
    "two ahead": EACH + "{{ (messages[loop.index + 1] or m).content }} " + END,
    "how many": EACH + "{{ loop.index }}/{{ loop.length }}/{{ messages | length }}{{ m.content }} " + END,
    "the last": EACH + "{{ messages[-1].content }}{{ m.content == messages[-1].content }}" + END,
    "the rest": EACH
    + "{% for f in messages[loop.index:] %}{{ f.role }}{% if loop.last %}.{% endif %}{% endfor %};{% endfor %}",
    "all of them": EACH + "{{ messages | map(attribute='role') | join }}{{ m in messages }}" + END,
    "a count": "{% set ns = namespace(n=0) %}"
    + EACH
    + "{% if m.role == 'user' %}{% set ns.n = ns.n + 1 %}{% endif %}{{ ns.n }}"
    + END
    + "{{ ns.n }}",
    "a count of another name": "{% set ns = namespace(n=0) %}{% set other = ns %}"
    + EACH
    + "{% set other.n = other.n + 1 %}{{ ns.n }}"
    + END
    + "{{ ns.n }}",
    "what was said last": "{% set ns = namespace(said=none) %}"
    + EACH
    + "{{ ns.said }}{% set ns.said = m.content %}"
    + END
    + "{{ ns.said }}",
    "a list that grows": "{% set ns = namespace(said=[]) %}"
    + EACH
    + "{% set ns.said = ns.said + [m.content] %}{{ ns.said | length }}"
    + END
    + "{{ ns.said | join }}",
    "an object in a namespace": "{% set ns = namespace(sep=none) %}"
    + EACH
    + "{% if loop.first %}{% set ns.sep = joiner('+') %}{% endif %}{{ ns.sep() }}{{ m.content }}"
    + END
    + "{{ ns.sep() }}",
    "a new name in a namespace": "{% set ns = namespace() %}"
    + EACH
    + "{{ ns.a is defined }}{% if m.role == 'user' %}{% set ns.a = 1 %}{% endif %}"
    + END
    + "{{ ns.a is defined }}",
    "an object": "{% set sep = joiner('+') %}" + EACH + "{{ sep() }}{{ m.content }}" + END + "{{ sep() }}",
    "turns of an object": "{% set turn = cycler('a', 'b') %}" + EACH + "{{ turn.next() }}" + END + "{{ turn.next() }}",
    "an iterator": "{% set it = messages | map(attribute='content') %}" + EACH + "{{ it | first }}" + END,
    "the last question": "{% set ns = namespace(at=0, seen=false) %}{% for m in messages[::-1] %}"
    "{% if m.role == 'user' and not ns.seen %}{% set ns.at = messages | length - loop.index %}{% set ns.seen = true %}"
    "{% endif %}{% endfor %}" + EACH + "{% if loop.index0 > ns.at %}<think>{% endif %}{{ m.content }}" + END,
    "two loops": "{% set ns = namespace(system='') %}"
    + EACH
    + "{% if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}{% endfor %}{{ ns.system }}"
    + EACH
    + "{{ m.content }}{{ ns.system }}"
    + END,
    "without the first": "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}"
    + EACH
    + "{{ loop.index0 }}{{ m.content }}{% if loop.last %}.{% endif %}"
    + END,
    "under another name": "{% set them = messages %}{% for m in them %}{{ messages | length }}{{ m.content }}" + END,
    "a variable of the same name": "{% set text = 'x' %}"
    + EACH
    + "{{ text }}{% if m.role == 'user' %}{% set text = m.content %}{% endif %}{{ text }}"
    + END
    + "{{ text }}",
    "a variable that is set at times": EACH
    + "{% if m.role == 'user' %}{% set text = m.content %}{% endif %}{{ text }}{{ text is defined }}"
    + END,
    "a variable from what is last": "{% set last = messages[-1].content %}" + EACH + "{{ last }}{{ m.content }}" + END,
    "a macro": "{% set mark = '!' %}{% macro say(text) %}{{ text }}{{ mark }}{% endmacro %}"
    + EACH
    + "{{ say(m.content) }}"
    + END,
    "a macro that counts": "{% set ns = namespace(n=0) %}{% macro say(text) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}"
    "{% endmacro %}" + EACH + "{{ say(m.content) }}" + END + "{{ ns.n }}",
    "one macro or the other": "{% macro a() %}A{% endmacro %}{% macro b() %}B{% endmacro %}"
    "{% set say = a if messages | length > 2 else b %}" + EACH + "{{ say() }}" + END,
    "a macro of two bodies": "{% if messages | length > 2 %}{% macro say() %}A{% endmacro %}{% else %}"
    "{% macro say() %}B{% endmacro %}{% endif %}" + EACH + "{{ say() }}" + END,
    "zeros": "{% set z = -0.0 if messages | length > 2 else 0.0 %}{% set ns = namespace(z=z) %}"
    + EACH
    + "{{ z }}{{ ns.z }}"
    + END,
    "one or true": "{% set z = 1 if messages | length > 2 else true %}" + EACH + "{{ z }}" + END,
    "a macro and the last": "{% set last = messages[-1].content %}{% macro end() %}{{ last }}{% endmacro %}"
    + EACH
    + "{{ end() }}"
    + END,
    "a refusal": EACH + "{% if loop.index > 3 %}{{ raise_exception('too many: ' ~ m.content) }}{% endif %}x" + END,
    "none": "{% for t in tools %}{{ t }}{% endfor %}{% for u in unknown %}{{ u }}{% endfor %}" + EACH + "x" + END,
    "letters": "{% set w = 'abc' %}{% for c in w %}{{ c }}{% if loop.last %}.{% endif %}{% endfor %}" + EACH + END,
    "keys": "{% set d = {'a': 1, 'b': 2} %}{% for k in d %}{{ k }}{{ d[k] }}{{ loop.last }}{% endfor %}" + EACH + END,
    "chatml": CHATML,
}  # fmt: skip

LEFT_ALONE = {
    "a break": EACH + "{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}" + END,
    "a filter": "{% for m in messages if m.role == 'user' %}{{ m.content }}{{ loop.last }}" + END,
    "an else": EACH + "{{ m.content }}{% else %}nothing{% endfor %}",
    "whether it changed": EACH + "{{ loop.changed(m.role) }}" + END,
    "the other half": EACH + "{{ loop.revindex }}{{ loop.cycle('a', 'b') }}" + END,
    "the loop itself": EACH + "{% set here = loop %}{{ here.last }}{{ here.length }}" + END,
    "in a macro": "{% macro say() %}" + EACH + "{{ m.content }}{{ loop.last }}{% endfor %}{% endmacro %}{{ say() }}",
    "seen by a macro": "{% macro say() %}{{ messages[-1].content }}{% endmacro %}" + EACH + "{{ say() }}" + END,
    "pairs": "{% for a, b in [(1, 2)] %}{{ a }}{{ b }}{{ loop.last }}{% endfor %}" + EACH + "{{ loop['last'] }}" + END,
    "a slice": "{% for m in messages[1:] %}{{ m.content }}{{ loop.last }}" + END,
}
TEMPLATES = REMEMBERED | LEFT_ALONE


def raise_(text: str) -> None:
    raise ValueError(text)


def jinjas(template: str) -> Any:
    """The template without a memory, as the text or the error."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = raise_
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    compiled = environment.from_string(template)

    def render(**values: Any) -> str:
        try:
            return compiled.render(**values)
        except Exception as error:
            return f"error: {error}"

    return render


def conversation(rng: random.Random) -> list[dict[str, Any]]:
    roles = rng.choices(["user", "assistant", "tool", "system"], [4, 4, 4, 1], k=rng.randrange(1, 9))
    return [{"role": role, "content": rng.choice(["", "a", "b", "東京"])} for role in roles]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_rendered_with_a_memory_is_what_jinja_renders(name):
    rng = random.Random(name)
    expected, template = jinjas(TEMPLATES[name]), ChatTemplate(TEMPLATES[name], {})
    tools: list[Any] = []
    for _ in range(15):
        memory: Memory = {}
        messages = conversation(rng)
        others = [*messages[:-1], {"role": "user", "content": "other"}]
        for _ in range(12):
            now = rng.choice([messages, messages, others])[: rng.randrange(len(messages) + 1)]
            prompt = rng.random() < 0.5
            try:
                found = "".join(template.pieces(now, tools, prompt, {}, memory=memory))
            except RenderError as error:
                found = f"error: {str(error).removeprefix('chat template: ')}"
            assert found == expected(messages=now, tools=tools, add_generation_prompt=prompt)


@pytest.mark.parametrize("name", TEMPLATES)
def test_which_loops_are_remembered(name):
    environment = ImmutableSandboxedEnvironment(extensions=[loopcontrols, LoopMemory])
    tree = remember_loops(environment, environment.parse(TEMPLATES[name]))
    assert any(tree.find_all(nodes.CallBlock)) == (name in REMEMBERED)


class Counting(dict):
    """A message that counts how often its content is read."""

    reads = 0

    def __getitem__(self, key: str) -> Any:
        self.reads += key == "content"
        return super().__getitem__(key)


@pytest.mark.parametrize(
    "name", ["plain", "neighbours", "neighbours by index", "what was said last", "the last question", "chatml"]
)
def test_a_message_is_written_again_only_where_something_changed(name):
    template, memory = ChatTemplate(TEMPLATES[name], {}), {}
    messages = [Counting(role=["assistant", "tool"][i % 2] if i else "user", content=str(i)) for i in range(60)]
    for stop in range(1, len(messages) + 1):
        template.pieces(messages[:stop], None, True, {}, memory=memory)
    reads = [message.reads for message in messages[:-1]]
    assert 1 <= min(reads) and max(reads) <= 8
