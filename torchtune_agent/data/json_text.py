"""JSON that comes out as it went in: the order of keys and the spelling of numbers survive reading and writing.

Tool-call arguments are trained byte by byte, and an ordinary round trip through `json` turns 1e5 into 100000.0 and
1.10 into 1.1. `loads` keeps a number whose spelling Python would change as a `SpelledFloat`, which is a float
everywhere else; `dumps` writes it back as it was. An argument object is written with ", " and ": " between its parts
and characters as themselves, not as \\u escapes, because that is what `tojson` of the chat templates writes. Arguments
that stand in the record as a string never come through here.
"""

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from json.encoder import encode_basestring
from typing import IO, Any

from torchtune_agent.data.reasons import BadRecord
from torchtune_agent.errors import UserError

MAX_LINE_BYTES = 100_000_000
# Below what any supported Python parses and writes without running into its recursion limit, in any stack of callers.
MAX_DEPTH = 200
_LONGEST_INT = 4000  # digits; Python refuses to convert much longer ones, to protect against slow input
_BOM = b"\xef\xbb\xbf"
_AFTER_ELEMENT = (",", "]", " ", "\t", "\r", "\n")
_SPACE = re.compile(r"[ \t\r\n]*")


class SpelledFloat(float):
    """A number that remembers the text it was read from."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> "SpelledFloat":
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __getnewargs__(self) -> tuple[str]:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        return (self.text,)


def _read_float(text: str) -> float:
    number = float(text)
    return number if repr(number) == text else SpelledFloat(text)


def _read_int(text: str) -> int | float:
    return SpelledFloat(text) if text == "-0" or len(text) > _LONGEST_INT else int(text)


def _read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A repeated key would silently lose its first value."""
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadRecord("duplicate_key", f"key {twice[:60]!r} stands twice in one object")
    return result


_DECODER = json.JSONDecoder(parse_float=_read_float, parse_int=_read_int, object_pairs_hook=_read_object)


def loads(text: str) -> Any:
    """Like `json.loads`, but every number can be written back as it was; BadRecord where an object repeats a key."""
    return _DECODER.decode(text)


def parse_list(file: IO[bytes], name: str, block_bytes: int = 1 << 20) -> Iterator[Any]:
    """The elements of a file that is one JSON list, one after the other; a BadRecord for one that repeats a key."""
    text = _GrowingText(file, block_bytes)
    index = 0
    try:
        mark = text.take()
        if mark == "[" and text.peek() == "]":
            mark = text.take()
        while mark in ("[", ","):
            yield text.element()
            index += 1
            mark = text.take()
        if mark != "]" or text.peek():
            raise ValueError("expected a comma or the list's end" if mark != "]" else "text follows the list's end")
    except (ValueError, RecursionError) as error:
        said = getattr(error, "msg", error)  # without the position, which counts from the last text that was read
        raise UserError(f"{name}[{index}]: {said}. Nothing behind it can be read: mend the file.") from error


class _GrowingText:
    """The text of a file from the place that is being read; more is read when it is needed."""

    def __init__(self, file: IO[bytes], block_bytes: int) -> None:
        self._file, self._block_bytes = file, block_bytes
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._at = "", 0

    def _grow(self) -> bool:
        """Read as much as there is, so that a long element costs no more than twice its length; False at the end."""
        content = self._file.read(max(self._block_bytes, len(self._text) - self._at))
        self._text, self._at = self._text[self._at :] + self._decode(content, final=not content), 0
        return bool(content)

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # pyright: ignore[reportOptionalMemberAccess]
            if self._at < len(self._text) or not self._grow():
                return self._text[self._at : self._at + 1]

    def take(self) -> str:
        mark = self.peek()
        self._at += len(mark)
        return mark

    def element(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = _decode_at(self._text, self._at)
            except json.JSONDecodeError:
                if not self._grow():
                    raise
                continue
            # Until its end is seen, a number may go on.
            if self._text[end : end + 1] in _AFTER_ELEMENT or not self._grow():
                self._at = end
                return value


def _decode_at(text: str, at: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except BadRecord as problem:
        return problem, json.JSONDecoder().raw_decode(text, at)[1]


def dumps(value: Any) -> str:
    """Like `json.dumps(value, ensure_ascii=False)`, but numbers that `loads` read keep their spelling."""
    if isinstance(value, str):
        return encode_basestring(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)}: {dumps(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(dumps(item) for item in value) + "]"
    if isinstance(value, SpelledFloat):
        return value.text
    return json.dumps(value)


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"keys must be text, found {type(key).__name__}")
    return encode_basestring(key)


def parse_line(line: bytes, *, last: bool, first: bool = False, max_bytes: int = MAX_LINE_BYTES) -> dict[str, Any]:
    """The record that one line of a JSON Lines file holds; BadRecord where it holds none.

    Args:
        line: its bytes, with or without the line break.
        last: it is the file's last line, which may have been cut off.
        first: it is the file's first line, which may start with a byte-order mark.
        max_bytes: longer lines are refused unread.
    """
    if len(line) > max_bytes:
        raise BadRecord("too_long_line", f"more than {max_bytes:,} bytes")
    text = _decode(line, last, first)
    try:
        record = loads(text)
    except json.JSONDecodeError as error:
        cut = last and not text.endswith("\n") and (error.pos >= len(text) or not text.rstrip().endswith("}"))
        raise BadRecord("truncated_last_line" if cut else "broken_json", str(error)) from error
    except RecursionError as error:
        raise BadRecord("too_deep", f"values nest deeper than {MAX_DEPTH} levels") from error
    if not isinstance(record, dict):
        raise BadRecord("wrong_type", f"expected a JSON object, found {type(record).__name__}")
    # Only lines that spell such a character can hold one: looking for the escapes is much cheaper than a walk.
    if "\\ud" in text or "\\uD" in text or "\\u0000" in text:
        check_texts(record)
    if text.count("{") + text.count("[") > MAX_DEPTH:
        check_depth(record)
    return record


def _decode(line: bytes, last: bool, first: bool) -> str:
    if line.startswith(_BOM):
        if not first:
            raise BadRecord("bom", "a byte-order mark in the middle of the file: files were joined as bytes")
        line = line[len(_BOM) :]
    elif line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadRecord("bom", "a UTF-16 byte-order mark: save the file as UTF-8")
    if b"\0" in line:
        raise BadRecord("nul", f"a NUL byte at byte {line.index(0)}")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        if last and error.reason == "unexpected end of data":
            raise BadRecord("truncated_last_line", "the line ends inside a character") from error
        raise BadRecord("invalid_utf8", f"byte {error.start} (0x{line[error.start]:02x}) is not UTF-8") from error


def check_text(text: str, where: str) -> None:
    """Refuse text that cannot be UTF-8 (half of a surrogate pair) or that holds a NUL character."""
    if "\0" in text:
        raise BadRecord("nul", f"{where}: a NUL character at position {text.index(chr(0))}")
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord("lone_surrogate", f"{where}: U+{ord(text[error.start]):04X} stands alone") from error


def check_texts(value: Any, where: str = "record") -> None:
    """`check_text` for every text in a value, keys included."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            check_text(item, where)
        elif isinstance(item, Mapping):
            waiting.extend(item.keys())
            waiting.extend(item.values())
        elif isinstance(item, list | tuple):
            waiting.extend(item)


def check_depth(value: Any, where: str = "record") -> None:
    """Refuse values that nest deeper than MAX_DEPTH, without recursion."""
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, Mapping | list | tuple)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise BadRecord("too_deep", f"{where}: values nest deeper than {MAX_DEPTH} levels")
        level = [child for item in level for child in (item.values() if isinstance(item, Mapping) else item)]
