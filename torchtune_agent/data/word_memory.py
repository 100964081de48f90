"""The tokens of plain ASCII text, word by word from memory: what `tokenizers` finds, several times faster.

A byte-level BPE tokenizer cuts a text into words by a regular expression and encodes each word by itself. Data repeats
its words, so they are looked up, and only those not seen yet go to the tokenizer's model. That is exact where Python's
`re` cuts as the tokenizer does: known for the expressions below, which most models have, on printable ASCII. There
letters, digits and white space are the same to both, and the normalizers of these models change nothing. Any other
tokenizer has no such memory, and any other text is for the tokenizer itself.
"""

import json
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_START = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN, _LLAMA3 = _START + r"\p{N}" + _END, _START + r"\p{N}{1,3}" + _END

_OTHER_TEXT = re.compile(r"[^\t\n\r -~]")
# A letter and then a space: no match of the expressions above reads from one to the other or looks beyond the letter,
# and no normalizer joins the two. So a text may be cut there, into parts of printable ASCII and parts of other text.
_PARTS = re.compile(r"[\t\n\r -~]*[A-Za-z](?= )|(?s:.+?)(?:(?<=[A-Za-z])(?= )|\Z)")
_IN_MODELS = str.maketrans(" \n\r\t", "ĠĊčĉ")  # byte-level models have a letter for every byte of white space
_MAX_REMEMBERED = 1_000_000  # characters; with their tokens they take some 40 MB


class WordMemory:
    """The words of a tokenizer that cuts by `pattern`; what spells an added token is text like any other."""

    def __init__(self, tokenizer: Tokenizer, pattern: str) -> None:
        pattern = pattern.replace(r"\p{L}\p{N}", "A-Za-z0-9")  # in brackets; alone, each is a set of its own
        pattern = pattern.replace(r"\p{L}", "[A-Za-z]").replace(r"\p{N}", "[0-9]")
        self._words_of = re.compile(pattern).findall
        self._model = tokenizer.model
        self._known: dict[str, list[int]] = {}
        self._num_remembered = 0

    def parts(self, text: str) -> Sequence[str]:
        """A text in parts whose tokens are those of the text: few of them are not printable ASCII."""
        return (text,) if text.isascii() else _PARTS.findall(text)

    def tokens(self, text: str) -> list[int] | None:
        """The tokens of a text, or None where it is not printable ASCII."""
        if not text.isascii() or _OTHER_TEXT.search(text):
            return None
        words = self._words_of(text)
        try:
            return [*chain.from_iterable(map(self._known.__getitem__, words))]
        except KeyError:
            self._learn({*words})
        return [*chain.from_iterable(map(self._known.__getitem__, words))]

    def _learn(self, words: set[str]) -> None:
        if self._num_remembered > _MAX_REMEMBERED:
            self.forget()
        for word in words.difference(self._known):
            self._known[word] = [token.id for token in self._model.tokenize(word.translate(_IN_MODELS))]
            self._num_remembered += len(word)

    def forget(self) -> None:
        self._known.clear()
        self._num_remembered = 0


def word_memory(tokenizer: Tokenizer) -> WordMemory | None:
    """A memory for a tokenizer that is known to cut ASCII text as `re` does; it must have no added token of white
    space alone, as such a token cuts a text before its words are found."""
    if any(not token.content.strip() for token in tokenizer.get_added_tokens_decoder().values()):
        return None
    if tokenizer.normalizer is not None and _state(tokenizer.normalizer) != {"type": "NFC"}:
        return None
    if getattr(tokenizer.model, "dropout", 0.0) is not None or tokenizer.pre_tokenizer is None:
        return None
    match _state(tokenizer.pre_tokenizer):
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return WordMemory(tokenizer, _GPT2)
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if pattern in (_GPT2, _QWEN, _LLAMA3):
            return WordMemory(tokenizer, pattern)
    return None


def _state(part: Any) -> Any:
    """A part of a tokenizer as tokenizer.json has it."""
    return json.loads(part.__getstate__())
