"""Unit conversion: one tool for every ordered pair of units of a quantity, so hundreds of easily confused names."""

from __future__ import annotations

from random import Random
from typing import Any

from torchtune_agent.toolworld.tool import Pipe, State, Tool, Usage, parameters, tidy

FAMILY = "units"

# One unit of each name in the quantity's base unit.
QUANTITIES: dict[str, dict[str, float]] = {
    "length": {
        "mm": 0.001, "cm": 0.01, "metres": 1.0, "km": 1000.0, "inches": 0.0254, "feet": 0.3048, "yards": 0.9144,
        "miles": 1609.344, "nautical_miles": 1852.0,
    },
    "mass": {
        "mg": 1e-6, "grams": 0.001, "kg": 1.0, "tonnes": 1000.0, "ounces": 0.028349523125, "pounds": 0.45359237,
        "stones": 6.35029318, "carats": 0.0002,
    },
    "volume": {
        "ml": 0.001, "cl": 0.01, "litres": 1.0, "cubic_metres": 1000.0, "teaspoons": 0.00492892159375,
        "cups": 0.2365882365, "pints": 0.473176473, "gallons": 3.785411784,
    },
    "duration": {
        "ms": 0.001, "seconds": 1.0, "minutes": 60.0, "hours": 3600.0, "days": 86400.0, "weeks": 604800.0,
        "fortnights": 1209600.0,
    },
    "speed": {"kmh": 1 / 3.6, "mps": 1.0, "mph": 0.44704, "knots": 1852 / 3600, "feet_per_second": 0.3048},
    "area": {
        "square_cm": 0.0001, "square_metres": 1.0, "ares": 100.0, "hectares": 10000.0, "square_km": 1e6,
        "square_feet": 0.09290304, "acres": 4046.8564224, "square_miles": 2589988.110336,
    },
    "data": {
        "bytes": 1.0, "kilobytes": 1e3, "megabytes": 1e6, "gigabytes": 1e9, "terabytes": 1e12, "kibibytes": 1024.0,
        "mebibytes": 1048576.0, "gibibytes": 1073741824.0,
    },
    "energy": {
        "joules": 1.0, "kilojoules": 1e3, "megajoules": 1e6, "calories": 4.184, "kilocalories": 4184.0,
        "watt_hours": 3600.0, "kilowatt_hours": 3.6e6,
    },
    "pressure": {"pascals": 1.0, "hectopascals": 100.0, "bar": 1e5, "atmospheres": 101325.0, "psi": 6894.757293168},
    "power": {"watts": 1.0, "kilowatts": 1e3, "megawatts": 1e6, "horsepower": 745.6998715822702},
    "frequency": {"hertz": 1.0, "kilohertz": 1e3, "megahertz": 1e6, "rpm": 1 / 60},
    "angle": {"degrees": 1.0, "turns": 360.0, "arcminutes": 1 / 60, "gradians": 0.9},
}  # fmt: skip


def groups() -> list[list[Tool]]:
    """One group per source unit: small enough that a slice of a world holds whole groups."""
    return [
        [_conversion(quantity, source, target) for target in units if target != source]
        for quantity, units in QUANTITIES.items()
        for source in units
    ]


def _conversion(quantity: str, source: str, target: str) -> Tool:
    units = QUANTITIES[quantity]
    factor = units[source] / units[target]
    # A small unit is asked about in large numbers, so that the result keeps readable digits.
    scale = 1
    while factor * scale < 0.01 and scale < 10**9:
        scale *= 10
    here, there = source.replace("_", " "), target.replace("_", " ")

    def sample(rng: Random, state: State) -> dict[str, Any]:
        value = rng.randint(2, 900) * scale
        return {"value": value + 0.5 if rng.random() < 0.15 else value}

    usage = Usage(
        sample=sample,
        asks=(
            f"convert {{value}} {here} to {there}",
            f"tell me how many {there} {{value}} {here} are",
            f"turn {{value}} {here} into {there}",
            f"express {{value}} {here} in {there}",
        ),
        goal=f"{{value}} {here} in {there}",
        reply=f"{{value}} {here} is {{result}} {there}.",
        gives=target,
        pipe=Pipe(
            "value",
            source,
            (
                f"convert it to {there}",
                f"tell me how many {there} that is",
                f"turn it into {there}",
                f"express that in {there}",
            ),
        ),
    )
    return Tool(
        name=f"convert_{source}_to_{target}",
        description=f"Convert {here} to {there}.",
        parameters=parameters(value="number"),
        family=FAMILY,
        group=f"units of {quantity}",
        topic=f"units of {quantity}",
        run=lambda state, args: tidy(args["value"] * factor),
        usage=usage,
    )
