"""Which control tokens an assistant may write itself, such as `<tool_call>` and `<think>`.

Its own are the added tokens that tokenizer.json does not call special, that tokenizer_config.json does not name, and
that the template does not write around messages: in the headers and ends of any role, and for a tool's answer.
Thinking is the assistant's wherever the template writes it. A template is asked with a few short conversations.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torchtune_agent.data.chat_template import ChatTemplate, RenderError
from torchtune_agent.data.control_tokens import ControlTokens

_THINKING = frozenset(("<think>", "</think>"))


def own_tokens(template: ChatTemplate, controls: ControlTokens, named: Iterable[str]) -> frozenset[str]:
    """The spellings of the assistant's own tokens."""
    if template.own_tokens is None:
        around = _written_around_messages(template, controls) - _THINKING
        template.own_tokens = controls.not_special() - around - {*named}
    return template.own_tokens


def _written_around_messages(template: ChatTemplate, controls: ControlTokens) -> set[str]:
    """The control tokens that one more message, or the generation prompt, adds to a rendering."""
    system, user, answer = ({"role": role, "content": "x"} for role in ("system", "user", "assistant"))
    arguments = '{"a": 1}' if template.wants_text_arguments else {"a": 1}
    call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}}
    calls = {"role": "assistant", "content": "x", "tool_calls": [call]}
    result = {"role": "tool", "content": "x", "tool_call_id": "call00001", "name": "f"}

    def spelled(messages: list[dict[str, Any]], prompt: bool = False) -> Counter[str]:
        text = "".join(template.pieces(messages, None, prompt, {}))
        return Counter(controls.spelled_in(text))

    found: set[str] = set()
    for base, more in (
        ([user], [system, user]),
        ([user], [user, answer]),
        ([user, answer], [user, answer, user]),
        ([user, calls], [user, calls, result]),
        ([user, answer], [user, answer, result]),
    ):
        for prompt in (False, True):
            try:
                found |= {*(spelled(more, prompt) - spelled(base))}
            except RenderError:  # a template that has no place for such a message writes nothing around it
                continue
    return found
