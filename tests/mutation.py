"""Breaks records at random, and says what became of them."""

import random
from collections.abc import Callable
from typing import Any

from torchtune_agent.data.formats import convert
from torchtune_agent.data.reasons import REASON_CODES, BadRecord
from torchtune_agent.data.validate import check

_TEXTS = ["", "x", "assistant", "tool", "\ud800", "a\0b", "{", "[]", '{"name": "f"}']
_LISTS = [[], [[]], [{}], [None], ["x"], [{"type": "text"}]]
_ODD: list[Any] = [None, True, 0, -1, 1.5, 10**30, float("nan"), {}, {"a": {}}, {"role": "user"}, *_TEXTS, *_LISTS]
_KEYS = ["role", "content", "tool_calls", "x", "name", "from", "messages"]


def mutate(rng: random.Random, value: Any) -> Any:
    """The value with one thing changed somewhere in it: replaced, deleted, repeated, cut or renamed."""
    if isinstance(value, list) and value and rng.random() < 0.85:
        return _mutate_list(rng, value.copy())
    if isinstance(value, dict) and value and rng.random() < 0.85:
        return _mutate_object(rng, value.copy())
    if isinstance(value, str) and value and rng.random() < 0.3:
        return value[: rng.randrange(len(value))]
    return rng.choice(_ODD)


def _mutate_list(rng: random.Random, value: list[Any]) -> list[Any]:
    place, action = rng.randrange(len(value)), rng.random()
    if action < 0.7:
        value[place] = mutate(rng, value[place])
    elif action < 0.85:
        del value[place]
    else:
        value.insert(rng.randrange(len(value) + 1), value[place])
    return value


def _mutate_object(rng: random.Random, value: dict[str, Any]) -> dict[str, Any]:
    key, action = rng.choice(list(value)), rng.random()
    if action < 0.7:
        value[key] = mutate(rng, value[key])
    elif action < 0.85:
        del value[key]
    else:
        value[rng.choice(_KEYS)] = value.pop(key)
    return value


def outcome(read: Callable[[], Any], format: str) -> str:
    """ "trained", or the reason code; any exception other than BadRecord goes through."""
    try:
        conversation = convert(read(), format)
        check(conversation)
    except BadRecord as error:
        assert error.code in REASON_CODES and error.detail
        return error.code
    for message in conversation.messages:
        message.content.encode("utf-8")
    return "trained"
