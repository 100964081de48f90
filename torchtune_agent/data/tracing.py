"""Which characters of a rendered chat the template wrote itself, and which it took from the data.

A control token is real only where the template wrote it: a tool result that spells `<|im_end|>` is text. The rendered
text alone cannot tell the two apart, and marking the data would change what templates decide by looking at it. So the
template's own literals are marked instead, in its syntax tree: each visible character becomes a private-use one
(its code point plus a plane's first), the text keeps its length, and taking the marks off gives what the plain
template renders. Literals that are compared with data, and arguments of calls, filters and tests, stay plain.

An assistant may write some of these tokens itself. Where its words hold one, that one is marked in the data, with the
characters of the other plane; templates then find and cut text as if it was not (`call_on_marked`).
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from types import BuiltinMethodType
from typing import Any

import numpy as np
from jinja2 import Environment, nodes
from jinja2.visitor import NodeTransformer

PLANES = (0xF0000, 0x100000)  # the two planes for private use; data may hold characters of one of them
_LAST = 0xFFFD


class Marks:
    """Marked characters in one plane; in the plane `own`, those of tokens that an assistant wrote."""

    def __init__(self, plane: int, own: int | None = None) -> None:
        self.plane = plane
        self.own = own
        marked = f"{chr(plane)}-{chr(plane + _LAST)}"
        self._any = re.compile(f"[{marked}]")
        self._unmarked = re.compile(f"[^{marked}]*")
        self._either = re.compile(f"[{marked}{chr(own)}-{chr(own + _LAST)}]") if own is not None else self._any
        self.mark = lru_cache(maxsize=4096)(self._mark)
        self.split = lru_cache(maxsize=4)(self._split)  # a sample's text is checked, then encoded

    def _mark(self, text: str) -> str:
        """White space stays plain, so that trimming and stripping do what they did."""
        return _moved(text, self.plane)

    def mark_own(self, text: str) -> str:
        """A token of the assistant's, marked."""
        assert self.own is not None
        return _moved(text, self.own)

    def _split(self, text: str) -> tuple[str, np.ndarray]:
        """The plain text, and True for each of its characters that was marked, by the template or as the assistant's
        own."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        unmarked = codes - np.uint32(self.plane)  # smaller codes wrap around to large ones
        marked = unmarked <= _LAST
        if self.own is not None:
            owned = codes - np.uint32(self.own)
            unmarked = np.where(marked, unmarked, owned)
            marked |= owned <= _LAST
        return np.where(marked, unmarked, codes).tobytes().decode("utf-32-le", "surrogatepass"), marked

    def plain(self, text: str) -> str:
        return text if text.isascii() or not self._either.search(text) else self.split(text)[0]

    def found_in(self, text: str) -> bool:
        return not text.isascii() and self._any.search(text) is not None

    def before_ending(self, text: str) -> str:
        """`text` without what the template wrote at its end."""
        position = len(text)
        while position and (text[position - 1].isspace() or self._any.match(text, position - 1)):
            position -= 1
        return text[:position]

    def end_of_data(self, text: str, at: int) -> int:
        """Where the data that stands at `at` ends, not counting white space."""
        unmarked = self._unmarked.match(text, at)
        return at + len(unmarked[0].rstrip()) if unmarked else at


def _moved(text: str, plane: int) -> str:
    return "".join(c if c.isspace() or ord(c) > _LAST else chr(plane + ord(c)) for c in text)


MARKS = {plane: Marks(plane) for plane in PLANES}
WITH_OWN = Marks(*PLANES)


def free_marks(strings: Iterable[str], *, own: bool = False) -> Marks | None:
    """Marks that none of `strings` holds, or None where characters of both planes (of any, with `own`) are in use."""
    free = [*MARKS.values()]
    for text in strings:
        if not text.isascii():
            free = [marks for marks in free if not marks.found_in(text)]
    if own:
        return WITH_OWN if len(free) == len(MARKS) else None
    return free[0] if free else None


_ASKED = frozenset(("startswith", "endswith", "find", "rfind", "index", "rindex", "count"))
_STRIPPED = frozenset(("strip", "lstrip", "rstrip"))
_CUT = frozenset(("split", "rsplit", "partition", "rpartition"))


def call_on_marked(marks: Marks, method: BuiltinMethodType, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a method of a string gives where marks are in the way of what it looks for: it looks in the plain text, and
    its answer is cut out of the marked one. What other methods change is for the plain rendering to find out."""
    text, name = str(method.__self__), method.__name__
    plain = marks.plain(text)
    if plain is text or name not in _ASKED | _STRIPPED | _CUT or not args or args[0] is None:
        return method(*args, **kwargs)
    found = getattr(plain, name)(*args, **kwargs)
    if name in _ASKED:
        return found
    if name in _STRIPPED:
        start = 0 if name == "rstrip" else len(plain) - len(plain.lstrip(*args))
        return text[start : start + len(found)]
    gap = len(args[0]) if name in ("split", "rsplit") else 0
    parts, at = [], 0
    for part in found:
        parts.append(text[at : at + len(part)])
        at += len(part) + gap
    return type(found)(parts)


def strings_in(value: Any) -> Iterator[str]:
    """Every string in nested JSON-like data, keys included."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
        elif isinstance(item, (dict, Mapping)):  # a dictionary is known for one at once
            stack.extend(item)
            stack.extend(item.values())


def mark_literals(environment: Environment, source: str, marks: Marks) -> nodes.Template:
    """The template's syntax tree with its written literals marked. Installs the filters that the tree uses."""
    environment.filters[_MARK] = lambda value: marks.mark(value) if isinstance(value, str) else value
    environment.filters[_PLAIN] = lambda value: marks.plain(value) if isinstance(value, str) else value
    return _Marking(marks).visit(environment.parse(source))


_MARK, _PLAIN = "with marks", "without marks"  # names that no template can spell


class _Marking(NodeTransformer):
    """Marks what flows into the output; looks up and compares without marks."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        node.nodes = [self._written(child) for child in node.nodes]
        return node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Assign:
        node.node = self._written(node.node)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        node.expr = self._looked_at(node.expr)
        for operand in node.ops:
            operand.expr = self._looked_at(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:
        node.node = self.visit(node.node)
        node.arg = self.visit(node.arg) if isinstance(node.arg, nodes.Slice) else self._looked_at(node.arg)
        return node

    def _looked_at(self, node: nodes.Expr) -> nodes.Expr:
        node = self.visit(node)
        return node if isinstance(node, nodes.Const) else _filtered(node, _PLAIN)

    def _written(self, node: Any) -> Any:
        """An expression whose value may be written out. A message's role comes from a closed list, so it is the
        template's as much as a literal is: some build `<|user|>` of it."""
        match node:
            case nodes.TemplateData():
                node.data = self._marks.mark(node.data)
                return node
            case nodes.Const(value=str() as text):
                node.value = self._marks.mark(text)
                return node
            case nodes.Add() | nodes.And() | nodes.Or():
                node.left, node.right = self._written(node.left), self._written(node.right)
                return node
            case nodes.Concat():
                node.nodes = [self._written(child) for child in node.nodes]
                return node
            case nodes.CondExpr():
                node.test = self.visit(node.test)
                node.expr1 = self._written(node.expr1)
                node.expr2 = self._written(node.expr2) if node.expr2 is not None else None
                return node
            case nodes.Filter() if node.node is not None:
                node.node = self._written(node.node)
                node.args = [self.visit(argument) for argument in node.args]
                return node
            case nodes.Getattr(attr="role") | nodes.Getitem(arg=nodes.Const(value="role")):
                return _filtered(self.visit(node), _MARK)
        return self.visit(node)


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)
