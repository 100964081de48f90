"""Tiny tokenizers of every kind torchtune ships, trained on a few lines within a second."""

import base64
import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torchtune.models.gemma import GemmaTokenizer
from torchtune.models.llama2 import Llama2Tokenizer
from torchtune.models.llama3 import Llama3Tokenizer
from torchtune.models.llama3._tokenizer import SPECIAL_TOKENS as LLAMA3_SPECIAL_TOKENS
from torchtune.models.mistral import MistralTokenizer
from torchtune.models.phi3 import Phi3MiniTokenizer
from torchtune.models.phi3._tokenizer import PHI3_SPECIAL_TOKENS
from torchtune.models.phi4._tokenizer import PHI4_SPECIAL_TOKENS, Phi4Tokenizer
from torchtune.models.qwen2_5._tokenizer import Qwen2_5Tokenizer

from torchtune_agent.data import ChatTemplateTokenizer
from torchtune_agent.toolworld import TOKENIZER_DIR

TEXTS = [
    "You can call tools. The assistant answers the user.",
    "I add the numbers.\n<function=add>\n<parameter=a>\n17\n</parameter>\n<parameter=b>\n25\n</parameter>\n</function>",
    "<function=get_weather>\n<parameter=city>\nZoë, 東京\n</parameter>\n</function> Done. It is ok, user: 42.",
    "<tool_call>\n{}\n</tool_call><tool_response>\nassistant user system tool\n</tool_response>",
] * 20

# ToolWorld's, which writes tool results as Qwen's does
CHATML = json.loads((TOKENIZER_DIR / "tokenizer_config.json").read_text())["chat_template"]


def _byte_level_bpe(vocab_size: int, special_tokens: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special_tokens,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _vocab_and_merges(folder: Path) -> tuple[str, str]:
    vocab, merges = _byte_level_bpe(400, []).model.save(str(folder))
    return vocab, merges


def _renumbered(names: list[str], first: int) -> dict[str, int]:
    return {name: first + i for i, name in enumerate(names)}


def chat_template(folder: Path, max_seq_len: int | None = None, template: str = CHATML) -> ChatTemplateTokenizer:
    _byte_level_bpe(400, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]).save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return ChatTemplateTokenizer(folder, max_seq_len=max_seq_len)


def qwen2_5(folder: Path) -> Qwen2_5Tokenizer:
    vocab, merges = _vocab_and_merges(folder)
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
    return Qwen2_5Tokenizer(vocab, merges, special_tokens=_renumbered(names, 400))


def llama3(folder: Path) -> Llama3Tokenizer:
    pieces = [bytes([i]) for i in range(256)]
    for word in ("assistant", "user", "the", "function", "parameter", "東京", "</", "\n\n"):
        for end in range(2, len(word.encode()) + 1):
            if (piece := word.encode()[:end]) not in pieces:
                pieces.append(piece)
    path = folder / "tokenizer.model"
    path.write_text("\n".join(f"{base64.b64encode(piece).decode()} {i}" for i, piece in enumerate(pieces)))
    return Llama3Tokenizer(str(path), special_tokens=_renumbered(list(LLAMA3_SPECIAL_TOKENS), len(pieces)))


def _sentencepiece(folder: Path, **options: Any) -> str:
    prefix = str(folder / "sp")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXTS for line in text.split("\n")),
        model_prefix=prefix,
        model_type="bpe",
        vocab_size=380,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return f"{prefix}.model"


def llama2(folder: Path) -> Llama2Tokenizer:
    return Llama2Tokenizer(_sentencepiece(folder))  # pyright: ignore[reportAbstractUsage]


def mistral(folder: Path) -> MistralTokenizer:
    return MistralTokenizer(_sentencepiece(folder))  # pyright: ignore[reportAbstractUsage]


def gemma(folder: Path, **options: Any) -> GemmaTokenizer:
    model = _sentencepiece(folder, add_dummy_prefix=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, **options)
    return GemmaTokenizer(model)  # pyright: ignore[reportAbstractUsage]


def phi3(folder: Path) -> Phi3MiniTokenizer:
    return Phi3MiniTokenizer(_sentencepiece(folder), special_tokens=_renumbered(list(PHI3_SPECIAL_TOKENS), 380))


def phi4(folder: Path, kind: type[Phi4Tokenizer] = Phi4Tokenizer) -> Phi4Tokenizer:
    vocab, merges = _vocab_and_merges(folder)
    return kind(merges, vocab, special_tokens=_renumbered(list(PHI4_SPECIAL_TOKENS), 400))


ALL = {make.__name__: make for make in (chat_template, qwen2_5, llama3, llama2, mistral, gemma, phi3, phi4)}
