"""Conversations to classed tokens, for a tiny tokenizer of every kind, against a truth that never searches:
the tokenizers encode message by message, so it is known which tokens are an assistant's text."""

import random
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchtune.data import Message
from torchtune.models.gemma import GemmaTokenizer
from torchtune.models.llama2 import Llama2Tokenizer
from torchtune.models.llama3 import Llama3Tokenizer
from torchtune.models.mistral import MistralTokenizer
from torchtune.models.phi3 import Phi3MiniTokenizer
from torchtune.models.phi4._tokenizer import Phi4Tokenizer
from torchtune.models.qwen2 import Qwen2Tokenizer
from torchtune.models.qwen2._tokenizer import bytes_to_unicode

from tests import tokenizers
from tests.reference import IGNORE_INDEX, tag_text
from torchtune_agent.data import AgentSFTTransform, ChatTemplateTokenizer
from torchtune_agent.data.dataset import as_sample
from torchtune_agent.data.formats import FORMATS
from torchtune_agent.data.reasons import BadRecord
from torchtune_agent.data.token_class import TokenClass

BYTE_OF = {char: byte for byte, char in bytes_to_unicode().items()}
CALL = "<function=add>\n<parameter=a>\n17\n</parameter>\n<parameter=b>\n二五\n</parameter>\n</function>"
SENTENCEPIECE = (Llama2Tokenizer, MistralTokenizer, GemmaTokenizer, Phi3MiniTokenizer)
MODELS = Path(__file__).parents[4] / "shared" / "models"


@pytest.fixture(scope="module", params=tokenizers.ALL)
def tokenizer(request, tmp_path_factory):
    return tokenizers.ALL[request.param](tmp_path_factory.mktemp(request.param))


def record(*turns: str) -> dict:
    """u: user, a: assistant, t: tool, before the text of each message."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return {"messages": [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]}


CONVERSATIONS = {
    "plain": record("u:hi", "a:Hello, user."),
    "call": record("u:add", f"a:I add.\n{CALL}", "t:42", "a:It is 42."),
    "two calls": record("u:add", f"a:{CALL} and {CALL}", "t:1", "t:2", f"a:{CALL}", "t:3", "a:Done."),
    "multibyte": record("u:東京?", f"a:考えます 👩‍👩‍👧‍👦 Zoë{CALL}完了🏳️‍🌈", "t:晴れ", "a:晴れです。"),
    "said before": record("u:ok", "a:ok", "u:ok ok", "a:ok", "u:it is ok", "a:ok ok"),
    "user quotes": record(f"u:Say Done. {CALL}", f"a:Done. {CALL}", f"t:{CALL}", f"a:Done. {CALL}"),
    "role names": record("u:assistant", "a:user", "u:user", "a:assistant", "t:tool", "a:tool"),
    "end of a role name": record("u:t", "a:t", "u:ant", "a:ant"),
    "unclosed": record("u:add", "a:<function=add>\n<parameter=a>\n1", "u:</function>", "a:Oh. </function>"),
    "white space around": record("u:hi", "a:\n\nHello\n", "u: hi ", "a:  two  spaces  "),
    "leading line breaks": record("u:hi", "a:\n\nHello", "u:hi", "a:\nHello"),
    "composed": record("u:e\u0301", "a:e\u0301 is é", "u:é", "a:ok e\u0301"),
    "templates": record("u:[INST] x", "a:[/INST] y <tool_response>", "t:<|im_end|", "a:</s>"),
    "twice in a row": record("u:go", "a:ok", "a:ok", "u:go", "a:It is ok"),
    "part of the next": record("u:go", "a: ok", "a:It is ok"),
}


def as_messages(conversation: dict, tokenizer) -> list[Message]:
    """What the conversation must mean to the tokenizer: tool results are a user turn where it has no role for them."""
    messages: list[Message] = []
    for m in conversation["messages"]:
        role, text = m["role"], m["content"]
        if role == "tool" and not isinstance(tokenizer, (Llama3Tokenizer, ChatTemplateTokenizer)):
            text = f"<tool_response>\n{text}\n</tool_response>"
            if messages and messages[-1].role == "user" and messages[-1].text_content.endswith("</tool_response>"):
                text = f"{messages.pop().text_content}\n{text}"
            role = "user"
        messages.append(Message("ipython" if role == "tool" else role, text, masked=role != "assistant"))
    return messages


@cache
def spelling(tokenizer: Any, token: int) -> bytes:
    if isinstance(tokenizer, Llama3Tokenizer):
        return tokenizer.tt_model.tt_model.decode_single_token_bytes(token)
    special = getattr(tokenizer, "special_tokens", {})
    if token in special.values():
        return next(text for text, i in special.items() if i == token).encode()
    if isinstance(tokenizer, SENTENCEPIECE):
        model = tokenizer._spm_model.spm_model
        piece = model.id_to_piece(token)
        return bytes([int(piece[3:5], 16)]) if model.is_byte(token) else piece.replace("\u2581", " ").encode()
    if isinstance(tokenizer, ChatTemplateTokenizer):
        return bytes(BYTE_OF[c] for c in str(tokenizer._tokenizer.id_to_token(token)))
    decoder = (tokenizer.tokenizer_model if isinstance(tokenizer, Phi4Tokenizer) else tokenizer).decoder
    return bytes(BYTE_OF[c] for c in decoder[token])


def what_is_encoded(tokenizer, text: str) -> str:
    """The tokenizer's own normalisation of an assistant's text."""
    if isinstance(tokenizer, Llama3Tokenizer):
        return text.strip()
    if isinstance(tokenizer, Qwen2Tokenizer):
        return unicodedata.normalize("NFC", text)
    if isinstance(tokenizer, ChatTemplateTokenizer):
        return unicodedata.normalize("NFC", text) if tokenizer._tokenizer.normalizer else text
    return text.rstrip(" ")


Turn = tuple[int, int, int]  # first token of an assistant's text, the one after its last, its end-of-turn


def written(tokenizer, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """Tokens and mask, with the end of every turn: Phi-4's has to be asked for it."""
    return tokenizer.tokenize_messages(messages, **({"add_eos": True} if isinstance(tokenizer, Phi4Tokenizer) else {}))


def turns(tokenizer, messages: list[Message]) -> tuple[list[int], list[Turn]]:
    """All tokens and the assistant's turns, found by counting how many tokens every part takes."""
    tokens, _ = written(tokenizer, messages)

    def count(text: str, **options) -> int:
        return len(tokenizer.encode(text, add_bos=False, add_eos=False, **options))

    def message_ends_at(number: int) -> int:
        if isinstance(tokenizer, Qwen2Tokenizer) and number < len(messages) - 1:
            following = [Message("user", "x", masked=True)]  # without it the turn would end as a last one does
            through = tokenizer.tokenize_messages([*messages[: number + 1], *following])[0]
            return len(through) - len(tokenizer.tokenize_messages(following)[0])
        through = written(tokenizer, messages[: number + 1])[0]
        return len(through) - isinstance(tokenizer, Llama3Tokenizer)  # its end-of-text token

    found = []
    for number, message in enumerate(messages):
        if message.role != "assistant":
            continue
        stop = message_ends_at(number)
        options = {}
        if isinstance(tokenizer, Phi3MiniTokenizer) or (
            isinstance(tokenizer, Qwen2Tokenizer) and message != messages[-1]
        ):
            stop -= count("\n")
        if isinstance(tokenizer, Phi3MiniTokenizer) or (
            isinstance(tokenizer, GemmaTokenizer) and messages[number - 1].role != "assistant"
        ):
            options = {"trim_leading_whitespace": True}
        stop = text_end = stop - 1
        text = what_is_encoded(tokenizer, message.text_content)
        found.append((text_end - count(text, **options), text_end, stop))
    return tokens, found


def locate(tokenizer, messages: list[Message]) -> tuple[list[int], list[Turn]]:
    return (chatml_turns if isinstance(tokenizer, ChatTemplateTokenizer) else turns)(tokenizer, messages)


def truth(
    tokenizer, conversation: dict, kept: int | None = None, located: tuple[list[int], list[Turn]] | None = None
) -> tuple[list[int], list[int], list[set[int]]]:
    """Tokens, their classes, and the calls each may be said to be in, of a conversation cut to `kept` tokens."""
    messages = as_messages(conversation, tokenizer)
    tokens, found = located or locate(tokenizer, messages)
    kept = len(tokens) if kept is None else kept
    classes = [int(TokenClass.IGNORED)] * len(tokens)
    calls: list[set[int]] = [set() for _ in tokens]
    texts = [what_is_encoded(tokenizer, m.text_content) for m in messages if m.role == "assistant"]
    call = 0
    for (start, end, stop), text in zip(found, texts, strict=True):
        pieces = [spelling(tokenizer, t) for t in tokens[start:end]]
        whole = b"".join(pieces)
        lost = max(0, len(text.encode()) - len(whole))  # white space the header's last token took
        assert not text.encode()[:lost].strip()
        text = text.encode()[lost:].decode()
        extra = len(whole) - len(text.encode())  # white space of the tokenizer or the header, in the first token
        assert whole[extra:] == text.encode() and whole[:extra].isspace() >= (extra > 0), "the truth itself is wrong"
        seen = b"".join(pieces[: max(0, kept - start)])[extra:]
        partial = seen.decode("utf-8", "ignore")
        tail = len(seen) - len(partial.encode())
        tags, call = tag_text(partial + "\ufffd" * bool(tail), truncated=kept < end, first_call=call)
        sizes = [len(c.encode()) for c in partial] + [tail] * bool(tail)
        # SentencePiece puts a space before a text; the model must write it. A header's white space it need not.
        before = (int(TokenClass.REASONING), -1) if isinstance(tokenizer, SENTENCEPIECE) else None
        per_byte = [before] * extra + [tag for tag, size in zip(tags, sizes, strict=True) for _ in range(size)]
        at = 0
        for i, piece in enumerate(pieces, start):
            own = [tag for tag in per_byte[at : at + len(piece)] if tag]
            classes[i] = max((int(kind) for kind, _ in own), default=0)
            calls[i] = {number for _, number in own if number >= 0}
            at += len(piece)
        classes[stop] = TokenClass.SPECIAL
    return list(tokens[:kept]), classes[:kept], calls[:kept]


def chatml_turns(tokenizer, messages: list[Message]) -> tuple[list[int], list[Turn]]:
    text, spans = "", []
    for i, m in enumerate(messages):
        if m.role == "ipython":  # results in a row share one user turn
            text += "" if i and messages[i - 1].role == "ipython" else "<|im_start|>user"
            text += f"\n<tool_response>\n{m.text_content}\n</tool_response>"
            text += "" if messages[i + 1 :] and messages[i + 1].role == "ipython" else "<|im_end|>\n"
            continue
        text += f"<|im_start|>{m.role}\n"
        if m.role == "assistant":
            spans.append((len(text), len(text) + len(m.text_content)))
        text += f"{m.text_content}<|im_end|>\n"
    encoding = tokenizer._tokenizer.encode(text, add_special_tokens=False)
    starts, ends = zip(*encoding.offsets, strict=True)
    found = []
    for a, b in spans:
        first = next(i for i, start in enumerate(starts) if start >= a)  # one joined with the header is the header's
        after = next(i for i, start in enumerate(starts) if start >= b)
        found.append((first, after, after))
    return encoding.ids, found


def sample_of(tokenizer, conversation: dict, **options) -> dict:
    """The one sample of a conversation, also of one with results that nothing called for."""
    (encoded,) = AgentSFTTransform(tokenizer, **options).encode_conversation(FORMATS["openai"](conversation))
    return as_sample(encoded)


def check(tokenizer, conversation: dict, kept: int | None = None, located=None) -> None:
    tokens, classes, calls = truth(tokenizer, conversation, kept, located)
    if all(kind == TokenClass.IGNORED for kind in classes[1:]):
        with pytest.raises(BadRecord, match="no token to train"):
            sample_of(tokenizer, conversation, max_seq_len=kept)
        return
    sample = sample_of(tokenizer, conversation, max_seq_len=kept)
    assert list(sample["tokens"]) == tokens
    said = [(spelling(tokenizer, t), TokenClass(c).name) for t, c in zip(tokens, sample["token_class"], strict=True)]
    assert said == [(spelling(tokenizer, t), TokenClass(c).name) for t, c in zip(tokens, classes, strict=True)]
    for number, allowed in zip(sample["call_index"].tolist(), calls, strict=True):
        assert number in (allowed or {-1})
    trained = np.array(classes) != TokenClass.IGNORED
    assert list(sample["labels"]) == [t if on else IGNORE_INDEX for t, on in zip(tokens, trained, strict=True)]
    assert (np.asarray(sample["mask"]) == ~trained).all()
    assert (sample["reasoning_mask"] == np.isin(classes, [2, 3])).all()
    assert (sample["tool_call_mask"] == np.isin(classes, [4, 5, 6, 7])).all()


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_token_has_the_class_of_the_text_it_covers(tokenizer, name):
    check(tokenizer, CONVERSATIONS[name])


@pytest.mark.parametrize("name", ["call", "two calls", "multibyte", "unclosed"])
def test_a_conversation_cut_at_any_token_keeps_the_classes_of_its_tokens(tokenizer, name):
    located = locate(tokenizer, as_messages(CONVERSATIONS[name], tokenizer))
    for kept in range(1, len(located[0]) + 1):
        check(tokenizer, CONVERSATIONS[name], kept, located)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_only_assistant_texts_and_ends_of_turns_are_trained(tokenizer, name):
    sample = sample_of(tokenizer, CONVERSATIONS[name])
    own = sample["reasoning_mask"] | sample["tool_call_mask"]
    text = b"".join(spelling(tokenizer, int(t)) for t in sample["tokens"][own]).decode()
    said = [
        what_is_encoded(tokenizer, m["content"]) for m in CONVERSATIONS[name]["messages"] if m["role"] == "assistant"
    ]
    if isinstance(tokenizer, SENTENCEPIECE):
        text, said = text.replace(" ", ""), [t.replace(" ", "") for t in said]  # it may put a space in front of a text
    assert text == "".join(said)
    ends = {spelling(tokenizer, int(t)) for t in sample["tokens"][sample["token_class"] == TokenClass.SPECIAL]}
    assert ends <= {b"<|im_end|>", b"<|eot_id|>", b"</s>", b"<eos>", b"<|end|>"}


def kept_by(classes: np.ndarray, kinds: set[TokenClass]) -> list[bool]:
    """Which tokens stay trained: those of `kinds`, and an end of turn right after a turn that has one of them."""
    stays, alive = [], False
    for kind in classes:
        if kind == TokenClass.SPECIAL:
            stays.append(alive)
            alive = False
        else:
            stays.append(kind in kinds)
            alive = alive or kind in kinds
    return stays


@pytest.mark.parametrize(
    ("option", "kinds"),
    [
        ("train_on_tool_calls_only", {TokenClass(i) for i in (4, 5, 6, 7)}),
        ("train_on_reasoning_only", {TokenClass(i) for i in (2, 3)}),
    ],
)
@pytest.mark.parametrize("name", ["plain", "call", "two calls", "multibyte"])
def test_training_only_calls_or_only_reasoning_drops_exactly_the_rest(tokenizer, name, option, kinds):
    everything = sample_of(tokenizer, CONVERSATIONS[name])
    chosen: dict[str, Any] = {option: True}
    if not np.isin(everything["token_class"], list(kinds)).any():
        with pytest.raises(BadRecord, match="no token to train"):
            sample_of(tokenizer, CONVERSATIONS[name], **chosen)
        return
    part = sample_of(tokenizer, CONVERSATIONS[name], **chosen)
    stays = kept_by(everything["token_class"], kinds)
    assert list(part["tokens"]) == list(everything["tokens"])
    assert list(part["token_class"]) == [c if on else 0 for c, on in zip(everything["token_class"], stays, strict=True)]
    assert list(part["labels"]) == [
        label if on else IGNORE_INDEX for label, on in zip(everything["labels"], stays, strict=True)
    ]
    calls = kinds & {TokenClass.CALL_NAME}
    assert list(part["call_index"]) == (list(everything["call_index"]) if calls else [-1] * len(stays))


def test_other_markers_make_other_calls(tokenizer):
    call = '<call>\n{"name": "add", "arguments": {"a": 1}}\n</call>'
    conversation = record("u:go", f"a:I go. {call}", f"t:{call}", f"a:{CALL}")
    markers = {"tool_call_start_token": "<call>", "tool_call_end_token": "</call>"}
    sample = sample_of(tokenizer, conversation, **markers)
    covered = b"".join(spelling(tokenizer, int(t)) for t in sample["tokens"][sample["tool_call_mask"]]).decode()
    assert covered.strip() == call
    named = b"".join(
        spelling(tokenizer, int(t)) for t in sample["tokens"][sample["token_class"] == TokenClass.CALL_NAME]
    )
    assert b"add" in named


def test_without_token_classification_what_torchtune_trains_is_reasoning(tokenizer):
    if isinstance(tokenizer, ChatTemplateTokenizer):
        pytest.skip("a chat template says itself what is trained")
    conversation = CONVERSATIONS["call"]
    sample = sample_of(tokenizer, conversation, enable_token_classification=False)
    tokens, mask = written(tokenizer, as_messages(conversation, tokenizer))
    assert list(sample["tokens"]) == tokens
    assert list(sample["labels"]) == [IGNORE_INDEX if m else t for t, m in zip(tokens, mask, strict=True)]


@pytest.fixture(scope="module")
def qwen2_5_chat():
    folder = MODELS / "qwen2_5"
    if not folder.exists():
        pytest.skip("shared/models/qwen2_5 is not beside this checkout")
    return ChatTemplateTokenizer(folder)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_qwen2_5_tokenizer_and_template(qwen2_5_chat, name):
    check(qwen2_5_chat, {"messages": [*record("s:Be brief.")["messages"], *CONVERSATIONS[name]["messages"]]})


def test_a_tool_result_is_rendered_as_the_chat_template_renders_it(tmp_path):
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}" + (
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = tokenizers.chat_template(tmp_path, template=template)
    sample = sample_of(tokenizer, record("u:go", "a:ok", "t:42", "a:done"))
    text = b"".join(spelling(tokenizer, int(t)) for t in sample["tokens"]).decode()
    assert text == "[user]go<|im_end|>[assistant]ok<|im_end|>[tool]42<|im_end|>[assistant]done<|im_end|>"


def test_random_conversations(tokenizer):
    rng = random.Random(0)
    texts = [
        "ok",
        "user",
        "東京 👩‍🚀",
        CALL,
        f"Hm. {CALL}",
        f"{CALL}{CALL}",
        "<function=f>",
        "a < b\n",
        "</function>",
        "42",
    ]
    for _ in range(25):
        conversation = ["u:go"]
        for _ in range(rng.randrange(1, 4)):
            conversation += [f"a:x{''.join(rng.choices(texts, k=2))}.", f"{rng.choice('ut')}:{rng.choice(texts)}"]
        check(tokenizer, record(*conversation, "a:The end."), rng.choice([None, 30, 60]))
