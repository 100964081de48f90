"""Loops of a chat template that remember: run again, they repeat what they wrote where nothing it depends on changed.

Every turn's context is a rendering of its own. A template that writes all messages each time makes the cost of a
conversation grow with the square of its length. So the loops at the top of a template run with a memory, which is exact
because everything an iteration can look at is known: the item; the others in the sequence and its end, where each
look is noted; and the variables from outside, namespaces and their contents included, which are compared. Data cannot
be changed by a sandboxed template. A loop for which this does not hold is left as it is.
"""

import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from jinja2 import Environment, Undefined, nodes, pass_context
from jinja2.ext import Extension
from jinja2.runtime import Context, Macro
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MEMORY = "what loops wrote before"  # the variable that holds the memory; like the filters, no template can spell it
_NOTED, _WHOLE = "noted in", "noted as a whole in"
_LOOP = "_remembering_loop"
_FAR = sys.maxsize
TOLD_BY_LOOPS = frozenset(("index", "index0", "first", "last", "length", "previtem", "nextitem"))

State: TypeAlias = tuple[tuple[tuple[str, Any], ...], ...] | None  # of namespaces; None where it cannot be remembered


class _Iteration(NamedTuple):
    """What one item wrote, how far it looked ahead, and the namespaces before and after it."""

    text: str
    reach: int
    before: State
    after: State


class Run(NamedTuple):
    """The last run of a loop; `furthest` is how far each item and those before it looked ahead, `iterate` runs its body
    for one of some items."""

    variables: list[Any]
    items: Sequence[Any]
    iterations: list[_Iteration]
    furthest: list[int]
    text: str
    iterate: Callable[[Sequence[Any], int], tuple[str, int]]

    def num_unchanged(self, stop: int) -> int:
        """How many iterations of a loop over the first `stop` items begin it as here, by what they looked at."""
        return bisect_left(self.furthest, stop, hi=stop)

    def text_of(self, index: int, stop: int) -> str:
        """What the item wrote in a loop over the first `stop` items, where loops write no namespace."""
        known = self.iterations[index]
        return known.text if known.reach < stop else self.iterate(self.items[:stop], index)[0]


Memory: TypeAlias = dict[int, Run]


class RememberingLoop:
    """Jinja's `loop`, which notes the furthest item it told of; one past the end means that it told of the end."""

    def __init__(self, items: Sequence[Any], index0: int, environment: Environment) -> None:
        self.index0 = self.reach = index0
        self.index = index0 + 1
        self.first = index0 == 0
        self._items = items
        self._undefined = environment.undefined

    def look_at(self, index: Any) -> Any:
        self.reach = max(self.reach, index if type(index) is int and index >= 0 else _FAR)
        return index

    def look_at_all(self, items: Any) -> Any:
        self.reach = _FAR
        return items

    @property
    def last(self) -> bool:
        return self.look_at(self.index) >= len(self._items)

    @property
    def nextitem(self) -> Any:
        return self._undefined("there is no next item") if self.last else self._items[self.index]

    @property
    def previtem(self) -> Any:
        return self._undefined("there is no previous item") if self.first else self._items[self.index0 - 1]

    @property
    def length(self) -> int:
        return len(self.look_at_all(self._items))


class LoopMemory(Extension):
    """Runs the loops that `remember_loops` found."""

    tags: set[str] = set()

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        environment.filters[_NOTED] = lambda index, loop: loop.look_at(index)
        environment.filters[_WHOLE] = lambda items, loop: loop.look_at_all(items)

    @pass_context
    def run(
        self, context: Context, loop: int, writes: bool, iterable: Iterable[Any], *variables: Any, caller: Macro
    ) -> str:
        """One loop of the template, with `caller` for its body, which reads `variables` and may write namespaces."""
        items = iterable if type(iterable) is list else list(iterable)
        memory: Memory = context[MEMORY]
        namespaces = [value for value in variables if isinstance(value, Namespace)]
        values = [_comparable(value) for value in variables]
        past = memory.get(loop)
        num_known = _num_same(past.items, items) if past is not None and past.variables == values else 0
        state = _state(namespaces)
        num_same = _num_unchanged(past, num_known, state) if past is not None else 0
        iterations = past.iterations[:num_same] if past is not None else []
        furthest = past.furthest[:num_same] if past is not None else []
        state = iterations[-1].after if iterations else state
        behind = writes and num_same > 0  # the namespaces are not yet in this state

        def iterate(items: Sequence[Any], index: int) -> tuple[str, int]:
            position = RememberingLoop(items, index, self.environment)
            sequence = items if type(iterable) is list else iterable
            return caller._func(items[index], position, position, sequence), position.reach  # nothing is escaped here

        for index in range(num_same, len(items)):
            known = past.iterations[index] if past is not None and index < num_known else None
            if known is None or known.reach >= num_known or state is None or known.before != state:
                if behind:
                    _set_state(namespaces, state)
                text, reach = iterate(items, index)
                after = _state(namespaces) if writes else state
                known = _Iteration(text, reach if after is not None else _FAR, state, after)
                behind = False
            else:
                behind = writes
            iterations.append(known)
            furthest.append(max(known.reach, furthest[-1] if furthest else 0))
            state = known.after
        if behind:
            _set_state(namespaces, state)
        text = "".join([iteration.text for iteration in iterations])
        memory[loop] = Run(values, items, iterations, furthest, text, iterate)
        return text


def _num_unchanged(past: Run, num_known: int, state: State) -> int:
    """How many iterations a loop that starts in `state` begins with as before, `num_known` items being the same."""
    if not num_known or state is None or past.iterations[0].before != state:
        return 0
    return past.num_unchanged(num_known)


def _num_same(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two sequences share at their beginning, the same objects."""
    number = 0
    for x, y in zip(a, b, strict=False):
        if x is not y:
            break
        number += 1
    return number


class _Same:
    """Equal to the same object only, which it keeps alive."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value


def _comparable(value: Any) -> Any:
    """Equal for values that no template can tell apart. Of a namespace the contents are compared elsewhere; what a
    macro reads is among the variables."""
    if _is_plain(value):
        return type(value), value
    if isinstance(value, (Undefined, Namespace)):
        return type(value)
    return _Same(value._func.__code__ if isinstance(value, Macro) else value)


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (str, int, bool)


def _state(namespaces: Sequence[Namespace]) -> State:
    contents = [contents_of(namespace) for namespace in namespaces]
    if all(_is_plain(value) for content in contents for value in content.values()):
        return tuple(tuple((name, (type(value), value)) for name, value in content.items()) for content in contents)
    return None


def _set_state(namespaces: Sequence[Namespace], state: State) -> None:
    for namespace, content in zip(namespaces, state or (), strict=False):
        contents_of(namespace).clear()
        contents_of(namespace).update((name, value) for name, (_, value) in content)


def contents_of(namespace: Namespace) -> dict[str, Any]:
    return namespace._Namespace__attrs  # pyright: ignore[reportAttributeAccessIssue]


def remember_loops(environment: Environment, template: nodes.Template) -> nodes.Template:
    """Hand the loops of a template that can be remembered to `LoopMemory`."""
    macros = nodes.Scope(list(template.find_all(nodes.Macro)))
    number = 0

    def visit(body: list[Any]) -> None:
        nonlocal number
        for i, node in enumerate(body):
            if isinstance(node, nodes.If):
                for branch in (node.body, node.elif_, node.else_):
                    visit(branch)
            elif isinstance(node, nodes.For) and _can_be_remembered(node, macros):
                number += 1
                body[i] = _remembered(node, number, macros, environment)

    visit(template.body)
    return template


def _names(*places: nodes.Node) -> set[str]:
    """The variables that are read or set there."""
    return {found.name for place in places for found in place.find_all((nodes.Name, nodes.NSRef))}


def _can_be_remembered(loop: nodes.For, macros: nodes.Node) -> bool:
    """Whether its body can look at nothing but what `LoopMemory` knows."""
    if not isinstance(loop.iter, nodes.Name) or not isinstance(loop.target, nodes.Name):
        return False
    if loop.else_ or loop.test is not None or loop.recursive:
        return False
    body = nodes.Scope(loop.body)
    if any(body.find_all((nodes.Macro, nodes.CallBlock, nodes.Block, nodes.Break, nodes.Continue))):
        return False
    positions = [name for name in body.find_all(nodes.Name) if name.name == "loop"]
    asked = [found for found in body.find_all(nodes.Getattr) if found.node in positions and found.attr in TOLD_BY_LOOPS]
    stored = {name.name for name in body.find_all(nodes.Name) if name.ctx != "load"}
    special = {"self", "super", "caller", "varargs", "kwargs", _LOOP}
    return (
        len(asked) == len(positions)
        and loop.iter.name not in _names(macros) | stored | {loop.target.name}
        and not special & _names(body, macros)
    )


def _remembered(loop: nodes.For, number: int, macros: nodes.Node, environment: Environment) -> nodes.CallBlock:
    assert isinstance(loop.iter, nodes.Name) and isinstance(loop.target, nodes.Name)
    body = nodes.Scope(loop.body)
    variables = _names(body, macros) - {"loop", loop.iter.name, loop.target.name}
    writes = any(place.find(nodes.NSRef) for place in (body, macros))
    run = nodes.ExtensionAttribute(LoopMemory.identifier, "run")
    arguments = [nodes.Const(number), nodes.Const(writes), loop.iter]
    arguments += [nodes.Name(name, "load") for name in sorted(variables)]
    parameters = [nodes.Name(name, "param") for name in (loop.target.name, "loop", _LOOP, loop.iter.name)]
    body = _Noting(loop.iter.name).visit(body).body
    block = nodes.CallBlock(nodes.Call(run, arguments, [], None, None), parameters, [], body)
    block.set_lineno(loop.lineno)
    block.set_environment(environment)
    return block


class _Noting(NodeTransformer):
    """Notes the items that a loop's body takes from the sequence itself."""

    def __init__(self, sequence: str) -> None:
        self._sequence = sequence

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:
        if self._is_sequence(node.node) and not isinstance(node.arg, nodes.Slice):
            node.arg = _filtered(self.visit(node.arg), _NOTED)
            return node
        return self.generic_visit(node)  # pyright: ignore[reportReturnType]

    def visit_Name(self, node: nodes.Name) -> nodes.Expr:
        return _filtered(node, _WHOLE) if self._is_sequence(node) else node

    def _is_sequence(self, node: nodes.Node) -> bool:
        return isinstance(node, nodes.Name) and node.name == self._sequence


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [nodes.Name(_LOOP, "load")], [], None, None)
