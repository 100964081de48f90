"""A torchtune tokenizer made from a Hugging Face folder: tokenizer.json and the model's own chat template.

Training must see the tokens the server will show, so the text comes from the template in the folder, rendered in a
sandbox, and not from rules written again in Python; tokens equal `transformers`' `apply_chat_template`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date as Date
from datetime import datetime, time
from pathlib import Path
from typing import Any

import numpy as np
import torchtune.data
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from torchtune_agent.data.chat_template import ChatTemplate, Rendering
from torchtune_agent.data.control_tokens import ControlTokens, EncodedText, Spelled
from torchtune_agent.data.conversation import Conversation, Message, Role
from torchtune_agent.data.own_tokens import own_tokens
from torchtune_agent.data.served import Draft, History, TrainOn, chosen_turns, draft
from torchtune_agent.data.tokenizer_folder import TokenizerFolder, byte_of_char
from torchtune_agent.data.tracing import WITH_OWN
from torchtune_agent.errors import UserError, did_you_mean

_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_ROLE_IN_TEMPLATES = {"ipython": "tool"}


@dataclass(frozen=True)
class Turn:
    """A trained turn of a sample, without its header: characters [start, end) of the text are the assistant's own
    words and [end, stop) its end-of-turn; the same for tokens. Where the tokenizer joins a character of the header or
    of what follows with one of the turn, that token is not the turn's.

    `as_served` is False where the context is not exactly what a server shows; `thinking` says that the context opened
    `<think>`, so that the words begin inside of it; `left_out` names what of the message (content, reasoning) is not
    in the text as it stands.
    """

    message: int
    start: int
    end: int
    stop: int
    first_token: int
    end_token: int
    stop_token: int
    as_served: bool
    thinking: bool
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """A text to train on."""

    text: str
    tokens: list[int]
    turns: list[Turn]


class ChatTemplateTokenizer(ModelTokenizer):
    """Tokenizes conversations exactly as the folder's chat template renders them.

    Args:
        path: the folder.
        max_seq_len: `tokenize_messages` cuts there.
        template_args: variables for the template, such as {enable_thinking: false}.
        control_tokens: what to do with data that spells a control token: encode it as "text", or "refuse" it. What the
            assistant says and thinks may hold its own tokens (`own_tokens`), such as `<tool_call>`.
        history: "as_served" trains every turn in the context a server would have shown it, which takes several
            samples where the template rewrites history; "single" makes one sample of each conversation.
        date: the day the template is told (today), as 2026-01-31 or an object.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        max_seq_len: int | None = None,
        template_args: Mapping[str, Any] | None = None,
        control_tokens: Spelled = "text",
        history: History = "as_served",
        date: str | Date | None = None,
    ) -> None:
        _one_of("control_tokens", control_tokens, ("text", "refuse"))
        _one_of("history", history, ("as_served", "single"))
        self.path = Path(path)
        folder = TokenizerFolder(self.path)
        self._tokenizer = folder.tokenizer
        self._template = ChatTemplate(folder.chat_templates, folder.special_tokens, _as_datetime(date))
        self._controls = ControlTokens(self._tokenizer)
        self._named = [text for name, text in folder.special_tokens.items() if name in _NAMED]
        self.template_args = dict(template_args or {})
        self._spelled: Spelled = control_tokens
        self._history: History = history
        self.max_seq_len = max_seq_len
        self.special_tokens: dict[str, int] = {
            added.content: i for i, added in self._tokenizer.get_added_tokens_decoder().items()
        }
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_id: int = folder.id_of("eos_token")
        self.pad_id: int = folder.id_of("pad_token") if "pad_token" in folder.special_tokens else self.eos_id
        self.stop_tokens = [self.eos_id]
        self._byte_of = byte_of_char()
        self._special_text = {i: text.encode() for text, i in self.special_tokens.items()}

    def identity(self) -> dict[str, Any]:
        """All that its tokens depend on."""
        return {
            "tokenizer": self._tokenizer.to_str(),
            "template": self._template.identity(),
            "template_args": self.template_args,
            "control_tokens": self._spelled,
            "history": self._history,
        }

    def render(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> str:
        """The conversation as text."""
        rendering = Rendering(self._template, conversation, self.template_args, traced=False)
        return rendering.render(prompt=add_generation_prompt)

    def tokenize(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> list[int]:
        """The tokens of the conversation; what data spells is never a control token."""
        return self._encode_whole(conversation, add_generation_prompt)[2].tokens

    @property
    def own_tokens(self) -> frozenset[str]:
        """The control tokens that an assistant may write itself."""
        return own_tokens(self._template, self._controls, self._named)

    def samples(
        self,
        conversation: Conversation,
        *,
        train_on: TrainOn = "all",
        history: History | None = None,
        control_tokens: Spelled | None = None,
    ) -> list[Sample]:
        """What to train on: every chosen assistant turn in exactly one sample; none where nothing is chosen.

        Args:
            conversation: the record; a message's own `train` decides before `train_on`.
            train_on: "all" assistant turns, the "last", or only those whose `train` is true ("explicit").
            history, control_tokens: instead of the tokenizer's.
        """
        _one_of("train_on", train_on, ("all", "last", "explicit"))
        chosen = chosen_turns(conversation, train_on)
        if not chosen:
            return []
        for rendering in self._renderings(conversation):
            drafts = draft(rendering, self._controls, chosen, history or self._history)
            if drafts is not None:
                return [self._as_sample(made, rendering, control_tokens or self._spelled) for made in drafts]
        raise AssertionError("the plain rendering is always right")

    def _as_sample(self, made: Draft, rendering: Rendering, spelled: Spelled) -> Sample:
        text = made.text + made.tail
        encoded = self._controls.encode(text, rendering.marks, rendering.data, spelled)
        turns = []
        for place in made.turns:
            first, stop = encoded.within(place.start, place.stop)
            end = max(first, encoded.within(place.start, place.end)[1])
            turns.append(
                Turn(
                    message=place.message,
                    start=place.start,
                    end=place.end,
                    stop=place.stop,
                    first_token=first,
                    end_token=end,
                    stop_token=stop,
                    as_served=place.as_served,
                    thinking=place.thinking,
                    left_out=place.left_out,
                )
            )
        return Sample(encoded.text, encoded.tokens, turns)

    def _renderings(self, conversation: Conversation) -> Iterator[Rendering]:
        """To be tried in turn, the next one where marks changed what the template wrote."""
        said = [text for m in conversation.messages if m.role is Role.ASSISTANT for text in (m.content, m.reasoning)]
        if not self.own_tokens.isdisjoint(token for text in said if text for token in self._controls.spelled_in(text)):
            rendering = Rendering(self._template, conversation, self.template_args, mark_own=self._mark_own)
            if rendering.marks is not None:
                yield rendering
        yield Rendering(self._template, conversation, self.template_args)
        yield Rendering(self._template, conversation, self.template_args, traced=False)

    def _mark_own(self, text: str) -> str:
        return self._controls.replaced(text, self.own_tokens, WITH_OWN.mark_own)

    def _encode_whole(self, conversation: Conversation, prompt: bool = False) -> tuple[str, Rendering, EncodedText]:
        for rendering in self._renderings(conversation):
            text = rendering.render(prompt=prompt)
            if rendering.verified(text, prompt=prompt):
                return text, rendering, self._controls.encode(text, rendering.marks, rendering.data, self._spelled)
        raise AssertionError("the plain rendering is always right")

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        tokens = self._tokenizer.encode(text, add_special_tokens=False).ids
        return tokens + [self.eos_id] if add_eos else tokens

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for."""
        if token in self._special_text:
            return self._special_text[token]
        piece = self._tokenizer.id_to_token(token)
        return bytes(self._byte_of[char] for char in piece) if piece is not None else b""

    def tokenize_messages(self, messages: list[torchtune.data.Message], **kwargs: Any) -> tuple[list[int], list[bool]]:
        """torchtune's interface: the tokens, and True for each that stands outside every unmasked message."""
        conversation = Conversation([_from_torchtune(m) for m in messages])
        text, rendering, encoded = self._encode_whole(conversation)
        mask = np.ones(len(encoded.tokens), bool)
        for i, message in enumerate(messages):
            if not message.masked:
                first, after = encoded.touching(*_span(rendering, i, text))
                mask[first:after] = False
        return encoded.tokens[: self.max_seq_len], mask[: self.max_seq_len].tolist()

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        tokens, mask = self.tokenize_messages(sample["messages"])
        return {**{k: v for k, v in sample.items() if k != "messages"}, "tokens": tokens, "mask": mask}


def chat_template_tokenizer(
    path: str,
    max_seq_len: int | None = None,
    *,
    template_args: Mapping[str, Any] | None = None,
    control_tokens: Spelled = "text",
    history: History = "as_served",
    date: str | Date | None = None,
) -> ChatTemplateTokenizer:
    """The tokenizer in folder `path` (tokenizer.json, tokenizer_config.json and its chat template)."""
    return ChatTemplateTokenizer(
        path,
        max_seq_len=max_seq_len,
        template_args=template_args,
        control_tokens=control_tokens,
        history=history,
        date=date,
    )


def _from_torchtune(message: torchtune.data.Message) -> Message:
    return Message(Role(_ROLE_IN_TEMPLATES.get(message.role, message.role)), message.text_content)


def _span(rendering: Rendering, index: int, text: str) -> tuple[int, int]:
    """Where message `index` stands in the rendered text, without its header where it is the assistant's."""
    answers = rendering.messages[index]["role"] == "assistant"
    before = rendering.render(index, prompt=answers)
    through = rendering.render(index + 1)
    if not text.startswith(before) or not text.startswith(through):
        raise UserError(
            f"chat template: it rewrites what stands before message {index} once more messages follow, so no one text "
            "trains every turn. `samples` makes one for each."
        )
    return len(before), len(through)


def _one_of(key: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{key} is {value!r}. {did_you_mean(str(value), known)}")


def _as_datetime(date: str | Date | None) -> datetime | None:
    try:
        day = Date.fromisoformat(date) if isinstance(date, str) else date
    except ValueError as error:
        raise UserError(f"tokenizer.date is {date!r}: write it as 2026-01-31.") from error
    return datetime.combine(day, time()) if day is not None else None
