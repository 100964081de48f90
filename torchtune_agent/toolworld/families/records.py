"""Records: look-ups in generated tables of things (ships, castles, lakes ...) with typed attributes.

Every kind of thing gives one tool per attribute and direction (`get_castle_height`,
                                                                `find_castle_by_architect`). Numbers
carry their unit, so unit conversions can follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from torchtune_agent.toolworld.tool import Lookup, Pipe, State, Tool, ToolError, Usage, parameters
from torchtune_agent.toolworld.words import PEOPLE, distinct, proper_name

FAMILY = "records"
NUM_ROWS = 5
COLOURS = ("red", "blue", "green", "black", "white", "grey", "brown", "golden")
COUNTRIES = ("Norway", "Peru", "Kenya", "Japan", "Chile", "Canada", "Türkiye", "Spain", "Côte d'Ivoire", "India")
STYLES = ("gothic", "modern", "baroque", "romantic", "art déco", "classic", "rural", "minimal")
VENDORS = ("Nordlicht", "Acme", "Kobo", "Vega", "Müller", "Orbit", "Pixel & Co", "Sato")


@dataclass(frozen=True)
class Attribute:
    """A column: whole numbers between `low` and `high` in `unit`, or (when `words` is set) one of those words."""

    name: str
    unit: str = "number"
    low: int = 0
    high: int = 0
    words: tuple[str, ...] = ()

    @property
    def spoken(self) -> str:
        return self.name.replace("_", " ")

    @property
    def suffix(self) -> str:
        return "" if self.unit == "number" or self.words else f" {self.unit.replace('_', ' ')}"


THEMES: dict[tuple[str, ...], tuple[Attribute, ...]] = {
    ("city", "village", "island", "harbour", "province", "region", "colony"): (
        Attribute("population", low=900, high=90000),
        Attribute("area", "square_km", 2, 900),
        Attribute("elevation", "metres", 3, 2400),
        Attribute("mayor", words=PEOPLE),
        Attribute("country", words=COUNTRIES),
    ),
    ("ship", "train", "truck", "ferry", "rocket", "tram", "submarine", "airship"): (
        Attribute("weight", "tonnes", 4, 900),
        Attribute("speed", "kmh", 20, 900),
        Attribute("capacity", low=2, high=800),
        Attribute("captain", words=PEOPLE),
        Attribute("colour", words=COLOURS),
    ),
    ("horse", "dog", "parrot", "tiger", "camel", "whale", "turtle"): (
        Attribute("weight", "kg", 2, 900),
        Attribute("height", "cm", 10, 260),
        Attribute("age", low=1, high=40),
        Attribute("keeper", words=PEOPLE),
        Attribute("colour", words=COLOURS),
    ),
    ("castle", "museum", "tower", "hotel", "library", "theatre", "lighthouse", "temple"): (
        Attribute("height", "metres", 5, 300),
        Attribute("rent", low=100, high=9000),
        Attribute("opening_year", low=1300, high=2020),
        Attribute("architect", words=PEOPLE),
        Attribute("style", words=STYLES),
    ),
    ("robot", "printer", "camera", "drone", "laptop", "heater", "radio"): (
        Attribute("weight", "grams", 90, 9000),
        Attribute("power", "watts", 5, 2500),
        Attribute("price", low=30, high=4000),
        Attribute("owner", words=PEOPLE),
        Attribute("vendor", words=VENDORS),
    ),
    ("novel", "film", "song", "opera", "play", "podcast"): (
        Attribute("length", "minutes", 3, 300),
        Attribute("release_year", low=1900, high=2024),
        Attribute("audience", low=200, high=90000),
        Attribute("author", words=PEOPLE),
        Attribute("language", words=("Greek", "Dutch", "Thai", "Polish", "Swahili", "Malay", "Czech", "Welsh")),
    ),
    ("mountain", "lake", "glacier", "forest", "canyon", "volcano", "desert"): (
        Attribute("size", "hectares", 20, 9000),
        Attribute("altitude", "metres", 20, 6000),
        Attribute("rainfall", "mm", 100, 4000),
        Attribute("ranger", words=PEOPLE),
        Attribute("country", words=COUNTRIES),
    ),
    ("farm", "mill", "mine", "quarry", "vineyard", "dairy"): (
        Attribute("land", "acres", 4, 900),
        Attribute("energy_use", "kilowatt_hours", 90, 9000),
        Attribute("staff", low=2, high=300),
        Attribute("manager", words=PEOPLE),
        Attribute("product", words=("cheese", "flour", "salt", "copper", "grapes", "wool", "slate", "honey")),
    ),
}


def groups() -> list[list[Tool]]:
    return [_record_tools(kind, attributes) for kinds, attributes in THEMES.items() for kind in kinds]


def plural(kind: str) -> str:
    return f"{kind[:-1]}ies" if kind[-1] == "y" and kind[-2] not in "aeiou" else f"{kind}s"


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def rows_of(state: State, kind: str, attributes: tuple[Attribute, ...]) -> dict[str, dict[str, Any]]:
    """The kind's table in this task's world: name -> attribute -> value."""

    def make(rng: Random) -> dict[str, Any]:
        names = distinct(rng, proper_name, NUM_ROWS)
        columns = {
            # Words are distinct in a table, so that a search for one finds exactly one row.
            column.name: rng.sample(column.words, NUM_ROWS)
            if column.words
            else [rng.randint(column.low, column.high) for _ in names]
            for column in attributes
        }
        return {name: {key: values[row] for key, values in columns.items()} for row, name in enumerate(names)}

    return state.table(f"{kind}/records", make)


def _record_tools(kind: str, attributes: tuple[Attribute, ...]) -> list[Tool]:
    getters = [_getter(kind, attribute, attributes) for attribute in attributes]
    finders = [_finder(kind, attribute, attributes) for attribute in attributes if attribute.words]
    return [_lister(kind, attributes), *getters, *finders]


def _getter(kind: str, attribute: Attribute, attributes: tuple[Attribute, ...]) -> Tool:
    def run(state: State, args: dict[str, Any]) -> Any:
        rows = rows_of(state, kind, attributes)
        return row_of(rows, kind, args["name"])[attribute.name]

    what = attribute.spoken
    usage = Usage(
        sample=lambda rng, state: {"name": rng.choice(list(rows_of(state, kind, attributes)))},
        asks=(
            f"look up the {what} of the {kind} {{name}}",
            f"tell me the {what} of {{name}}, {_a(kind)}",
            f"check the {kind} {{name}} for its {what}",
            f"see which {what} the {kind} called {{name}} has",
        ),
        goal=f"the {what} of the {kind} {{name}}",
        reply=f"The {what} of {{name}} is {{result}}{attribute.suffix}.",
        gives="" if attribute.words else attribute.unit,
        pipe=Pipe(
            "name",
            f"{kind}/name",
            (
                f"look up its {what}",
                f"tell me the {what} of that {kind}",
                f"check it for its {what}",
                f"see which {what} it has",
            ),
        ),
        lookup=Lookup("name", f"list_{plural(kind)}"),
    )
    unit = f" in{attribute.suffix}" if attribute.suffix else ""
    return _tool(
        kind,
        f"get_{kind}_{attribute.name}",
        f"{what.capitalize()} of {_a(kind)}{unit}.",
        {"name": "string"},
        run,
        usage,
    )


def _finder(kind: str, attribute: Attribute, attributes: tuple[Attribute, ...]) -> Tool:
    def run(state: State, args: dict[str, Any]) -> str:
        for name, row in rows_of(state, kind, attributes).items():
            if row[attribute.name] == args[attribute.name]:
                return name
        raise ToolError(f"no {kind} has {attribute.spoken} '{args[attribute.name]}'")

    def sample(rng: Random, state: State) -> dict[str, Any]:
        row = rng.choice(list(rows_of(state, kind, attributes).values()))
        return {attribute.name: row[attribute.name]}

    what, value = attribute.spoken, f"{{{attribute.name}}}"
    usage = Usage(
        sample=sample,
        asks=(
            f"find the {kind} whose {what} is {value}",
            f"tell me which {kind} has the {what} {value}",
            f"search for {_a(kind)} with {value} as its {what}",
            f"name the {kind} that has {what} {value}",
        ),
        goal=f"the {kind} with {what} {value}",
        reply=f"The {kind} with {what} {value} is {{result}}.",
        gives=f"{kind}/name",
    )
    name = f"find_{kind}_by_{attribute.name}"
    return _tool(kind, name, f"Find the {kind} with a given {what}.", {attribute.name: "string"}, run, usage)


def _lister(kind: str, attributes: tuple[Attribute, ...]) -> Tool:
    many = plural(kind)
    usage = Usage(
        sample=lambda rng, state: {},
        asks=(
            f"list all {many}",
            f"tell me which {many} there are",
            f"name every {kind} on record",
            f"show the known {many}",
        ),
        goal=f"the names of all {many}",
        reply=f"The {many} are {{result}}.",
    )
    return _tool(
        kind,
        f"list_{many}",
        f"List the names of all {many}.",
        {},
        lambda s, a: list(rows_of(s, kind, attributes)),
        usage,
    )


def row_of(rows: dict[str, dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    if name not in rows:
        raise ToolError(f"no {kind} is named '{name}'")
    return rows[name]


def _tool(
    kind: str,
    name: str,
    description: str,
    types: dict[str, str],
    run: Callable[[State, dict[str, Any]], Any],
    usage: Usage,
) -> Tool:
    return Tool(name, description, parameters(**types), FAMILY, f"{kind} records", plural(kind), run, usage)
