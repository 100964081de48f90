"""torchtune's own tokenizers: data that spells control tokens stays text, in whatever field it stands."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from torchtune.data import Message
from torchtune.models.gemma import GemmaTokenizer
from torchtune.models.mistral import MistralTokenizer
from torchtune.models.qwen2 import Qwen2Tokenizer
from torchtune.models.qwen2_5._tokenizer import Qwen2_5Tokenizer

from tests import tokenizers
from torchtune_agent.data import AgentSFTTransform
from torchtune_agent.data.formats import FORMATS
from torchtune_agent.data.reasons import BadRecord
from torchtune_agent.data.token_text import vocabulary
from torchtune_agent.errors import UserError

GEMMA_TURNS = ["<start_of_turn>", "<end_of_turn>"]
TAGS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
PLACES = ("system", "user", "tool", "assistant", "reasoning", "name", "key", "value", "description")


def qwen3_like(folder: Path) -> Qwen2_5Tokenizer:
    """Qwen's, with tokens for thinking and for tool results."""
    made = tokenizers.qwen2_5(folder)
    names = [*made.special_tokens, "<think>", "</think>", "<tool_response>", "</tool_response>"]
    special = {name: 400 + i for i, name in enumerate(names)}
    return Qwen2_5Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), special_tokens=special)


def gemma_with_turns(folder: Path) -> GemmaTokenizer:
    """As Gemma's own file has them: the marks of turns are words that encoding finds in any text."""
    return tokenizers.gemma(folder, user_defined_symbols=GEMMA_TURNS)


def mistral_untemplated(folder: Path) -> MistralTokenizer:
    """Its template has no place for a system message."""
    tokenizer = tokenizers.mistral(folder)
    tokenizer.prompt_template = None
    return tokenizer


MAKERS = {
    **tokenizers.ALL,
    "mistral": mistral_untemplated,
    "qwen3_like": qwen3_like,
    "gemma_with_turns": gemma_with_turns,
}
del MAKERS["chat_template"]


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param))


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """By spelling; read off the tokenizer itself."""
    if hasattr(tokenizer, "special_tokens"):
        return tokenizer.special_tokens
    model = tokenizer._spm_model.spm_model
    control = {model.id_to_piece(i): i for i in range(model.vocab_size()) if model.is_control(i)}
    turns = {turn: model.piece_to_id(turn) for turn in GEMMA_TURNS if model.piece_to_id(turn) != model.unk_id()}
    return control | turns


def spelling(**words: str) -> dict[str, Any]:
    """A record with words in the places they are for."""
    get = words.get
    arguments = {f"k{get('key', '')}": f"v{get('value', '')}", "n": [f"w{get('value', '')}"]}
    call = {"id": "1", "function": {"name": f"f{get('name', '')}", "arguments": json.dumps(arguments)}}
    schema = {"name": "f", "description": f"d{get('description', '')}", "parameters": {"type": "object"}}
    messages = [
        {"role": "system", "content": f"s{get('system', '')}z"},
        {"role": "user", "content": f"u{get('user', '')}z"},
        {"role": "assistant", "content": f"a{get('assistant', '')}z", "tool_calls": [call]},
        {"role": "tool", "content": f"t{get('tool', '')}z", "tool_call_id": "1"},
        {"role": "assistant", "content": f"b{get('assistant', '')}z", "reasoning_content": f"r{get('reasoning', '')}z"},
    ]
    return {"messages": messages, "tools": [{"type": "function", "function": schema}]}


def ids(tokenizer: Any, record: dict[str, Any], **options: Any) -> list[int]:
    (sample,) = AgentSFTTransform(tokenizer, **options).encode_conversation(FORMATS["openai"](record))
    return sample.tokens.tolist()


def made(tokenizer: Any, tokens: list[int]) -> list[int]:
    known = set(control_tokens(tokenizer).values())
    return [token for token in tokens if token in known]


def test_each_control_token_in_each_place_alone(tokenizer: Any) -> None:
    expected = made(tokenizer, ids(tokenizer, spelling()))
    spell = vocabulary(tokenizer).spell
    for place in PLACES:
        for text in list(control_tokens(tokenizer))[:40]:
            if place in ("assistant", "reasoning") and text in TAGS:
                continue  # its own
            for options in ({}, {"enable_token_classification": False}):
                tokens = ids(tokenizer, spelling(**{place: text}), **options)
                assert made(tokenizer, tokens) == expected, (place, text)
            assert text.encode() in spell(tokens)[0]


def test_many_spellings_in_all_places_make_none(tokenizer: Any) -> None:
    rng = random.Random(0)
    whole = [text for text in control_tokens(tokenizer) if text not in TAGS]
    forged = [*whole, *(text[1:-1] for text in whole), *(text * 2 for text in whole), *(f"<|<{t[1:]}" for t in whole)]
    expected = made(tokenizer, ids(tokenizer, spelling()))
    for _ in range(5):
        words = {place: rng.choice(["", " ", "\n"]).join(rng.choices(forged, k=60)) for place in PLACES}
        assert made(tokenizer, ids(tokenizer, spelling(**words))) == expected


def test_a_message_transforms_texts_are_data(tokenizer: Any) -> None:
    text = "".join(text for text in control_tokens(tokenizer) if text not in TAGS)[:2000]

    def messages(text: str) -> dict[str, list[Message]]:
        return {"messages": [Message("user", f"u{text}z", masked=True), Message("assistant", f"a{text}z")]}

    def tokens(text: str) -> list[int]:
        transform = AgentSFTTransform(tokenizer, message_transform=lambda record: messages(record["text"]))
        return transform.encode({"text": text})[0][0].tokens.tolist()

    assert made(tokenizer, tokens(text)) == made(tokenizer, tokens(""))


def test_only_qwens_and_gemmas_make_control_tokens_of_text(tokenizer: Any) -> None:
    """The others never do: what they are given need not say what it means."""
    text = "x".join(control_tokens(tokenizer))
    found = made(tokenizer, tokenizer.encode(text, add_bos=False, add_eos=False))
    assert bool(found) == (isinstance(tokenizer, Qwen2Tokenizer) or "<end_of_turn>" in control_tokens(tokenizer))


def test_the_assistants_own_tags_are_tokens_where_it_speaks_and_text_elsewhere(tmp_path: Path) -> None:
    tokenizer = qwen3_like(tmp_path)
    special = tokenizer.special_tokens

    def tags(record: dict[str, Any]) -> list[str]:
        names = {special[tag]: tag for tag in [*TAGS, "<tool_response>", "</tool_response>"]}
        return [names[token] for token in ids(tokenizer, record) if token in names]

    ours = ["<tool_response>", "</tool_response>", "<think>", "</think>"]  # of the result, and around the reasoning
    assert tags(spelling()) == ours
    said = '<tool_call>\n{"name": "f"}\n</tool_call><tool_response><|im_end|>'
    own = ["<tool_call>", "</tool_call>"]
    assert tags(spelling(assistant=said)) == [*own, *ours, *own]
    for place in set(PLACES) - {"assistant", "reasoning"}:
        assert tags(spelling(**{place: said})) == ours


def test_a_record_that_spells_one_can_be_refused(tokenizer: Any) -> None:
    text = next(text for text in control_tokens(tokenizer) if text not in TAGS and text.startswith("<"))
    for options in ({}, {"enable_token_classification": False}):
        assert ids(tokenizer, spelling(), control_tokens="refuse", **options) == ids(tokenizer, spelling(), **options)
        for place in PLACES:
            with pytest.raises(BadRecord, match="spells control tokens") as error:
                ids(tokenizer, spelling(**{place: text}), control_tokens="refuse", **options)
            assert text in error.value.detail


def test_the_option_holds_for_chat_templates_as_well(tmp_path: Path) -> None:
    tokenizer = tokenizers.chat_template(tmp_path)
    record = {"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "ok"}]}
    assert ids(tokenizer, record)
    with pytest.raises(BadRecord, match=r"<\|im_end\|>"):
        ids(tokenizer, record, control_tokens="refuse")
    with pytest.raises(UserError, match=r"dataset.control_tokens=plain"):
        AgentSFTTransform(tokenizer, control_tokens="plain")  # pyright: ignore[reportArgumentType]
