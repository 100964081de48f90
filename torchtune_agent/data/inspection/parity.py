"""Is a conversation tokenized as a server will do it? Compares our tokens with those of `transformers`.

A server that speaks the OpenAI protocol renders a conversation with `apply_chat_template` of the same folder. Equal
tokens are what makes a model see in use what it saw in training.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from jinja2 import TemplateError

from torchtune_agent.data.chat_template import RenderError
from torchtune_agent.data.conversation import Conversation, Message
from torchtune_agent.data.templates import ChatTemplateTokenizer
from torchtune_agent.data.token_text import Vocabulary, vocabulary
from torchtune_agent.data.tracing import strings_in

_AROUND = 12  # tokens shown on either side of a divergence
# What `transformers` lets through of a template that refuses a conversation.
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)


@dataclass(frozen=True)
class Divergence:
    """The first token at which a conversation differs, with what both wrote around it."""

    where: str
    position: int
    before: str
    ours: str
    theirs: str


@dataclass
class Parity:
    """What the comparison found. `not_checked` says why there was none."""

    not_checked: str | None = None
    version: str = ""  # of transformers
    num_equal: int = 0
    num_on_purpose: int = 0  # same text, but data that spells a control token is plain text in ours
    divergences: list[Divergence] = field(default_factory=list)

    @property
    def num_compared(self) -> int:
        return self.num_equal + self.num_on_purpose + len(self.divergences)


def check_parity(tokenizer: Any, conversations: Iterable[tuple[str, Conversation]]) -> Parity:
    """Compare the tokens of every one of the conversations, each with where it stands."""
    if not isinstance(tokenizer, ChatTemplateTokenizer):
        return Parity(f"{type(tokenizer).__name__} is torchtune's own tokenizer, which has no chat template")
    try:
        import transformers
    except ImportError:
        return Parity("transformers is not installed (pip install transformers)")
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(tokenizer.path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        return Parity(f"transformers cannot load {tokenizer.path}: {error}")
    result = Parity(version=transformers.__version__)
    known = vocabulary(tokenizer)
    for where, conversation in conversations:
        _compare(where, conversation, tokenizer, theirs, known, result)
    if result.num_compared == 0:
        return Parity("no conversation can be read again: the dataset is not ours, or reads messages by a transform")
    return result


def _compare(
    where: str,
    conversation: Conversation,
    tokenizer: ChatTemplateTokenizer,
    theirs: Any,
    known: Vocabulary,
    result: Parity,
) -> None:
    try:
        ours = tokenizer.tokenize(conversation)
    except RenderError:  # left out of training, and listed there
        return
    try:
        expected = _apply(theirs, conversation, tokenizer, tokenize=True)
    except _REFUSALS as error:
        result.divergences.append(Divergence(where, 0, "", _text(ours[:_AROUND], known), f"refused: {error}"))
        return
    if ours == expected:
        result.num_equal += 1
    elif _spells_control(conversation, tokenizer) and (
        tokenizer.render(conversation) == _apply(theirs, conversation, tokenizer, tokenize=False)
    ):
        result.num_on_purpose += 1
    else:
        result.divergences.append(_divergence(where, ours, expected, known))


def _apply(theirs: Any, conversation: Conversation, tokenizer: ChatTemplateTokenizer, *, tokenize: bool) -> Any:
    def apply(*, text_arguments: bool) -> Any:
        return theirs.apply_chat_template(
            [_openai(message, text_arguments=text_arguments) for message in conversation.messages],
            tools=conversation.tools or None,
            tokenize=tokenize,
            return_dict=False,
            **tokenizer.template_args,
        )

    try:
        return apply(text_arguments=False)
    except TypeError:  # a template that adds arguments to text takes them as JSON text
        return apply(text_arguments=True)


def _openai(message: Message, *, text_arguments: bool) -> dict[str, Any]:
    """As a server hands a message to the template."""
    form: dict[str, Any] = {"role": message.role.value, "content": message.content}
    if message.reasoning is not None:
        form |= {"reasoning_content": message.reasoning, "thinking": message.reasoning}
    if message.tool_calls:
        form["tool_calls"] = []
    for call in message.tool_calls:
        arguments = call.arguments if text_arguments else json.loads(call.arguments or "{}")
        named = {} if call.id is None else {"id": call.id}
        function = {"name": call.name, "arguments": arguments}
        form["tool_calls"].append({**named, "type": "function", "function": function})
    for key in ("tool_call_id", "name"):
        if getattr(message, key) is not None:
            form[key] = getattr(message, key)
    return form


def _spells_control(conversation: Conversation, tokenizer: ChatTemplateTokenizer) -> bool:
    messages = [_openai(message, text_arguments=True) for message in conversation.messages]
    controls = [text.strip() for text in tokenizer.special_tokens if text.strip()]
    return any(text in value for value in strings_in([messages, conversation.tools]) for text in controls)


def _divergence(where: str, ours: list[int], theirs: list[int], known: Vocabulary) -> Divergence:
    at = next(i for i, (a, b) in enumerate(zip_longest(ours, theirs)) if a != b)

    around = slice(at, at + _AROUND)
    before = _text(ours[max(0, at - _AROUND) : at], known)
    return Divergence(where, at, before, _text(ours[around], known), _text(theirs[around], known))


def _text(tokens: list[int], known: Vocabulary) -> str:
    return known.spell(tokens)[0].decode("utf-8", "replace")
