"""Tokens from the memory of words, and beginnings from the rendering of the whole, against those made each time."""

import json
import random
from pathlib import Path

import pytest
from jinja2 import Environment
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from torchtune_agent.data import word_memory
from torchtune_agent.data.beginnings import writes_messages_in_one_loop
from torchtune_agent.data.chat_template import ChatTemplate, Rendering
from torchtune_agent.data.control_tokens import ControlTokens
from torchtune_agent.data.conversation import Conversation, Message, Role
from torchtune_agent.data.toolworld import toolworld_tokenizer

PATTERNS = {"gpt2": word_memory._GPT2, "qwen": word_memory._QWEN, "llama3": word_memory._LLAMA3}
# What the expressions look at, what cuts a text into parts, and what must not: other letters, digits, spaces, marks.
PARTS = [
    *"abZ'sTlL  \t\n\r0129.,;<|>{}",
    "don't ",
    "IT'S ",
    " \n",
    "é",
    "京",
    "e\u0301",
    "\u0301",
    "ſ",
    "\u3000",
    "٣",
    "\x0b",
]
PARTS += ["\x1c", "\x85", " word ", "12345", "K"]


def cutting_by(pattern: str) -> Tokenizer:
    """Toolworld's vocabulary behind another expression."""
    state = json.loads(toolworld_tokenizer()._tokenizer.to_str())
    tokenizer = Tokenizer(models.BPE(state["model"]["vocab"], _merges(state)))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


def _merges(state: dict) -> list[tuple[str, str]]:
    merges = state["model"]["merges"]
    return [(a, b) for a, b in (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)]


@pytest.mark.parametrize("name", PATTERNS)
def test_words_from_memory_are_those_of_the_tokenizer(name):
    tokenizer, rng = cutting_by(PATTERNS[name]), random.Random(0)
    controls = ControlTokens(tokenizer)
    assert controls._words is not None
    for _ in range(10_000):
        text = "".join(rng.choices(PARTS, k=rng.randrange(1, 40)))
        encoded = controls.encode(text, None, [])
        assert encoded.tokens == tokenizer.encode(text, add_special_tokens=False).ids, repr(text)
        char = rng.randrange(len(text))
        offsets = tokenizer.encode(text, add_special_tokens=False).offsets
        assert encoded.touching(0, char)[1] == sum(start < char for start, _ in offsets), repr(text)


def test_a_tokenizer_that_may_cut_otherwise_has_no_memory():
    assert word_memory.word_memory(cutting_by(r"\w+|\s+|[^\w\s]+")) is None
    spaced = cutting_by(PATTERNS["qwen"])
    spaced.add_tokens(["    "])  # cuts the text before its words are found
    assert word_memory.word_memory(spaced) is None


def test_words_are_forgotten_when_there_are_many(monkeypatch):
    monkeypatch.setattr(word_memory, "_MAX_REMEMBERED", 100)
    tokenizer = cutting_by(PATTERNS["qwen"])
    words = word_memory.word_memory(tokenizer)
    assert words is not None
    for number in range(500):
        text = f"word {number} of many"
        assert words.tokens(text) == tokenizer.encode(text).ids
        assert len(words._known) < 200


LOOP = "{% for m in messages %}"
# template -> whether every beginning is known from the whole
TEMPLATES = {
    "[{{ messages[0].content }}]" + LOOP + "<{{ m.role }}>{{ m.content }}{% endfor %}{{ add_generation_prompt }}": True,
    LOOP + "{{ m.content }}{% if loop.last %}!{% endif %}{% endfor %}": True,
    LOOP + "{{ m.content }}{% if not loop.last and loop.nextitem.role == 'tool' %}+{% endif %}{% endfor %}.": True,
    LOOP + "{{ loop.index0 and messages[loop.index0 - 1].role }}{{ m.content }}{% endfor %}": True,
    LOOP + "{{ m.content }}{{ (messages[loop.index0 + 1] or m).role }}{% endfor %}": True,
    LOOP + "{{ m.content }}{{ messages | length }}{% endfor %}": True,
    LOOP + "{{ m.content }}{{ add_generation_prompt }}{% endfor %}": True,
    LOOP + "{{ m.content }}{% endfor %}{{ messages[-1].role }}": False,
    LOOP + "{{ m.content }}{% endfor %}{{ messages | length }}": False,
    "{% set ns = namespace(n=0) %}" + LOOP + "{% set ns.n = ns.n + 1 %}{{ m.content }}{% endfor %}{{ ns.n }}": False,
    "{% set j = joiner('-') %}" + LOOP + "{{ j() }}{{ m.content }}{% endfor %}{{ j() }}": False,
    LOOP + "{{ m.role }}{% endfor %}" + LOOP + "{{ m.content }}{% endfor %}": False,
}


@pytest.mark.parametrize("source", TEMPLATES)
def test_beginnings_are_as_they_are_rendered_by_themselves(source):
    template = ChatTemplate(source, {})
    assert writes_messages_in_one_loop(Environment().parse(source)) is TEMPLATES[source]
    roles = ["system", "user", "assistant", "tool", "tool", "assistant", "user", "assistant"]
    conversation = Conversation([Message(Role(role), f"text {i}") for i, role in enumerate(roles)])
    rendering = Rendering(template, conversation, {})
    for stop in range(1, len(roles) + 1):
        for prompt in (False, True):
            alone = template.pieces(rendering.messages[:stop], None, prompt, {}, rendering.marks)
            assert rendering.render(stop, prompt=prompt) == "".join(alone)
    assert (rendering._beginnings is not None) is TEMPLATES[source]


def test_templates_of_models_are_known_to_write_messages_in_one_loop():
    folder = Path(__file__).parents[4] / "shared" / "chat_templates"
    if not folder.is_dir():
        pytest.skip("no templates of models here")
    source = (folder / "Qwen-Qwen2.5-7B-Instruct.jinja").read_text()
    assert writes_messages_in_one_loop(Environment().parse(source))
