"""Messages: offices whose people are found by room, looked up, and written to."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from torchtune_agent.toolworld.tool import Lookup, Pipe, State, Tool, ToolError, Usage, parameters
from torchtune_agent.toolworld.words import PEOPLE, phrase

FAMILY = "messages"
OFFICES = (
    "berlin", "lisbon", "oslo", "paris", "kyoto", "lima", "cairo", "dublin", "milan", "prague", "vienna", "athens",
    "quito",
    "hanoi", "seoul", "boston", "denver", "geneva", "madrid", "turin", "riga", "tallinn", "vilnius", "warsaw", "sofia",
    "zagreb", "bergen", "malmo", "porto", "sevilla", "nairobi", "accra", "dakar", "tunis", "delhi", "mumbai", "manila",
    "osaka", "sydney", "perth",
)  # fmt: skip
NUM_PEOPLE = 5


def groups() -> list[list[Tool]]:
    return [[_lister(office), _finder(office), _phone(office), _sender(office), _inbox(office)] for office in OFFICES]


def _people(state: State, office: str) -> dict[str, dict[str, Any]]:
    def make(rng: Random) -> dict[str, Any]:
        rooms = iter(rng.sample(range(100, 400), NUM_PEOPLE))
        return {
            name: {
                "room": next(rooms),
                "phone": f"{rng.randint(20, 99)}-{rng.randint(1000, 9999)}",
                "note": phrase(rng),
            }
            for name in rng.sample(PEOPLE, NUM_PEOPLE)
        }

    return state.table(f"{office}/people", make)


def _person(state: State, office: str, name: str) -> dict[str, Any]:
    people = _people(state, office)
    if name not in people:
        raise ToolError(f"nobody named '{name}' works in the {office.title()} office")
    return people[name]


def _one_person(office: str) -> Callable[[Random, State], dict[str, Any]]:
    return lambda rng, state: {"name": rng.choice(list(_people(state, office)))}


def _tool(
    office: str,
    name: str,
    description: str,
    schema: dict[str, Any],
    run: Callable[[State, dict[str, Any]], Any],
    usage: Usage,
) -> Tool:
    return Tool(name, description, schema, FAMILY, office, f"the {office.title()} office", run, usage)


def _lister(office: str) -> Tool:
    place = office.title()
    usage = Usage(
        lambda rng, state: {},
        (f"list the people of the {place} office", f"tell me who works in the {place} office",
         f"show everyone in the {place} office", f"name all staff of the {place} office"),
        f"the people of the {place} office", f"In {place} work {{result}}.",
    )  # fmt: skip
    return _tool(
        office, f"list_{office}_people", f"List the people of the {place} office.", parameters(),
        lambda state, args: list(_people(state, office)), usage,
    )  # fmt: skip


def _finder(office: str) -> Tool:
    place = office.title()

    def run(state: State, args: dict[str, Any]) -> str:
        for name, person in _people(state, office).items():
            if person["room"] == args["room"]:
                return name
        raise ToolError(f"room {args['room']} of the {place} office is empty")

    usage = Usage(
        lambda rng, state: {"room": rng.choice([person["room"] for person in _people(state, office).values()])},
        (f"find who sits in room {{room}} of the {place} office", f"tell me whose room {{room}} is in {place}",
         f"search the {place} office for the person in room {{room}}",
         f"get the name on the door of {place} room {{room}}"),
        f"the person in {place} room {{room}}", "In room {room} sits {result}.", gives=f"{office}/person",
    )  # fmt: skip
    description = f"Find who sits in a room in {place}."
    return _tool(office, f"find_{office}_person", description, parameters(room="integer"), run, usage)


def _phone(office: str) -> Tool:
    place = office.title()
    usage = Usage(
        _one_person(office),
        (f"find the phone number of {{name}} in the {place} office", f"tell me how to phone {{name}} in {place}",
         f"look up the {place} number of {{name}}", f"get me the line of {{name}} at the {place} office"),
        f"the phone number of {{name}} in {place}", "The number of {name} is {result}.",
        pipe=Pipe("name", f"{office}/person",
                  ("find that person's phone number", "tell me how to phone them", "look up their number",
                   "get me their line")),
        lookup=Lookup("name", f"list_{office}_people"),
    )  # fmt: skip
    return _tool(
        office, f"get_{office}_phone", f"Phone number of a person in {place}.", parameters(name="string"),
        lambda state, args: _person(state, office, args["name"])["phone"], usage,
    )  # fmt: skip


def _sender(office: str) -> Tool:
    place = office.title()

    def run(state: State, args: dict[str, Any]) -> str:
        _person(state, office, args["name"])[f"{args['priority']} message"] = args["text"]
        return f"sent to {args['name']}"

    def sample(rng: Random, state: State) -> dict[str, Any]:
        return _one_person(office)(rng, state) | {
            "text": phrase(rng),
            "priority": rng.choice(("low", "normal", "high")),
        }

    usage = Usage(
        sample,
        (f'send {{name}} in {place} the message "{{text}}" with {{priority}} priority',
         f'write "{{text}}" to {{name}} of the {place} office, {{priority}} priority',
         f'message {{name}} at the {place} office: "{{text}}" ({{priority}} priority)',
         f'let {{name}} from {place} know "{{text}}" at {{priority}} priority'),
        f"to send a {{priority}} priority message to {{name}} in {place}", "The message to {name} is sent.",
        pipe=Pipe("name", f"{office}/person",
                  ('send that person "{text}" with {priority} priority', 'write "{text}" to them, {priority} priority',
                   'message them "{text}" ({priority} priority)', 'let them know "{text}" at {priority} priority')),
        lookup=Lookup("name", f"list_{office}_people"),
    )  # fmt: skip
    schema = parameters(name="string", text="string", priority="low|normal|high")
    return _tool(office, f"send_{office}_message", f"Send a message to someone in {place}.", schema, run, usage)


def _inbox(office: str) -> Tool:
    place = office.title()
    usage = Usage(
        _one_person(office),
        (f"read the last note from {{name}} in the {place} office", f"tell me what {{name}} in {place} wrote last",
         f"open the newest note by {{name}} from {place}", f"get the latest words of {{name}} at the {place} office"),
        f"the last note of {{name}} in {place}", "{name} wrote: {result}",
        gives="text",
        pipe=Pipe("name", f"{office}/person",
                  ("read that person's last note", "tell me what they wrote last", "open their newest note",
                   "get their latest words")),
        lookup=Lookup("name", f"list_{office}_people"),
    )  # fmt: skip
    return _tool(
        office, f"read_{office}_note", f"Last note of a person in {place}.", parameters(name="string"),
        lambda state, args: _person(state, office, args["name"])["note"], usage,
    )  # fmt: skip
