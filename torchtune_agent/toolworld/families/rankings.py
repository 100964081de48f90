"""Rankings: comparisons and totals over several rows of the records' tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torchtune_agent.toolworld.families.records import THEMES, Attribute, plural, row_of, rows_of
from torchtune_agent.toolworld.tool import State, Tool, ToolError, Usage, parameters, tidy

FAMILY = "rankings"


def groups() -> list[list[Tool]]:
    return [
        [make(kind, attribute, attributes) for attribute in attributes if not attribute.words for make in _RANKINGS]
        for kinds, attributes in THEMES.items()
        for kind in kinds
    ]


@dataclass(frozen=True)
class Ranking:
    """One comparison over several rows: which tool it makes and how it is asked for."""

    verb: str
    phrase: str
    asks: tuple[str, str, str, str]

    def __call__(self, kind: str, attribute: Attribute, attributes: tuple[Attribute, ...]) -> Tool:
        picks_name = self.verb == "highest"

        def run(state: State, args: dict[str, Any]) -> Any:
            rows = rows_of(state, kind, attributes)
            values = {name: row_of(rows, kind, name)[attribute.name] for name in args["names"]}
            if not values:
                raise ToolError("names is empty")
            if picks_name:
                return max(values, key=lambda name: values[name])
            return tidy((sum if self.verb == "total" else fmean)(values.values()))

        what, many = attribute.spoken, plural(kind)
        texts = {"what": what, "many": many, "kind": kind, "names": "{names}"}
        usage = Usage(
            sample=lambda rng, state: {"names": rng.sample(list(rows_of(state, kind, attributes)), rng.randint(2, 3))},
            asks=_four(lambda ask: ask.format(**texts), self.asks),
            goal=f"the {self.phrase} {what} of the {many} {{names}}",
            reply=f"{{result}} has the highest {what}."
            if picks_name
            else f"The {self.phrase} {what} is {{result}}{attribute.suffix}.",
            gives=f"{kind}/name" if picks_name else attribute.unit,
        )
        description = f"{self.phrase.capitalize()} {what} of some {many}."
        if picks_name:
            description = f"Which of some {many} has the highest {what}."
        name = f"{self.verb}_{kind}_{attribute.name}"
        schema = parameters(names="string[]")
        return Tool(name, description, schema, FAMILY, f"{kind} rankings", many, run, usage)


_RANKINGS = (
    Ranking(
        "highest",
        "highest",
        (
            "find which of the {many} {names} has the highest {what}",
            "tell me who leads in {what} among the {many} {names}",
            "compare the {many} {names} and pick the one of greatest {what}",
            "say which {kind} tops the others in {what}: {names}",
        ),
    ),
    Ranking(
        "total",
        "total",
        (
            "add up the {what} of the {many} {names}",
            "tell me the total {what} of the {many} {names}",
            "work out the {what} of the {many} {names} together",
            "sum the {what} over these {many}: {names}",
        ),
    ),
    Ranking(
        "average",
        "average",
        (
            "average the {what} of the {many} {names}",
            "tell me the mean {what} of the {many} {names}",
            "work out the average {what} for the {many} {names}",
            "compute the {what} these {many} have on average: {names}",
        ),
    ),
)


def _four(change: Callable[[str], str], asks: tuple[str, str, str, str]) -> tuple[str, str, str, str]:
    return change(asks[0]), change(asks[1]), change(asks[2]), change(asks[3])
