"""Arithmetic: stateless tools on numbers, whose results other tools of every family can be chained into."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from random import Random
from typing import Any

from torchtune_agent.toolworld.tool import Pipe, Tool, ToolError, Usage, parameters, tidy

FAMILY = "arithmetic"
Asks = tuple[str, str, str, str]


def groups() -> list[list[Tool]]:
    return [_basic(), _whole(), _lists(), _shares()]


def _tool(
    group: str,
    name: str,
    description: str,
    schema: dict[str, Any],
    compute: Callable[..., Any],
    sample: Callable[[Random], dict[str, Any]],
    asks: Asks,
    goal: str,
    reply: str,
    pipe: tuple[str, Asks] | None = None,
    gives: str = "number",
) -> Tool:
    usage = Usage(
        sample=lambda rng, state: sample(rng),
        asks=asks,
        goal=goal,
        reply=reply,
        gives=gives,
        pipe=Pipe(pipe[0], "number", pipe[1]) if pipe else None,
    )
    return Tool(name, description, schema, FAMILY, group, "numbers", lambda state, args: compute(**args), usage)


def _two_numbers(rng: Random) -> dict[str, Any]:
    return {"a": _number(rng), "b": _number(rng)}


def _two_integers(rng: Random) -> dict[str, Any]:
    return {"a": rng.randint(10, 999), "b": rng.randint(2, 60)}


def _several_numbers(rng: Random) -> dict[str, Any]:
    return {"values": [_number(rng) for _ in range(rng.randint(3, 4))]}


def _number(rng: Random) -> float:
    return rng.randint(2, 400) if rng.random() < 0.7 else round(rng.uniform(1, 100), 1)


def _divide(a: float, b: float) -> float:
    if b == 0:
        raise ToolError("cannot divide by zero")
    return tidy(a / b)


def _remainder(a: int, b: int) -> int:
    if b == 0:
        raise ToolError("cannot divide by zero")
    return a % b


def _factorial(n: int) -> int:
    if not 0 <= n <= 15:
        raise ToolError("n must be from 0 to 15")
    return math.factorial(n)


def _is_prime(n: int) -> bool:
    if n > 10**8:
        raise ToolError("n must be at most 100000000")
    return n > 1 and all(n % divisor for divisor in range(2, math.isqrt(n) + 1))


def _power(base: float, exponent: int) -> float:
    if not 0 <= exponent <= 20:
        raise ToolError("exponent must be from 0 to 20")
    return tidy(base**exponent)


def _square_root(value: float) -> float:
    if value < 0:
        raise ToolError("value must not be negative")
    return tidy(math.sqrt(value))


def _round(value: float, digits: int = 0) -> float:
    if not 0 <= digits <= 10:
        raise ToolError("digits must be from 0 to 10")
    return tidy(round(value, digits))


def _percent_change(old: float, new: float) -> float:
    if old == 0:
        raise ToolError("old must not be zero")
    return tidy((new - old) / old * 100)


def _of_list(compute: Callable[[list[float]], float]) -> Callable[[list[float]], float]:
    def checked(values: list[float]) -> float:
        if not values:
            raise ToolError("values is empty")
        return tidy(compute(values))

    return checked


def _basic() -> list[Tool]:
    schema = parameters(a="number", b="number")
    return [
        _tool(
            "basic", "add_numbers", "Sum of two numbers.", schema, lambda a, b: tidy(a + b), _two_numbers,
            ("add {a} and {b}", "tell me what {a} plus {b} is", "work out {a} + {b}", "compute the sum of {a} and {b}"),
            "the sum of {a} and {b}", "{a} plus {b} is {result}.",
            ("a", ("add {b} to it", "add {b} to the result", "put {b} on top of it", "increase that by {b}")),
        ),
        _tool(
            "basic", "subtract_numbers", "First number minus the second.", schema, lambda a, b: tidy(a - b),
            _two_numbers,
            ("subtract {b} from {a}", "tell me what {a} minus {b} is", "work out {a} - {b}", "take {b} away from {a}"),
            "{a} minus {b}", "{a} minus {b} is {result}.",
            ("a", ("subtract {b} from it", "take {b} off the result", "deduct {b} from it", "lower that by {b}")),
        ),
        _tool(
            "basic", "multiply_numbers", "Product of two numbers.", schema, lambda a, b: tidy(a * b), _two_numbers,
            ("multiply {a} by {b}", "tell me what {a} times {b} is", "work out {a} * {b}", "compute {a} x {b}"),
            "the product of {a} and {b}", "{a} times {b} is {result}.",
            ("a", ("multiply it by {b}", "multiply the result by {b}", "take it {b} times", "scale that by {b}")),
        ),
        _tool(
            "basic", "divide_numbers", "First number divided by the second.", schema, _divide, _two_numbers,
            ("divide {a} by {b}", "tell me what {a} over {b} is", "work out {a} / {b}",
             "find how often {b} goes into {a}"),
            "{a} divided by {b}", "{a} divided by {b} is {result}.",
            ("a", ("divide it by {b}", "divide the result by {b}", "split it by {b}", "cut that into {b} parts")),
        ),
    ]  # fmt: skip


def _whole() -> list[Tool]:
    two = parameters(a="integer", b="integer")
    one = parameters(n="integer")

    def one_integer(low: int, high: int) -> Callable[[Random], dict[str, Any]]:
        return lambda rng: {"n": rng.randint(low, high)}

    return [
        _tool(
            "whole", "find_remainder", "Remainder of a division.", two, _remainder, _two_integers,
            ("find the remainder of {a} divided by {b}", "tell me what is left over when {b} divides {a}",
             "work out {a} modulo {b}", "compute {a} mod {b}"),
            "the remainder of {a} by {b}", "The remainder of {a} by {b} is {result}.",
        ),
        _tool(
            "whole", "greatest_divisor", "Greatest common divisor.", two, lambda a, b: math.gcd(a, b), _two_integers,
            ("find the greatest common divisor of {a} and {b}", "tell me the largest number dividing both {a} and {b}",
             "work out the gcd of {a} and {b}", "compute gcd({a}, {b})"),
            "the greatest common divisor of {a} and {b}", "The greatest common divisor of {a} and {b} is {result}.",
        ),
        _tool(
            "whole", "smallest_multiple", "Least common multiple.", two, lambda a, b: tidy(math.lcm(a, b)),
            _two_integers,
            ("find the least common multiple of {a} and {b}", "tell me the smallest number both {a} and {b} divide",
             "work out the lcm of {a} and {b}", "compute lcm({a}, {b})"),
            "the least common multiple of {a} and {b}", "The least common multiple of {a} and {b} is {result}.",
        ),
        _tool(
            "whole", "compute_factorial", "Factorial of a whole number up to 15.", one, _factorial, one_integer(3, 15),
            ("compute the factorial of {n}", "tell me what {n} factorial is", "work out {n}!", "multiply out 1 to {n}"),
            "the factorial of {n}", "{n} factorial is {result}.",
        ),
        _tool(
            "whole", "check_prime", "Whether a whole number is prime.", one, _is_prime, one_integer(11, 2000),
            ("check whether {n} is prime", "tell me if {n} is a prime number", "test {n} for being prime",
             "decide if {n} has no divisors but 1 and itself"),
            "to know whether {n} is prime", "Is {n} prime: {result}.", gives="",
        ),
        _tool(
            "whole", "sum_digits", "Sum of a number's digits.", one, lambda n: sum(map(int, str(abs(n)))),
            one_integer(100, 99999),
            ("add up the digits of {n}", "tell me the digit sum of {n}", "work out the sum of digits of {n}",
             "total every digit in {n}"),
            "the digit sum of {n}", "The digits of {n} add up to {result}.",
        ),
    ]  # fmt: skip


def _lists() -> list[Tool]:
    schema = parameters(values="number[]")
    rows: list[tuple[str, str, Callable[[list[float]], float], Asks, str]] = [
        ("sum_numbers", "Sum of a list of numbers.", sum,
         ("add up {values}", "tell me the total of {values}", "work out the sum of {values}", "sum {values}"), "sum"),
        ("average_numbers", "Mean of a list of numbers.", statistics.fmean,
         ("average {values}", "tell me the mean of {values}", "work out the average of {values}",
          "compute the mean value of {values}"), "average"),
        ("largest_number", "Largest of a list of numbers.", max,
         ("find the largest of {values}", "tell me the maximum of {values}", "pick the biggest of {values}",
          "say which of {values} is highest"), "maximum"),
        ("smallest_number", "Smallest of a list of numbers.", min,
         ("find the smallest of {values}", "tell me the minimum of {values}", "pick the least of {values}",
          "say which of {values} is lowest"), "minimum"),
        ("median_number", "Median of a list of numbers.", statistics.median,
         ("find the median of {values}", "tell me the middle value of {values}", "work out the median for {values}",
          "compute which value splits {values} in half"), "median"),
        ("spread_numbers", "Largest minus smallest of a list.", lambda values: max(values) - min(values),
         ("find the spread of {values}", "tell me the range of {values}", "work out max minus min of {values}",
          "compute how far apart {values} lie"), "spread"),
    ]  # fmt: skip
    return [
        _tool(
            "lists", name, description, schema, _of_list(compute), _several_numbers, asks,
            f"the {word} of {{values}}", f"The {word} is {{result}}.",
        )
        for name, description, compute, asks, word in rows
    ]  # fmt: skip


def _shares() -> list[Tool]:
    return [
        _tool(
            "shares", "percent_of", "A percentage of a number.", parameters(percent="number", value="number"),
            lambda percent, value: tidy(percent * value / 100),
            lambda rng: {"percent": rng.randint(1, 99), "value": rng.randint(20, 2000)},
            ("find {percent} percent of {value}", "tell me what {percent}% of {value} is",
             "work out {percent} % of {value}", "compute a {percent} percent share of {value}"),
            "{percent} percent of {value}", "{percent} percent of {value} is {result}.",
            ("value", ("find {percent} percent of it", "take {percent} percent of the result",
                       "work out {percent} % of it", "compute a {percent} percent share of that")),
        ),
        _tool(
            "shares", "percent_change", "Change between two numbers in percent.", parameters(old="number",
                                                                                             new="number"),
            _percent_change, lambda rng: {"old": rng.randint(10, 500), "new": rng.randint(10, 500)},
            ("find the percent change from {old} to {new}", "tell me by how many percent {old} changed to become {new}",
             "work out the change in percent when {old} turns into {new}",
             "compute the relative move from {old} to {new}"),
            "the percent change from {old} to {new}", "From {old} to {new} is a change of {result} percent.",
        ),
        _tool(
            "shares", "round_number", "Round a number to some digits.",
            parameters(("digits",), value="number", digits="integer"), _round,
            lambda rng: {"value": round(rng.uniform(1, 999), 4), "digits": rng.randint(1, 3)},
            ("round {value} to {digits} decimals", "tell me {value} rounded to {digits} digits",
             "cut {value} to {digits} decimal places", "give {value} with just {digits} decimals"),
            "{value} with {digits} decimals", "{value} rounded to {digits} decimals is {result}.",
            ("value", ("round it to {digits} decimals", "round the result to {digits} digits",
                       "cut it to {digits} decimal places", "give that with just {digits} decimals")),
        ),
        _tool(
            "shares", "power_number", "A number to a power.", parameters(base="number", exponent="integer"), _power,
            lambda rng: {"base": rng.randint(2, 40), "exponent": rng.randint(2, 6)},
            ("raise {base} to the power {exponent}", "tell me what {base} to the power of {exponent} is",
             "work out {base}^{exponent}", "compute {base} ** {exponent}"),
            "{base} to the power {exponent}", "{base} to the power {exponent} is {result}.",
        ),
        _tool(
            "shares", "square_root", "Square root of a number.", parameters(value="number"), _square_root,
            lambda rng: {"value": rng.randint(2, 2000)},
            ("find the square root of {value}", "tell me the root of {value}", "work out sqrt({value})",
             "compute which number squared gives {value}"),
            "the square root of {value}", "The square root of {value} is {result}.",
            ("value", ("find its square root", "take the root of the result", "work out the square root of it",
                       "compute the root of that")),
        ),
    ]  # fmt: skip
