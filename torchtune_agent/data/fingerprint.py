"""What tokenized samples depend on, as text: equal fingerprints mean equal samples.

Something without a fingerprint (`Unknown`) is never kept on disk: it would be found again where it no longer holds.
"""

import hashlib
import importlib.metadata
import inspect
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torchtune.data import Message

from torchtune_agent.data.templates import ChatTemplateTokenizer
from torchtune_agent.data.token_text import vocabulary
from torchtune_agent.errors import UserError

_LIBRARIES = ("torchtune", "tokenizers", "jinja2", "tiktoken", "sentencepiece")
_BLOCK_BYTES = 1 << 22
_SETTLED = 2.0  # seconds: a file that changed later than that may change again without a new time stamp
_PROBE = (
    "The quick brown fox\n\n\tjumps 1234567890 times;\r\n  naïve café, Straße, 日本語のテキスト, русский, "
    "العربية, 👩‍🚀 __init__(self, x=3.14e-5) {'a': [null, true]} <b>&amp;</b> \u200b\u2028 don't I'LL"
)


class Unknown(Exception):
    """There is no telling whether this is the same as last time."""


def combine(parts: Any) -> str:
    """One fingerprint of JSON values."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


@cache
def of_code() -> str:
    """Of this version's data road and the libraries in it: a change of code never meets an earlier one's samples."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return combine([digest.hexdigest(), *map(_version, _LIBRARIES)])


def _version(library: str) -> str:
    try:
        return f"{library} {importlib.metadata.version(library)}"
    except importlib.metadata.PackageNotFoundError:
        return library


def of_file(path: Path, memory: Path) -> str:
    """Of a file's content. What was read once is remembered in folder `memory` for as long as size and time of the
    last change stay the same."""
    state = path.stat()
    stamp = [state.st_size, state.st_ctime_ns, state.st_ino]
    note = memory / f"{combine(str(path.resolve()))}.json"
    try:
        known = json.loads(note.read_text())
        if known["stamp"] == stamp:
            return known["digest"]
    except (OSError, ValueError, KeyError):
        pass  # never read before
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while content := file.read(_BLOCK_BYTES):
            digest.update(content)
    if time.time() - state.st_ctime > _SETTLED:
        memory.mkdir(parents=True, exist_ok=True)
        draft = note.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"stamp": stamp, "digest": digest.hexdigest()}))
        draft.replace(note)
    return digest.hexdigest()


def of_option(value: Any) -> Any:
    """Of a value in a config: plain ones stand for themselves, code for its name and the file it is in."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): of_option(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [of_option(item) for item in value]
    if inspect.isfunction(value) or inspect.isclass(value):
        return _of_definition(value)
    raise Unknown(f"{type(value).__name__} {value!r}")


def _of_definition(thing: Callable[..., Any]) -> str:
    try:
        content = Path(inspect.getfile(thing)).read_bytes()
    except (OSError, TypeError) as error:
        raise Unknown(f"the code of {thing!r}") from error
    if "<locals>" in thing.__qualname__:  # what it closes over is not in its file
        raise Unknown(f"{thing!r}, which was made by another function")
    return f"{thing.__module__}.{thing.__qualname__} {hashlib.blake2b(content, digest_size=16).hexdigest()}"


def of_tokenizer(tokenizer: Any) -> Any:
    """Of a tokenizer's tokens and of how it writes conversations."""
    if isinstance(tokenizer, ChatTemplateTokenizer):
        return of_option(tokenizer.identity())
    try:
        known = vocabulary(tokenizer)
    except UserError as error:
        raise Unknown(f"the tokens of {type(tokenizer).__name__}") from error
    digest = hashlib.blake2b(digest_size=16)
    for token in range(known.size):
        try:
            text = known.text_of(token)
        except KeyError:  # an id that is not in use
            text = b""
        digest.update(len(text).to_bytes(4, "little") + text)
    return [
        _of_definition(type(tokenizer)),
        digest.hexdigest(),
        sorted(known.special_ids),
        {name: value for name, value in vars(tokenizer).items() if isinstance(value, str | int | float | None)},
        _conversations(tokenizer),
    ]


def _conversations(tokenizer: Any) -> list[Any]:
    """How it writes messages, in each place a role can stand."""
    system, user, answer, result = (
        Message(role=role, content=f"{role}: {_PROBE}", masked=role != "assistant", eot=True)
        for role in ("system", "user", "assistant", "ipython")
    )
    call = Message(role="assistant", content=_PROBE, ipython=True, eot=False)
    written: list[Any] = []
    for messages in ([user, answer], [system, user, answer, user, answer], [user, call, result, answer]):
        try:
            written.append(tokenizer.tokenize_messages(messages))
        except (ValueError, TypeError, RuntimeError, AssertionError) as error:
            written.append(str(error))  # it refuses such a conversation, whenever it sees one
    return written
