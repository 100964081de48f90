"""The renderings of every beginning of a conversation, taken from those of all of it.

Every trained turn needs two renderings, before and through it. Most templates write something first, then all messages
in one loop, then something last, and nothing outside of the loop looks at a message but the first. Of such a template
every beginning is known from the whole: what comes first and last is the same, and so is what an iteration wrote that
did not look beyond the beginning's end; any other is run again. Other templates are rendered each time.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from jinja2 import nodes

from torchtune_agent.data.loop_memory import Memory, Run

_MESSAGES = "messages"
_CHANGEABLE = {"joiner", "cycler"}  # objects by which an iteration could change what is written after the loop


def writes_messages_in_one_loop(template: nodes.Template) -> bool:
    """Whether beginnings of conversations can be known from the whole; for a template as it was parsed."""
    loops = [node for node in template.body if isinstance(node, nodes.For) and _is_messages(node.iter)]
    if len(loops) != 1:
        return False
    body = nodes.Scope(loops[0].body)
    return (
        _num_names(template) - _num_firsts(template) == _num_names(body) - _num_firsts(body) + 1
        and template.find(nodes.NSRef) is None
        and not any(name.name in _CHANGEABLE for name in template.find_all(nodes.Name))
    )


def _num_names(place: nodes.Node) -> int:
    """How often the messages are named there."""
    return sum(map(_is_messages, place.find_all(nodes.Name)))


def _num_firsts(place: nodes.Node) -> int:
    """How often that is for the first of them."""
    return sum(_is_messages(item.node) and _is_zero(item.arg) for item in place.find_all(nodes.Getitem))


def _is_messages(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == _MESSAGES


def _is_zero(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const) and node.value == 0 and type(node.value) is int


class _Whole(NamedTuple):
    """A rendering of all messages: the loop's text, where each iteration in it ends, and what stands around it."""

    before: str
    loop: str
    after: str
    ends: list[int]
    run: Run


class Beginnings:
    """Of one conversation, with and without the generation prompt."""

    def __init__(self, wholes: dict[bool, _Whole]) -> None:
        self._wholes = wholes

    def render(self, stop: int, prompt: bool) -> str:
        """The first `stop` messages, at least one."""
        before, loop, after, ends, run = self._wholes[prompt]
        if stop >= len(ends):
            return f"{before}{loop}{after}"
        same = run.num_unchanged(stop)
        texts = [run.text_of(index, stop) for index in range(same, stop)]
        return "".join((before, loop[: ends[same - 1] if same else 0], *texts, after))


def beginnings(
    pieces: Callable[[bool], list[str]], memory: Memory, messages: Sequence[dict[str, Any]]
) -> Beginnings | None:
    """Of a template that writes messages in one loop, from its `pieces` for all messages without and with the prompt,
    which run loops with `memory`; None where the loop did not run."""
    wholes: dict[bool, _Whole] = {}
    for prompt in (False, True):
        written = pieces(prompt)
        run = next((run for run in memory.values() if run.items is messages), None)
        places = [i for i, piece in enumerate(written) if run is not None and piece is run.text]
        if run is None or len(places) != 1:
            return None
        before, after = "".join(written[: places[0]]), "".join(written[places[0] + 1 :])
        ends = list(accumulate(len(iteration.text) for iteration in run.iterations))
        wholes[prompt] = _Whole(before, run.text, after, ends, run)
    return Beginnings(wholes)
