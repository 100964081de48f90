"""Calendars: teams' events, found by title and moved, read or cancelled by id."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, timedelta
from random import Random
from typing import Any
from zlib import crc32

from torchtune_agent.toolworld.tool import Lookup, Pipe, State, Tool, ToolError, Usage, parameters
from torchtune_agent.toolworld.words import code, distinct, event_title

FAMILY = "calendars"
TEAMS = (
    "alpha", "backend", "brand", "claims", "cloud", "content", "crew", "editor", "events", "export", "factory", "field",
    "growth", "helpdesk", "hiring", "import", "kernel", "lab", "logistics", "mobile", "night_shift", "nurse", "payroll",
    "pilot", "platform", "quality", "rescue", "retail", "scout", "search", "stage", "studio", "supply", "support",
    "survey",
    "test", "trainer", "video", "warehouse", "web",
)  # fmt: skip
NUM_EVENTS = 4


def groups() -> list[list[Tool]]:
    return [
        [_lister(team), _finder(team), _reader(team), _adder(team), _mover(team), _canceller(team)] for team in TEAMS
    ]


def _events(state: State, team: str) -> dict[str, dict[str, Any]]:
    def make(rng: Random) -> dict[str, Any]:
        titles = iter(distinct(rng, event_title, NUM_EVENTS))
        return {
            event_id: {"title": next(titles), "date": _day(rng), "hour": rng.randint(8, 18)}
            for event_id in distinct(rng, code, NUM_EVENTS)
        }

    return state.table(f"{team}/events", make)


def _day(rng: Random) -> str:
    return (date(2025, 1, 1) + timedelta(days=rng.randint(0, 700))).isoformat()


def _event(state: State, team: str, event_id: str) -> dict[str, Any]:
    events = _events(state, team)
    if event_id not in events:
        raise ToolError(f"the {_spoken(team)} team has no event '{event_id}'")
    return events[event_id]


def _spoken(team: str) -> str:
    return team.replace("_", " ")


def _hour(hour: int) -> int:
    if not 0 <= hour <= 23:
        raise ToolError("hour must be from 0 to 23")
    return hour


def _one_event(team: str) -> Callable[[Random, State], dict[str, Any]]:
    return lambda rng, state: {"event_id": rng.choice(list(_events(state, team)))}


def _lookup(team: str) -> Lookup:
    return Lookup("event_id", f"list_{team}_events")


def _tool(
    team: str,
    name: str,
    description: str,
    schema: dict[str, Any],
    run: Callable[[State, dict[str, Any]], Any],
    usage: Usage,
) -> Tool:
    return Tool(name, description, schema, FAMILY, team, f"the {_spoken(team)} team's calendar", run, usage)


def _lister(team: str) -> Tool:
    who = _spoken(team)
    usage = Usage(
        lambda rng, state: {},
        (f"list the event ids of the {who} team", f"tell me which events the {who} team has",
         f"show what the {who} team has planned", f"name all events in the {who} calendar"),
        f"the events of the {who} team", "The events are {result}.",
    )  # fmt: skip
    return _tool(
        team, f"list_{team}_events", f"List the {who} team's event ids.", parameters(),
        lambda state, args: list(_events(state, team)), usage,
    )  # fmt: skip


def _finder(team: str) -> Tool:
    who = _spoken(team)

    def run(state: State, args: dict[str, Any]) -> str:
        for event_id, event in _events(state, team).items():
            if event["title"] == args["title"]:
                return event_id
        raise ToolError(f"the {who} team has no event titled '{args['title']}'")

    usage = Usage(
        lambda rng, state: {"title": rng.choice([event["title"] for event in _events(state, team).values()])},
        (f"find the {who} team's {{title}}", f"tell me the id of the {{title}} of the {who} team",
         f"search the {who} calendar for the {{title}}", f"get the event number the {who} team gave its {{title}}"),
        f"the id of the {who} team's {{title}}", "The {title} is event {result}.", gives=f"{team}/event",
    )  # fmt: skip
    description = f"Find a {who} event id by title."
    return _tool(team, f"find_{team}_event", description, parameters(title="string"), run, usage)


def _reader(team: str) -> Tool:
    who = _spoken(team)
    usage = Usage(
        _one_event(team),
        (f"show event {{event_id}} of the {who} team", f"tell me when the {who} event {{event_id}} is",
         f"open the {who} team's event {{event_id}}", f"read out {{event_id}} from the {who} calendar"),
        f"the details of {who} event {{event_id}}",
        "{event_id} is the {result[title]} on {result[date]} at {result[hour]}:00.",
        pipe=Pipe("event_id", f"{team}/event", ("show its details", "tell me when it is", "open it", "read it out")),
        lookup=_lookup(team),
    )  # fmt: skip
    return _tool(
        team, f"get_{team}_event", f"Title, date and hour of a {who} event.", parameters(event_id="string"),
        lambda state, args: dict(_event(state, team, args["event_id"])), usage,
    )  # fmt: skip


def _adder(team: str) -> Tool:
    who = _spoken(team)

    def run(state: State, args: dict[str, Any]) -> str:
        _hour(args["hour"])
        try:
            date.fromisoformat(args["date"])
        except ValueError as error:
            raise ToolError(f"'{args['date']}' is not a date like 2024-05-31") from error
        # The id follows from the content, so the order of independent calls changes nothing.
        event_id = f"N{crc32(repr(sorted(args.items())).encode()) % 9000 + 1000}"
        _events(state, team)[event_id] = dict(args)
        return event_id

    def sample(rng: Random, state: State) -> dict[str, Any]:
        return {"title": event_title(rng), "date": _day(rng), "hour": rng.randint(8, 18), "private": rng.random() < 0.3}

    usage = Usage(
        sample,
        (f"add a {{title}} for the {who} team on {{date}} at {{hour}}:00 (private: {{private}})",
         f"put a {{title}} into the {who} calendar on {{date}}, {{hour}}:00, private: {{private}}",
         f"schedule a {{title}} with the {who} team, {{date}} at {{hour}}:00, private: {{private}}",
         f"plan a {{title}} on {{date}} from {{hour}}:00 for {who}, private: {{private}}"),
        f"to add a {{title}} on {{date}} to the {who} calendar", "The {title} is on {date}: event {result}.",
    )  # fmt: skip
    schema = parameters(title="string", date="string", hour="integer", private="boolean")
    return _tool(team, f"add_{team}_event", f"Add an event for the {who} team.", schema, run, usage)


def _mover(team: str) -> Tool:
    who = _spoken(team)

    def run(state: State, args: dict[str, Any]) -> str:
        _event(state, team, args["event_id"])["hour"] = _hour(args["hour"])
        return f"{args['event_id']} moved to {args['hour']}:00"

    usage = Usage(
        lambda rng, state: _one_event(team)(rng, state) | {"hour": rng.randint(8, 20)},
        (f"move {who} event {{event_id}} to {{hour}}:00",
         f"let the {who} team's event {{event_id}} start at {{hour}}:00",
         f"shift the {who} event {{event_id}} to {{hour}} o'clock",
         f"reschedule {{event_id}} of {who} for {{hour}}:00"),
        f"to move {who} event {{event_id}} to {{hour}}:00", "Event {event_id} now starts at {hour}:00.",
        pipe=Pipe("event_id", f"{team}/event",
                  ("move it to {hour}:00", "let it start at {hour}:00", "shift it to {hour} o'clock",
                   "reschedule it for {hour}:00")),
        lookup=_lookup(team),
    )  # fmt: skip
    schema = parameters(event_id="string", hour="integer")
    return _tool(team, f"move_{team}_event", f"Move a {who} event to another hour.", schema, run, usage)


def _canceller(team: str) -> Tool:
    who = _spoken(team)

    def run(state: State, args: dict[str, Any]) -> str:
        _event(state, team, args["event_id"])
        del _events(state, team)[args["event_id"]]
        return f"{args['event_id']} cancelled"

    usage = Usage(
        _one_event(team),
        (f"cancel {who} event {{event_id}}", f"call off event {{event_id}} of the {who} team",
         f"drop the {who} event {{event_id}}", f"strike {{event_id}} from the {who} calendar"),
        f"to cancel {who} event {{event_id}}", "Event {event_id} is cancelled.",
        pipe=Pipe("event_id", f"{team}/event", ("cancel it", "call it off", "drop it", "strike it from the calendar")),
        lookup=_lookup(team),
    )  # fmt: skip
    description = f"Cancel an event of the {who} team."
    return _tool(team, f"cancel_{team}_event", description, parameters(event_id="string"), run, usage)
