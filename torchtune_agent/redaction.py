"""Secrets stay secret: what looks like a key or a password, and what the config and the environment say is one, never
reaches a log, a checkpoint, a board or a report.

Values are hidden by the name they stand under, by their form, and, once `remember` has seen them, wherever they turn
up again: a service that refuses a key likes to repeat it in its error message.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig

REDACTED = "***"

_SECRET_KEY = re.compile(
    r"(^|[_-])(api_?key|access_?key(_id)?|private_?key|secret(_?key)?|auth|passw(or)?d|passphrase|credentials?"
    # but not the tokens of a tokenizer: tool_call_start_token, pad_token
    r"|(?<!start_)(?<!end_)(?<!stop_)(?<!pad_)(?<!bos_)(?<!eos_)(?<!unk_)(?<!mask_)(?<!special_)token)$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,}|AKIA[A-Z0-9]{12,})"
)
_URL_PASSWORD = re.compile(r"(?<=://)[^/@\s]+:[^/@\s]+(?=@)")
# `key=value` of a command line; a dotted key is secret for its last part.
_ASSIGNMENT = re.compile(r"^(-{0,2}(?:[\w-]+\.)*([\w-]+))=(.+)$", re.DOTALL)
_SHORTEST = 8  # characters: hiding shorter ones wherever they turn up would eat ordinary text
_known: set[str] = set()


def remember(config: Any, environment: Mapping[str, str] = os.environ) -> None:
    """Learn the secrets of a config and of the environment, to hide them in any text from now on."""
    for key, value in environment.items():
        if _SECRET_KEY.search(key):
            _learn(value)
    for key, value in _leaves(config):
        if _SECRET_KEY.search(key):
            _learn(value)
        for found in (*_URL_PASSWORD.findall(value), *_SECRET_VALUE.findall(value)):
            _learn(found)
            _learn(found.partition(":")[2])


def _learn(value: str) -> None:
    if len(value) >= _SHORTEST:
        _known.add(value)


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, (Mapping, DictConfig)):
        for name, item in value.items():
            yield from _leaves(item, str(name))
    elif isinstance(value, (list, tuple, ListConfig)):
        for item in value:
            yield from _leaves(item, key)
    elif isinstance(value, str):
        yield key, value


def redacted_text(text: str) -> str:
    """`text` without passwords in URLs, things that look like a key, and every secret that was remembered."""
    for secret in sorted(_known, key=len, reverse=True):  # one may be part of another
        text = text.replace(secret, REDACTED)
    return _URL_PASSWORD.sub(REDACTED, _SECRET_VALUE.sub(REDACTED, text))


def redacted(value: Any, key: str = "") -> Any:
    """`value` with everything that looks like a password or an API key replaced."""
    if isinstance(value, (dict, DictConfig)):
        return {name: redacted(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple, ListConfig)):
        return [redacted(item, key) for item in value]
    if not isinstance(value, str):
        return value
    return REDACTED if _SECRET_KEY.search(key) and value else redacted_text(value)


def redacted_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line to show: services that watch a run keep it."""
    shown = []
    for argument in arguments:
        match = _ASSIGNMENT.match(argument)
        is_secret = match is not None and _SECRET_KEY.search(match[2])
        shown.append(f"{match[1]}={REDACTED}" if match is not None and is_secret else redacted_text(argument))
    return shown
