"""The families of tools, and the order in which a world takes tools from them.

A family gives groups of tools that belong together (one shop, one team). A world takes whole groups, always from the
family it has taken fewest tools from, so any prefix covers the families evenly and holds tools that work together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from random import Random

from torchtune_agent.toolworld.families import (
    accounts,
    arithmetic,
    calendars,
    dates,
    files,
    messages,
    orders,
    rankings,
    records,
    text,
    units,
)
from torchtune_agent.toolworld.tool import Tool

FAMILIES: dict[str, Callable[[], list[list[Tool]]]] = {
    arithmetic.FAMILY: arithmetic.groups,
    orders.FAMILY: orders.groups,
    files.FAMILY: files.groups,
    records.FAMILY: records.groups,
    calendars.FAMILY: calendars.groups,
    units.FAMILY: units.groups,
    text.FAMILY: text.groups,
    messages.FAMILY: messages.groups,
    dates.FAMILY: dates.groups,
    accounts.FAMILY: accounts.groups,
    rankings.FAMILY: rankings.groups,
}
# Families that work out an answer from the arguments alone; a capable model could do without them.
STATELESS = frozenset({arithmetic.FAMILY, units.FAMILY, text.FAMILY, dates.FAMILY})


@cache
def _all_groups() -> dict[str, list[list[Tool]]]:
    return {family: groups() for family, groups in FAMILIES.items()}


def ordered_tools(seed: int) -> list[Tool]:
    """Every tool there is, in the order worlds of this seed take them."""
    waiting = {}
    for family, groups in _all_groups().items():
        waiting[family] = list(groups)
        Random(f"{seed}/{family}").shuffle(waiting[family])
    taken = dict.fromkeys(waiting, 0)
    tools: list[Tool] = []
    while waiting:
        family = min(waiting, key=lambda name: taken[name])
        group = waiting[family].pop()
        tools += group
        taken[family] += len(group)
        if not waiting[family]:
            del waiting[family]
    return tools
