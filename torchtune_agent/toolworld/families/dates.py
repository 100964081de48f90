"""Dates: stateless tools on ISO dates, chained by results such as a date or a number of days."""

from __future__ import annotations

import calendar
from collections.abc import Callable
from datetime import date, timedelta
from random import Random
from typing import Any

from torchtune_agent.toolworld.tool import Pipe, Tool, ToolError, Usage, parameters

FAMILY = "dates"
Asks = tuple[str, str, str, str]


def groups() -> list[list[Tool]]:
    return [_moves(), _facts(), _next_days()]


def _tool(
    group: str,
    name: str,
    description: str,
    schema: dict[str, Any],
    compute: Callable[..., Any],
    asks: Asks,
    goal: str,
    reply: str,
    pipe: Asks | None = None,
    gives: str = "date",
) -> Tool:
    usage = Usage(
        sample=lambda rng, state: {key: _draw(rng, key) for key in schema["properties"]},
        asks=asks,
        goal=goal,
        reply=reply,
        gives=gives,
        pipe=Pipe("date", "date", pipe) if pipe else None,
    )

    def run(args: dict[str, Any]) -> Any:
        try:
            return compute(**args)
        except OverflowError as error:
            raise ToolError("the date is out of range") from error

    return Tool(name, description, schema, FAMILY, group, "dates", lambda state, args: run(args), usage)


def _draw(rng: Random, key: str) -> Any:
    if key in ("date", "start", "end"):
        return (date(2024, 1, 1) + timedelta(days=rng.randint(0, 1400))).isoformat()
    return rng.randint(2, 90) if key == "days" else rng.randint(2, 12)


def _parse(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise ToolError(f"'{text}' is not a date like 2024-05-31") from error


def _shift(text: str, days: int) -> str:
    return (_parse(text) + timedelta(days=days)).isoformat()


def _add_months(text: str, months: int) -> str:
    start = _parse(text)
    year, month = divmod(start.year * 12 + start.month - 1 + months, 12)
    if not 1 <= year <= 9999:
        raise ToolError("the date is out of range")
    return date(year, month + 1, min(start.day, calendar.monthrange(year, month + 1)[1])).isoformat()


def _month_end(text: str) -> str:
    day = _parse(text)
    return day.replace(day=calendar.monthrange(day.year, day.month)[1]).isoformat()


def _moves() -> list[Tool]:
    return [
        _tool(
            "moves", "add_days", "Date some days later.", parameters(date="string", days="integer"),
            lambda date, days: _shift(date, days),
            ("find the date {days} days after {date}", "tell me which day is {days} days later than {date}",
             "work out {date} plus {days} days", "count {days} days on from {date}"),
            "the date {days} days after {date}", "{days} days after {date} is {result}.",
            ("find the date {days} days after it", "tell me which day is {days} days later",
             "work out that plus {days} days",
             "count {days} days on from there"),
        ),
        _tool(
            "moves", "subtract_days", "Date some days earlier.", parameters(date="string", days="integer"),
            lambda date, days: _shift(date, -days),
            ("find the date {days} days before {date}", "tell me which day is {days} days earlier than {date}",
             "work out {date} minus {days} days", "count {days} days back from {date}"),
            "the date {days} days before {date}", "{days} days before {date} is {result}.",
            ("find the date {days} days before it", "tell me which day is {days} days earlier",
             "work out that minus {days} days", "count {days} days back from there"),
        ),
        _tool(
            "moves", "add_weeks", "Date some weeks later.", parameters(date="string", weeks="integer"),
            lambda date, weeks: _shift(date, 7 * weeks),
            ("find the date {weeks} weeks after {date}", "tell me which day is {weeks} weeks later than {date}",
             "work out {date} plus {weeks} weeks", "count {weeks} weeks on from {date}"),
            "the date {weeks} weeks after {date}", "{weeks} weeks after {date} is {result}.",
            ("find the date {weeks} weeks after it", "tell me which day is {weeks} weeks later",
             "work out that plus {weeks} weeks", "count {weeks} weeks on from there"),
        ),
        _tool(
            "moves", "add_months", "Date some months later.", parameters(date="string", months="integer"),
            lambda date, months: _add_months(date, months),
            ("find the date {months} months after {date}", "tell me which day is {months} months later than {date}",
             "work out {date} plus {months} months", "count {months} months on from {date}"),
            "the date {months} months after {date}", "{months} months after {date} is {result}.",
        ),
        _tool(
            "moves", "days_between", "Number of days between two dates.", parameters(start="string", end="string"),
            lambda start, end: (_parse(end) - _parse(start)).days,
            ("count the days from {start} to {end}", "tell me how many days lie between {start} and {end}",
             "work out the days between {start} and {end}", "measure how many days {end} is after {start}"),
            "the days from {start} to {end}", "From {start} to {end} is {result} days.", gives="number",
        ),
    ]  # fmt: skip


def _facts() -> list[Tool]:
    rows: list[tuple[str, str, Callable[[date], Any], Asks, Asks | None, str, str, str]] = [
        ("get_weekday", "Day of the week of a date.", lambda day: calendar.day_name[day.weekday()],
         ("find the weekday of {date}", "tell me which day of the week {date} is",
          "work out the day of the week of {date}",
          "say if {date} is a Monday, a Tuesday or what"),
         ("find its weekday", "tell me which day of the week that is", "work out the day of the week",
          "say its weekday name"),
         "the weekday of {date}", "{date} is a {result}.", ""),
        ("get_week_number", "ISO week number of a date.", lambda day: day.isocalendar().week,
         ("find the week number of {date}", "tell me which calendar week {date} is in",
          "work out the ISO week of {date}",
          "say in which week of the year {date} falls"),
         ("find its week number", "tell me its calendar week", "work out its ISO week", "say in which week that falls"),
         "the week number of {date}", "{date} is in week {result}.", "number"),
        ("get_day_of_year", "Number of a date within its year.", lambda day: day.timetuple().tm_yday,
         ("find the day of the year of {date}", "tell me which day of its year {date} is",
          "work out how far into the year {date} is", "number {date} within its year"),
         ("find its day of the year", "tell me which day of the year that is", "work out how far into the year that is",
          "number it within its year"),
         "the day of the year of {date}", "{date} is day {result} of its year.", "number"),
        ("get_month_end", "Last date of the month of a date.", lambda day: _month_end(day.isoformat()),
         ("find the last day of the month of {date}", "tell me when the month of {date} ends",
          "work out the month end for {date}", "give the final date in the month of {date}"),
         ("find the last day of its month", "tell me when that month ends", "work out its month end",
          "give the final date of that month"),
         "the end of the month of {date}", "The month of {date} ends on {result}.", "date"),
        ("count_month_days", "Days in the month of a date.", lambda day: calendar.monthrange(day.year, day.month)[1],
         ("count the days in the month of {date}", "tell me how long the month of {date} is",
          "work out how many days the month of {date} has", "give the length in days of the month of {date}"),
         None, "the days in the month of {date}", "The month of {date} has {result} days.", "number"),
    ]  # fmt: skip
    schema = parameters(date="string")
    return [
        _tool(
            "facts", name, description, schema, lambda date, compute=compute: compute(_parse(date)), asks, goal, reply,
            pipe, gives,
        )
        for name, description, compute, asks, pipe, goal, reply, gives in rows
    ]  # fmt: skip


def _next_days() -> list[Tool]:
    def next_weekday(text: str, weekday: int) -> str:
        return _shift(text, (weekday - _parse(text).weekday() - 1) % 7 + 1)

    return [
        _tool(
            "next days", f"next_{name.lower()}", f"First {name} after a date.", parameters(date="string"),
            lambda date, weekday=weekday: next_weekday(date, weekday),
            (f"find the next {name} after {{date}}", f"tell me when the first {name} after {{date}} is",
             f"work out the {name} that follows {{date}}", f"give the soonest {name} past {{date}}"),
            f"the first {name} after {{date}}", f"The first {name} after {{date}} is {{result}}.",
            (f"find the next {name} after it", f"tell me when the first {name} after that is",
             f"work out the {name} that follows it", f"give the soonest {name} past that"),
        )
        for weekday, name in enumerate(calendar.day_name)
    ]  # fmt: skip
