"""From messages to tokens with a class on every one.

The tokenizer renders the conversation its own way; this module finds, in the bytes of the tokens it gave,
where each trained message's own text stands, and what of it is a call. So it works for every tokenizer
whose vocabulary we can spell, and it notices when a tokenizer changed the text it was given.
"""

import copy
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torchtune.data import Message

from torchtune_agent.data.tagging import CallMarkers, Tags, tag_turn, tags_per_token
from torchtune_agent.data.token_class import TokenClass
from torchtune_agent.data.token_text import Vocabulary
from torchtune_agent.errors import UserError


@dataclass
class Encoded:
    """One conversation. All arrays have one entry per token; nothing is shifted yet."""

    tokens: np.ndarray  # int32
    token_class: np.ndarray  # uint8, TokenClass; IGNORED where not trained
    call_index: np.ndarray  # int32, -1 outside calls
    num_cut: int = 0  # tokens lost to the length limit


@dataclass
class _Turn:
    """A trained message in the token stream: its text's bytes, and the token after its last one."""

    start: int
    end: int
    stop_token: int
    role: str


def encode_conversation(
    messages: Sequence[Message],
    tokenizer: Any,
    vocabulary: Vocabulary,
    *,
    max_seq_len: int | None = None,
    markers: CallMarkers | None = None,
) -> Encoded:
    """Tokenize, cut to `max_seq_len`, and class every token of every message that is not masked."""
    tokens, mask = _tokenize_whole(messages, tokenizer)
    kept = len(tokens) if max_seq_len is None else min(len(tokens), max_seq_len)
    text, starts = vocabulary.spell(tokens)
    special = np.fromiter((t in vocabulary.special_ids for t in tokens), bool, len(tokens))
    limit = int(starts[kept])
    byte_tags = Tags(np.full(limit, TokenClass.IGNORED, np.uint8), np.full(limit, -1, np.int32))
    token_class = np.full(kept, TokenClass.IGNORED, np.uint8)
    call = 0
    turns = _find_turns(messages, text, starts, special, np.asarray(mask))
    for turn in turns:
        end = min(turn.end, limit)
        if turn.start >= end:
            continue
        if turn.role == "assistant":
            tags, call = tag_turn(text[turn.start : end], truncated=end < turn.end, markers=markers, first_call=call)
            byte_tags.classes[turn.start : end] = tags.classes
            byte_tags.calls[turn.start : end] = tags.calls
        else:
            byte_tags.classes[turn.start : end] = TokenClass.REASONING
    folded = tags_per_token(byte_tags, starts[:kept])
    token_class[:] = folded.classes
    for turn in turns:  # the white space after the text and the end-of-turn token
        after = int(np.searchsorted(starts, turn.end, side="left"))
        token_class[after : min(turn.stop_token, kept)] = TokenClass.SPECIAL
    return Encoded(np.asarray(tokens[:kept], np.int32), token_class, folded.calls, len(tokens) - kept)


def _tokenize_whole(messages: Sequence[Message], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Tokens without the tokenizer's own truncation, which would train a stop token in mid-sentence."""
    unlimited = copy.copy(tokenizer)
    unlimited.max_seq_len = None
    return unlimited.tokenize_messages(list(messages))


def _find_turns(
    messages: Sequence[Message], text: bytes, starts: np.ndarray, special: np.ndarray, mask: np.ndarray
) -> list[_Turn]:
    """Locate every unmasked message's text, in order, inside the runs of tokens the tokenizer left unmasked."""
    runs = _unmasked_runs(mask)
    turns: list[_Turn] = []
    run_number, cursor = 0, 0
    for number, message in enumerate(messages):
        if message.masked:
            continue
        while run_number < len(runs):
            first, last = runs[run_number]
            cursor = max(cursor, int(starts[first]))
            found = _find_content(message.text_content, text, starts, special, cursor, last)
            if found is not None:
                break
            run_number += 1
        else:
            raise UserError(
                f"message {number}: its text does not come back from the tokenizer's tokens, so its tokens cannot be "
                "classed exactly. Set enable_token_classification=False to train without classes."
            )
        start, end, stop_token = found
        turns.append(_Turn(start, end, stop_token, message.role))
        cursor = int(starts[stop_token])
    return turns


def _unmasked_runs(mask: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate(([True], mask, [True]))))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _find_content(
    content: str, text: bytes, starts: np.ndarray, special: np.ndarray, cursor: int, last: int
) -> tuple[int, int, int] | None:
    """Find `content` in text[cursor : starts[last]] where nothing but white space stands between it and a special
    token or the end of the run; returns its first byte, its end, and the token after the end-of-turn token."""
    limit = int(starts[last])
    for candidate in _spellings(content):
        position = cursor
        while (start := text.find(candidate, position, limit)) >= 0:
            position = start + 1
            end = start + len(candidate)
            token = int(np.searchsorted(starts, start, side="right")) - 1
            if special[token] and starts[token] != start:
                continue  # inside the spelling of a special token
            after = end
            while after < limit and text[after : after + 1].isspace():
                after += 1
            if after == limit:
                return start, end, last
            next_token = int(np.searchsorted(starts, after, side="left"))
            if starts[next_token] == after and special[next_token]:
                return start, end, next_token + 1
    return None


def _spellings(content: str) -> list[bytes]:
    """What a tokenizer may make of a text before encoding it: itself, composed (NFC), without outer white space."""
    forms = [content, unicodedata.normalize("NFC", content)]
    forms += [form.strip() for form in forms]
    return list(dict.fromkeys(form.encode("utf-8", "surrogatepass") for form in forms if form))
