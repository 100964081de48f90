"""From a conversation to samples: tokens with a class, a call and a weight on every one.

Two encoders, one for each kind of tokenizer. A chat template says itself where every turn stands. A torchtune
tokenizer says only which messages a token came from (its mask); what it puts around a message's own text, a
header and an end-of-turn, is constant for the tokenizer, so it is measured once on short probes, and what is
left of a message's tokens is its text, whatever it says.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from torchtune.data import Message
from torchtune.models.phi4._tokenizer import Phi4Tokenizer

from torchtune_agent.data.control_tokens import Spelled
from torchtune_agent.data.conversation import Conversation
from torchtune_agent.data.messages import to_torchtune
from torchtune_agent.data.reasons import BadRecord
from torchtune_agent.data.served import TrainOn, chosen_turns
from torchtune_agent.data.spelled import SpelledTokens, heeding
from torchtune_agent.data.tagging import CallMarkers, Tags, tag_turn, tags_per_token
from torchtune_agent.data.templates import ChatTemplateTokenizer
from torchtune_agent.data.token_class import TokenClass
from torchtune_agent.data.token_text import Vocabulary
from torchtune_agent.errors import UserError

# Plain numbers: numpy takes them faster than members.
_IGNORED, _SPECIAL, _REASONING = map(int, (TokenClass.IGNORED, TokenClass.SPECIAL, TokenClass.REASONING))
_CALL_NAMES = re.compile(b"%c+" % TokenClass.CALL_NAME)  # in classes as bytes: a turn is too short for numpy to be fast


@dataclass
class Encoded:
    """One sample. All arrays have one entry per token; nothing is shifted yet."""

    tokens: np.ndarray  # int32
    token_class: np.ndarray  # uint8, TokenClass; IGNORED where not trained
    call_index: np.ndarray  # int32, -1 outside calls
    weights: np.ndarray  # float32, 0 where not trained
    num_cut: int = 0  # tokens lost to the length limit
    tools: list[str] = field(default_factory=list)  # the name in every call, in the order of `call_index`
    origin: str = ""  # the data source the record names, if any


@dataclass(frozen=True)
class Turn:
    """A trained message in the token stream: its text is tokens[start:end], its end-of-turn tokens[end:stop]."""

    start: int
    end: int
    stop: int
    weight: float = 1.0
    has_calls: bool = True  # False for a user's turn, whose text is never a call
    thinking: bool = False  # the prompt opened <think>


@dataclass(frozen=True)
class Classifier:
    """Cuts a sample to its length limit and classes the tokens of its turns."""

    vocabulary: Vocabulary
    max_seq_len: int | None = None
    style: str = "auto"
    markers: CallMarkers | None = None

    def __call__(self, tokens: Sequence[int], turns: Sequence[Turn]) -> Encoded:
        kept = len(tokens) if self.max_seq_len is None else min(len(tokens), self.max_seq_len)
        classes = np.full(kept, _IGNORED, np.uint8)
        calls = np.full(kept, -1, np.int32)
        weights = np.zeros(kept, np.float32)
        tools: list[str] = []
        for turn in turns:
            classes[turn.end : turn.stop] = _SPECIAL
            weights[turn.start : turn.stop] = turn.weight
            part = slice(turn.start, min(turn.end, kept))
            if part.start >= part.stop:
                continue
            if not turn.has_calls:
                classes[part] = _REASONING
            else:
                text, starts = self.vocabulary.spell(tokens[part])
                cut = turn.end > kept
                first = len(tools)
                tags, after = tag_turn(
                    text,
                    truncated=cut,
                    style=self.style,
                    markers=self.markers,
                    first_call=first,
                    thinking=turn.thinking,
                )
                tools += called_names(text, tags, first, after)
                folded = tags_per_token(tags, starts[:-1])
                classes[part], calls[part] = folded.classes, folded.calls
        return Encoded(np.asarray(tokens[:kept], np.int32), classes, calls, weights, len(tokens) - kept, tools)


def called_names(text: bytes, tags: Tags, first: int, after: int) -> list[str]:
    """The names in calls `first` to `after`; "" where a call has none."""
    names = [""] * (after - first)
    if names:
        for span in _CALL_NAMES.finditer(tags.classes.tobytes()):
            name = text[span.start() : span.end()].decode("utf-8", "replace")
            names[tags.calls[span.start()] - first] += name
    return names


@dataclass(frozen=True)
class ChatTemplateEncoder:
    """For tokenizers with the model's own chat template: every turn in the context a server would have shown."""

    tokenizer: ChatTemplateTokenizer
    classify: Classifier
    train_on: TrainOn = "all"
    control_tokens: Spelled | None = None  # instead of the tokenizer's

    def encode(self, conversation: Conversation) -> list[Encoded]:
        try:
            samples = self.tokenizer.samples(conversation, train_on=self.train_on, control_tokens=self.control_tokens)
        except UserError as error:
            raise BadRecord("unsupported_content", str(error)) from error
        result = []
        for sample in samples:
            turns = [
                Turn(
                    t.first_token,
                    t.end_token,
                    t.stop_token,
                    conversation.messages[t.message].weight,
                    thinking=t.thinking,
                )
                for t in sample.turns
            ]
            result.append(self.classify(sample.tokens, turns))
        return result


@dataclass
class TorchtuneEncoder:
    """For torchtune's own tokenizers. `messages_of` gives torchtune's messages, by default those of the record."""

    tokenizer: Any
    classify: Classifier
    train_on: TrainOn = "all"
    control_tokens: Spelled = "text"

    def __post_init__(self) -> None:
        self._unlimited = heeding(_without_limit(self.tokenizer))
        self._spelled = SpelledTokens(self.tokenizer, self.classify.vocabulary, self.control_tokens)
        self._frame = cache(self._measure_frame)

    def encode(self, conversation: Conversation) -> list[Encoded]:
        chosen = chosen_turns(conversation, self.train_on)
        return self._encode(*to_torchtune(conversation, self.tokenizer, chosen, self._spelled.joined))

    def encode_messages(self, messages: Sequence[Message]) -> list[Encoded]:
        """The sample of somebody else's torchtune messages, trained where they are not masked."""
        return self._encode([self._spelled.in_message(message) for message in messages])

    def _encode(self, messages: Sequence[Message], weights: Sequence[float] | None = None) -> list[Encoded]:
        trained = [i for i, message in enumerate(messages) if not message.masked]
        if not trained:
            return []
        # Messages in a row share one run of the mask; showing every second one at a time keeps them apart.
        regions: dict[int, tuple[int, int]] = {}
        tokens: list[int] = []
        for shown in (trained[::2], trained[1::2]):
            tokens, mask = self._tokenize(messages, set(shown))
            regions |= zip(shown, _runs(mask, len(shown)), strict=True)
        turns = [self._turn(messages, i, tokens, regions[i], weights[i] if weights else 1.0) for i in trained]
        return [self.classify(tokens, turns)]

    def _turn(
        self, messages: Sequence[Message], i: int, tokens: list[int], region: tuple[int, int], weight: float
    ) -> Turn:
        before = messages[i - 1].role if i else None
        header, footer = self._frame(messages[i].role, before, i == len(messages) - 1)
        start, end = region[0] + header, region[1] - footer
        special = self.classify.vocabulary.special_ids
        stop = next((p + 1 for p in range(end, region[1]) if tokens[p] in special), end)  # through the end-of-turn
        return Turn(start, end, stop, weight, has_calls=messages[i].role == "assistant")

    def _measure_frame(self, role: Any, before: Any, is_last: bool) -> tuple[int, int]:
        """How many tokens stand before and after the text of a `role` message in this place."""
        around = [Message(role=before, content="x", masked=True)] if before else []
        after = [] if is_last else [Message(role="user", content="x", masked=True)]
        probes = []
        for text in ("", "x"):
            conversation = [*around, Message(role=role, content=text, masked=False), *after]
            tokens, mask = self._tokenize(conversation, {len(around)})
            ((start, end),) = _runs(mask, 1)
            probes.append(tokens[start:end])
        empty, filled = probes
        header = next((n for n, (a, b) in enumerate(zip(empty, filled, strict=False)) if a != b), len(empty))
        return header, len(empty) - header

    def _tokenize(self, messages: Sequence[Message], shown: set[int]) -> tuple[list[int], list[bool]]:
        masked = [copy.copy(message) for message in messages]
        for i, message in enumerate(masked):
            message.masked = i not in shown
        return _tokenize(self._unlimited, masked)


@dataclass(frozen=True)
class MaskEncoder:
    """Without classes: any torchtune tokenizer, and its own mask says what is trained."""

    tokenizer: Any
    spelled: SpelledTokens | None  # None for a tokenizer of the user's, which may do with texts as it likes
    train_on: TrainOn = "all"
    max_seq_len: int | None = None

    def encode(self, conversation: Conversation) -> list[Encoded]:
        chosen = chosen_turns(conversation, self.train_on)
        joined = self.spelled.joined if self.spelled else lambda pieces: "".join(text for text, _ in pieces)
        return self._encode(to_torchtune(conversation, self.tokenizer, chosen, joined)[0])

    def encode_messages(self, messages: Sequence[Message]) -> list[Encoded]:
        return self._encode([self.spelled.in_message(message) if self.spelled else message for message in messages])

    def _encode(self, messages: Sequence[Message]) -> list[Encoded]:
        tokens, mask = _tokenize(heeding(_without_limit(self.tokenizer)), messages)
        kept = len(tokens) if self.max_seq_len is None else min(len(tokens), self.max_seq_len)
        trained = ~np.asarray(mask[:kept], bool)
        classes = np.where(trained, TokenClass.REASONING, TokenClass.IGNORED).astype(np.uint8)
        no_call = np.full(kept, -1, np.int32)
        return [
            Encoded(
                np.asarray(tokens[:kept], np.int32), classes, no_call, trained.astype(np.float32), len(tokens) - kept
            )
        ]


def _without_limit(tokenizer: Any) -> Any:
    """A copy that does not cut: torchtune's cut puts an end-of-sequence token in mid-sentence."""
    unlimited = copy.copy(tokenizer)
    unlimited.max_seq_len = None
    return unlimited


def _tokenize(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    # Phi-4's ends the assistant's turns only where it is told to; the others do it anyway.
    options = {"add_eos": True} if isinstance(tokenizer, Phi4Tokenizer) else {}
    try:
        return tokenizer.tokenize_messages(list(messages), **options)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise BadRecord("unsupported_content", f"{type(tokenizer).__name__} refuses it: {error}") from error


def _runs(mask: Sequence[bool], num_runs: int) -> list[tuple[int, int]]:
    """Where the mask is open, as `num_runs` half-open intervals."""
    edges = np.flatnonzero(np.diff(np.concatenate(([True], np.asarray(mask, bool), [True]))))
    runs = [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    if len(runs) != num_runs:
        if num_runs == 1 and not runs:
            return [(len(mask), len(mask))]  # an empty message without a frame
        detail = f"the tokenizer's mask shows {len(runs)} of {num_runs} trained messages"
        raise BadRecord("unsupported_content", detail)
    return runs


def scale_classes(encoded: Encoded, class_weights: Mapping[TokenClass, float]) -> None:
    """Multiply every token's weight by its class's; what weighs nothing is not trained."""
    for kind, weight in class_weights.items():
        encoded.weights[encoded.token_class == kind] *= weight
    dropped = (encoded.weights == 0) & (encoded.token_class != TokenClass.IGNORED)
    encoded.token_class[dropped] = TokenClass.IGNORED
    encoded.call_index[dropped] = -1
