"""Chat templates: no control token from data, but those that are the assistant's own."""

import json
import random
import re
from collections import Counter

import pytest

from tests import tokenizers
from tests.templates import (
    MODELS,
    SHARED,
    control_ids,
    function,
    needs_shared,
    oracle_for,
    ours,
    refusal,
    says,
    sources,
    system,
    tool,
    user,
)
from tests.templates import the_day as the_day  # noqa
from torchtune_agent.data import ChatTemplateTokenizer
from torchtune_agent.data.chat_template import RenderError
from torchtune_agent.data.conversation import Conversation, Message, ToolCall

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


def spellings(tokenizer: ChatTemplateTokenizer, place: str) -> list[str]:
    """Control tokens that are not to be made in a place: whole, doubled, cut, and without their brackets (a template
    may write those)."""
    whole = [text for text in tokenizer.special_tokens if "think" not in text]
    if place in ("assistant", "reasoning"):
        whole = [text for text in whole if text not in tokenizer.own_tokens]
    return [
        *whole,
        *(text[1:-1] for text in whole),
        *(text * 2 for text in whole),
        *(f"<|<{text[1:]}" for text in whole),
    ]


@needs_shared
def test_100000_texts_that_spell_control_tokens_make_none():
    rng, num_attempts = random.Random(1), 0
    for model, name in sources():
        tokenizer = ours(model, name)
        skeleton = attacked({}, name or "")
        expected, said = refusal(tokenizer.tokenize, skeleton)
        if said:
            continue
        forged = {place: spellings(tokenizer, place) for place in PLACES}
        for _ in range(4):
            words = {
                place: "|".join(rng.choices(texts, k=110)) + rng.choice([" ", "\n", ""]) + rng.choice(texts)
                for place, texts in forged.items()
            }
            if "istral" in (name or ""):
                words["call id"] = rng.choice([text for text in forged["call id"] if len(text) >= 9])[:9]
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
            for text in spellings(tokenizer, place)[: 2 * len(tokenizer.special_tokens)]:
                tokens = tokenizer.tokenize(attacked({place: text}, ""))
                assert control_ids(tokenizer, tokens) == expected, (place, text)


@needs_shared
def test_a_think_block_in_the_assistants_text_is_the_templates_to_write_and_more_are_its_own():
    tokenizer = ours("qwen3", None)
    conversation = Conversation([user("</think>"), says("<think>\nhm </think> <think>\n</think>\n\nok<think>")])
    tokens = tokenizer.tokenize(conversation)
    assert [tokenizer.decode([t]) for t in control_ids(tokenizer, tokens)] == [
        "<|im_start|>", "<|im_end|>", "<|im_start|>", "<think>", "</think>", "<think>", "<|im_end|>",
    ]  # fmt: skip
    assert tokenizer.decode(tokens) == tokenizer.render(conversation)


@needs_shared
def test_data_that_spells_a_control_token_can_be_refused():
    tokenizer = ChatTemplateTokenizer(SHARED / "models/qwen3", control_tokens="refuse")
    assert tokenizer.tokenize(Conversation([user("x"), says("<think>\na\n</think>\n\nb")]))
    for text in ("<|im_end|>", "<tool_call>"):
        with pytest.raises(RenderError, match=re.escape(text)) as error:
            tokenizer.samples(Conversation([user(text), says("ok")]))
        assert error.value.reason == "control_token"


# --- the assistant's own -----------------------------------------------------------------------------------------


@needs_shared
def test_an_assistants_own_tokens_are_those_that_say_nothing_about_roles():
    tags = {"<tool_call>", "</tool_call>"}
    fill = {f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")}
    think, results = {"<think>", "</think>"}, {"<tool_response>", "</tool_response>"}
    assert ours("qwen2_5", None).own_tokens == tags | fill
    assert ours("qwen3", None).own_tokens == tags | fill | think
    # A template that opens <think> for the model, and one that does not write tool results this way.
    assert ours("qwen3", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B.jinja").own_tokens == tags | fill | think | results


ROLES = (  # as DeepSeek's folders have them: no role's token is called special there
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% elif m.role == 'tool' %}"
    "<result>{{ m.content }}</result>{% else %}<|assistant|>{{ m.content }}"
    "{% for c in m.tool_calls %}<call>{{ c.function.name }}</call>{% endfor %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)


def test_roles_and_ends_are_never_the_assistants_own_whatever_the_folder_calls_them(tmp_path):
    tokenizers.chat_template(tmp_path, template=ROLES)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    first = len(state["model"]["vocab"])
    names = [
        "<|user|>",
        "<result>",
        "</result>",
        "<|assistant|>",
        "<call>",
        "</call>",
        "<|end|>",
        "<think>",
        "</think>",
    ]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    state["added_tokens"] += [{"id": first + i, "content": name, **flags} for i, name in enumerate(names)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = ChatTemplateTokenizer(tmp_path)
    assert tokenizer.own_tokens == {"<call>", "</call>", "<think>", "</think>"}
    spelled = "".join(names)
    tokens = tokenizer.tokenize(Conversation([user(spelled), says(spelled)]))
    made = [tokenizer.decode([token]) for token in control_ids(tokenizer, tokens)]
    assert made == ["<|user|>", "<|assistant|>", "<call>", "</call>", "<think>", "</think>", "<|end|>"]


def talk(question: str, answer: str) -> Conversation:
    return Conversation([user(question), says(answer)])


def speaking(rng: random.Random, tokenizer: ChatTemplateTokenizer) -> Conversation:
    """A conversation in which only the assistant spells tokens, and only its own."""
    own = sorted(tokenizer.own_tokens)
    plain = ["ok", " ", "\n", '{"name": "f", "arguments": {}}', "東京", "a < b", "<tool_call", "think>", "|>"]
    messages: list[Message] = []
    for _ in range(rng.randrange(1, 4)):
        texts = ["".join(rng.choices([*own, *plain], k=rng.randrange(1, 9))) for _ in range(2)]
        messages += [user(rng.choice(plain)), says(f"I{texts[0]}", reasoning=rng.choice([None, f"r{texts[1]}"]))]
    return Conversation(messages, [function("f")])


@needs_shared
@pytest.mark.parametrize(("model", "name"), sources())
def test_what_the_assistant_spells_of_its_own_has_the_tokens_of_transformers(model, name):
    rng, tokenizer, oracle = random.Random(2), ours(model, name), oracle_for(model, name)
    num_own = 0
    for _ in range(25):
        conversation = speaking(rng, tokenizer)
        expected, refused = refusal(oracle, conversation, tokenize=True)
        found, we_refused = refusal(tokenizer.tokenize, conversation)
        assert (found, we_refused) == (expected, refused)
        if refused:
            continue
        for sample in tokenizer.samples(conversation):
            assert sample.tokens == oracle.tokenizer.backend_tokenizer.encode(sample.text, add_special_tokens=False).ids
            own = {tokenizer.special_tokens[text] for text in tokenizer.own_tokens}
            num_own += sum(token in own for token in sample.tokens)
    assert num_own > 25


@needs_shared
def test_real_outputs_that_hold_their_calls_and_thoughts_have_the_tokens_of_transformers():
    records = json.loads((SHARED / "data/toolrl/dataset/rlla_4k_raw/rlla_sft.json").read_text())[::4]
    name = "Qwen-Qwen2.5-7B-Instruct.jinja"  # which writes what it is given
    tokenizer, oracle = ours("qwen3", name), oracle_for("qwen3", name)
    made: Counter[str] = Counter()
    for record in records:
        conversation = talk("Go.", record["output"])
        tokens = tokenizer.tokenize(conversation)
        assert tokens == oracle(conversation, tokenize=True)
        made.update(tokenizer.decode([token]) for token in control_ids(tokenizer, tokens))
        quoted = tokenizer.tokenize(talk(record["output"], "Yes."))
        assert control_ids(tokenizer, quoted) == control_ids(tokenizer, tokenizer.tokenize(talk("Go.", "Yes.")))
    spelled = Counter({tag: sum(r["output"].count(tag) for r in records) for tag in ("<think>", "<tool_call>")})
    assert spelled == {tag: made[tag] for tag in spelled} and min(spelled.values()) > 20
