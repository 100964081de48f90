"""Accounts: clubs whose members hold points that can be read, added, spent and moved."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from torchtune_agent.toolworld.tool import Lookup, Pipe, State, Tool, ToolError, Usage, parameters
from torchtune_agent.toolworld.words import PEOPLE, code, distinct

FAMILY = "accounts"
CLUBS = (
    "tennis", "chess", "rowing", "judo", "golf", "sailing", "ski", "swim", "hiking", "cycling", "book", "film", "choir",
    "jazz", "dance", "cooking", "garden", "photo", "science", "math", "robot", "drone", "kite", "surf", "dive", "climb",
    "archery", "fencing", "hockey", "rugby", "cricket", "darts", "bridge", "poker", "puzzle", "magic", "circus",
    "museum",
    "cinema", "coffee",
)  # fmt: skip
NUM_MEMBERS = 4


def groups() -> list[list[Tool]]:
    return [[_lister(club), _finder(club), _reader(club), _adder(club), _spender(club), _mover(club)] for club in CLUBS]


def _members(state: State, club: str) -> dict[str, dict[str, Any]]:
    def make(rng: Random) -> dict[str, Any]:
        names = iter(rng.sample(PEOPLE, NUM_MEMBERS))
        return {
            member: {"name": next(names), "points": rng.randint(100, 900)}
            for member in distinct(rng, code, NUM_MEMBERS)
        }

    return state.table(f"{club}/members", make)


def _member(state: State, club: str, member: str) -> dict[str, Any]:
    members = _members(state, club)
    if member not in members:
        raise ToolError(f"the {club} club has no member '{member}'")
    return members[member]


def _one_member(club: str) -> Callable[[Random, State], dict[str, Any]]:
    return lambda rng, state: {"member": rng.choice(list(_members(state, club)))}


def _some_points(club: str) -> Callable[[Random, State], dict[str, Any]]:
    return lambda rng, state: _one_member(club)(rng, state) | {"points": rng.randint(5, 95)}


def _lookup(club: str) -> Lookup:
    return Lookup("member", f"list_{club}_members")


def _change(state: State, club: str, member: str, points: int) -> int:
    account = _member(state, club, member)
    if account["points"] + points < 0:
        raise ToolError(f"member {member} has only {account['points']} points")
    account["points"] += points
    return account["points"]


def _positive(points: int) -> int:
    if points <= 0:
        raise ToolError("points must be positive")
    return points


def _tool(
    club: str,
    name: str,
    description: str,
    schema: dict[str, Any],
    run: Callable[[State, dict[str, Any]], Any],
    usage: Usage,
) -> Tool:
    return Tool(name, description, schema, FAMILY, club, f"the {club} club", run, usage)


def _lister(club: str) -> Tool:
    usage = Usage(
        lambda rng, state: {},
        (f"list the member ids of the {club} club", f"tell me which members the {club} club has",
         f"show everyone in the {club} club", f"name all members of the {club} club"),
        f"the member ids of the {club} club", "The members are {result}.",
    )  # fmt: skip
    return _tool(
        club, f"list_{club}_members", f"List the {club} club's member ids.", parameters(),
        lambda state, args: list(_members(state, club)), usage,
    )  # fmt: skip


def _finder(club: str) -> Tool:
    def run(state: State, args: dict[str, Any]) -> str:
        for member, account in _members(state, club).items():
            if account["name"] == args["name"]:
                return member
        raise ToolError(f"the {club} club has no member named '{args['name']}'")

    usage = Usage(
        lambda rng, state: {"name": rng.choice([account["name"] for account in _members(state, club).values()])},
        (f"find the {club} club's member id of {{name}}", f"tell me under which id {{name}} is in the {club} club",
         f"search the {club} club for {{name}}", f"get the membership number of {{name}} at the {club} club"),
        f"the {club} club id of {{name}}", "{name} is member {result}.", gives=f"{club}/member",
    )  # fmt: skip
    description = f"Find a {club} club member id by name."
    return _tool(club, f"find_{club}_member", description, parameters(name="string"), run, usage)


def _reader(club: str) -> Tool:
    usage = Usage(
        _one_member(club),
        (f"look up the points of {club} club member {{member}}",
         f"tell me how many points {{member}} of the {club} club has",
         f"check the {club} club balance of {{member}}", f"see what {{member}} has collected at the {club} club"),
        f"the points of {club} club member {{member}}", "Member {member} has {result} points.",
        gives="number",
        pipe=Pipe("member", f"{club}/member",
                  ("look up their points", "tell me how many points they have", "check their balance",
                   "see what they collected")),
        lookup=_lookup(club),
    )  # fmt: skip
    return _tool(
        club, f"get_{club}_points", f"Points of a {club} club member.", parameters(member="string"),
        lambda state, args: _member(state, club, args["member"])["points"], usage,
    )  # fmt: skip


def _adder(club: str) -> Tool:
    usage = Usage(
        _some_points(club),
        (f"add {{points}} points to {club} club member {{member}}",
         f"give {{member}} of the {club} club {{points}} points",
         f"credit {{points}} points to {{member}} in the {club} club",
         f"award {{member}} at the {club} club {{points}} points"),
        f"to add {{points}} points to {club} club member {{member}}", "Member {member} now has {result} points.",
        pipe=Pipe("member", f"{club}/member",
                  ("add {points} points to it", "give that member {points} points", "credit {points} points to it",
                   "award that member {points} points")),
        lookup=_lookup(club),
    )  # fmt: skip
    return _tool(
        club, f"add_{club}_points", f"Add points to a {club} club member.", parameters(member="string",
                                                                                       points="integer"),
        lambda state, args: _change(state, club, args["member"], _positive(args["points"])), usage,
    )  # fmt: skip


def _spender(club: str) -> Tool:
    usage = Usage(
        _some_points(club),
        (f"spend {{points}} points of {club} club member {{member}}",
         f"take {{points}} points from {{member}} of the {club} club",
         f"charge {{member}} in the {club} club {{points}} points",
         f"redeem {{points}} points for {{member}} at the {club} club"),
        f"to spend {{points}} points of {club} club member {{member}}", "Member {member} has {result} points left.",
        pipe=Pipe("member", f"{club}/member",
                  ("spend {points} of its points", "take {points} points from that member", "charge it {points} points",
                   "redeem {points} points for that member")),
        lookup=_lookup(club),
    )  # fmt: skip
    return _tool(
        club, f"spend_{club}_points", f"Spend points of a {club} club member.", parameters(member="string",
                                                                                           points="integer"),
        lambda state, args: _change(state, club, args["member"], -_positive(args["points"])), usage,
    )  # fmt: skip


def _mover(club: str) -> Tool:
    def run(state: State, args: dict[str, Any]) -> str:
        _member(state, club, args["receiver"])
        _change(state, club, args["sender"], -_positive(args["points"]))
        _change(state, club, args["receiver"], args["points"])
        return f"{args['points']} points moved"

    def sample(rng: Random, state: State) -> dict[str, Any]:
        sender, receiver = rng.sample(list(_members(state, club)), 2)
        return {"sender": sender, "receiver": receiver, "points": rng.randint(5, 95)}

    usage = Usage(
        sample,
        (f"move {{points}} {club} club points from {{sender}} to {{receiver}}",
         f"let {{sender}} of the {club} club give {{receiver}} {{points}} points",
         f"transfer {{points}} points in the {club} club from {{sender}} to {{receiver}}",
         f"hand {{points}} points of {club} club member {{sender}} over to {{receiver}}"),
        f"to move {{points}} points from {{sender}} to {{receiver}} in the {club} club",
        "{points} points went from {sender} to {receiver}.",
        pipe=Pipe("sender", f"{club}/member",
                  ("move {points} of its points to {receiver}", "let it give {receiver} {points} points",
                   "transfer {points} points from it to {receiver}", "hand {points} of its points over to {receiver}")),
        lookup=Lookup("receiver", f"list_{club}_members"),
    )  # fmt: skip
    schema = parameters(sender="string", receiver="string", points="integer")
    return _tool(club, f"move_{club}_points", f"Move points between {club} club members.", schema, run, usage)
