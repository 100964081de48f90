"""The shipped tokenizer: reproducible, lossless on any text, with the chat template it promises."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
from tokenizers import Tokenizer

from torchtune_agent.toolworld import TOKENIZER_DIR, Call, ToolWorld, render_call
from torchtune_agent.toolworld.train_tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, write

TOKENIZER = Tokenizer.from_file(str(TOKENIZER_DIR / "tokenizer.json"))


def test_retraining_gives_identical_files(tmp_path: Path) -> None:
    write(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (TOKENIZER_DIR / name).read_bytes(), name


def test_vocabulary() -> None:
    assert TOKENIZER.get_vocab_size() == VOCAB_SIZE
    assert [TOKENIZER.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]
    assert len(TOKENIZER.encode("<|im_start|>user\n").ids) == 3


def test_any_text_comes_back() -> None:
    rng = Random("any text")
    texts = ["", " ", "\r\n\t\x00\x1b", "Zoë 東京 🎉 e\u0301 \u200d", "  leading and trailing  ", "\uffff\U0010ffff"]
    for _ in range(200):
        letters = [rng.randrange(0x110000) if rng.random() < 0.5 else rng.randrange(0x250) for _ in range(40)]
        texts.append("".join(chr(letter) for letter in letters if not 0xD800 <= letter < 0xE000))
    for text in texts:
        assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


def test_chat_template() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(TOKENIZER_DIR))
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    messages = [
        {"role": "system", "content": "Sys"},
        {"role": "user", "content": "Hi Zoë"},
        {"role": "assistant", "content": "Call"},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    expected = (
        "<|im_start|>system\nSys<|im_end|>\n<|im_start|>user\nHi Zoë<|im_end|>\n<|im_start|>assistant\nCall<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    generation = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert generation == f"{expected}<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids == TOKENIZER.encode(expected).ids


def test_the_chat_template_writes_calls_as_toolworld_does() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(TOKENIZER_DIR))
    calls = [Call("get_price", {"item": "Zoë's lamp", "quantity": 3}), Call("list_orders", {})]
    message = {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [{"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in calls],
    }
    tools = [{"type": "function", "function": {"name": "list_orders"}}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "?"}, message], tools=tools, tokenize=False)
    written = "\n".join(render_call(call.name, call.arguments) for call in calls)
    assert text.endswith(f"<|im_start|>assistant\nI look.\n{written}<|im_end|>\n")
    assert text.startswith("<|im_start|>system\nYou can call these tools:\n{")
    assert text.count("<|im_start|>system") == 1


@pytest.mark.parametrize("num_tools", [200, 2500])
def test_conversations_are_short(num_tools: int) -> None:
    world = ToolWorld(num_tools)
    texts = [_chatml(record) for split in ("train", "test") for record in world.conversations(split, 300)]
    lengths = [len(encoding.ids) for encoding in TOKENIZER.encode_batch(texts)]
    assert max(lengths) < 640
    assert sum(lengths) / len(lengths) < 310


def _chatml(record: dict[str, Any]) -> str:
    """A little more than the chat template gives: here every tool result is a turn of its own."""
    turns = []
    for message in record["messages"]:
        role, content = message["role"], message["content"]
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        turns.append(f"<|im_start|>{role}\n{content}<|im_end|>\n")
    return "".join(turns)
