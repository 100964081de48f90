"""Every tool really runs: valid arguments give results, anything else gives an error text and never an exception."""

from collections import Counter
from random import Random
from typing import Any

from torchtune_agent.toolworld import Environment, ToolWorld
from torchtune_agent.toolworld.families import FAMILIES, ordered_tools
from torchtune_agent.toolworld.tool import MAX_NUMBER

WORLD = ToolWorld(2500)
WRONG = {"string": 5, "integer": 1.5, "number": "one", "boolean": 1, "array": "a", "object": ["a"]}
EXTREME: dict[str, list[Any]] = {
    "string": ["", " ", "x" * 4000, "東京\n🎉", "9999-12-31", "0001-01-01", "{result}", "\ud800"],
    "integer": [0, -1, 1, MAX_NUMBER, -MAX_NUMBER, 7.0],
    "number": [0, -0.0, 1e-300, float(MAX_NUMBER), -MAX_NUMBER, 0.1],
    "boolean": [True, False],
    "array": [[], ["a"], [1, 2.5], [0] * 200],
    "object": [{}, {"a": 1}],
}


def test_every_tool_runs_with_valid_arguments() -> None:
    for tool in WORLD.tools.values():
        successes = 0
        for number in range(3):
            environment = Environment(WORLD.tools, f"run-{number}")
            arguments = tool.usage.sample(Random(f"{tool.name}/{number}"), environment.state)
            text = environment.execute(tool.name, arguments)
            successes += bool(text) and not text.startswith("Error")
        assert successes >= 2, tool.name


def test_every_tool_answers_invalid_arguments_with_an_error() -> None:
    environment = Environment(WORLD.tools, "invalid")
    for tool in WORLD.tools.values():
        good = tool.usage.sample(Random(tool.name), environment.state)
        assert environment.execute(tool.name, good | {"surplus": 1}).startswith("Error: ")
        for name, schema in tool.parameters["properties"].items():
            missing = {key: value for key, value in good.items() if key != name}
            if name in tool.parameters["required"]:
                assert environment.execute(tool.name, missing) == f"Error: missing argument '{name}' for {tool.name}"
            wrong = environment.execute(tool.name, good | {name: WRONG[schema["type"]]})
            assert wrong.startswith(f"Error: argument '{name}' must be"), (tool.name, wrong)
            assert environment.execute(tool.name, good | {name: None}).startswith("Error: ")


def test_extreme_arguments_never_raise() -> None:
    rng = Random("extreme")
    environment = Environment(WORLD.tools, "extreme")
    for tool in ToolWorld(600).tools.values():
        for _ in range(12):
            types = {name: schema["type"] for name, schema in tool.parameters["properties"].items()}
            arguments = {name: rng.choice(EXTREME[kind]) for name, kind in types.items()}
            if types and rng.random() < 0.5:
                # One odd value among good ones gets past the checks of the others.
                arguments = tool.usage.sample(rng, environment.state) | dict([rng.choice(list(arguments.items()))])
            text = environment.execute(tool.name, arguments)
            assert isinstance(text, str) and len(text) < 250_000
    for value in (float("nan"), float("inf"), 10**400, -(10**13)):
        assert environment.execute("add_numbers", {"a": value, "b": 1}) == "Error: argument 'a' is out of range"


def test_unknown_tool_gives_an_error() -> None:
    assert Environment(WORLD.tools, "x").execute("fly_to_moon", {}) == "Error: there is no tool 'fly_to_moon'"


def test_known_results() -> None:
    environment = Environment({tool.name: tool for tool in ordered_tools(0)}, "known")
    expected: list[tuple[str, dict[str, Any], str]] = [
        ("add_numbers", {"a": 2, "b": 0.5}, "2.5"),
        ("divide_numbers", {"a": 1, "b": 0}, "Error: cannot divide by zero"),
        ("compute_factorial", {"n": 5.0}, "120"),
        ("check_prime", {"n": 97}, "true"),
        ("sort_numbers", {}, "Error: there is no tool 'sort_numbers'"),
        ("median_number", {"values": [3, 1, 2]}, "2"),
        ("round_number", {"value": 2.71828, "digits": 2}, "2.72"),
        ("round_number", {"value": 2.71828}, "3"),
        ("add_months", {"date": "2024-01-31", "months": 1}, "2024-02-29"),
        ("next_monday", {"date": "2024-05-27"}, "2024-06-03"),
        ("get_weekday", {"date": "tomorrow"}, "Error: 'tomorrow' is not a date like 2024-05-31"),
        ("add_days", {"date": "2024-01-01", "days": 10**11}, "Error: the date is out of range"),
        ("reverse_text", {"text": "Zoë 🎉"}, "🎉 ëoZ"),
        ("shift_letters", {"text": "xyz É", "shift": 2}, "zab É"),
        ("convert_miles_to_km", {"value": 10}, "16.0934"),
        ("convert_hours_to_minutes", {"value": 2}, "120"),
    ]
    for name, arguments, text in expected:
        assert environment.execute(name, arguments) == text, name


def test_state_changes_are_seen_by_later_calls_only() -> None:
    tools = {tool.name: tool for tool in ordered_tools(0)}
    first, second = Environment(tools, "same"), Environment(tools, "same")
    before = first.execute("list_legal_files", {})
    assert before == second.execute("list_legal_files", {})
    assert first.execute("write_legal_file", {"file": "a.txt", "text": "Zoë"}) == "wrote 3 characters"
    assert first.execute("read_legal_file", {"file": "a.txt"}) == "Zoë"
    assert second.execute("read_legal_file", {"file": "a.txt"}).startswith("Error: no file 'a.txt'")
    assert list(first.state.changes()) == ["legal/files"]
    assert first.execute("delete_legal_file", {"file": "a.txt"}) == "deleted a.txt"
    assert first.state.changes() == {}


def test_names_and_descriptions_are_distinct() -> None:
    tools = ordered_tools(0)
    assert len(tools) >= 2500
    assert len({tool.name for tool in tools}) == len({tool.description for tool in tools}) == len(tools)
    assert all(tool.name.isidentifier() and tool.name == tool.name.lower() for tool in tools)


def test_first_tools_cover_all_families_evenly() -> None:
    counts = Counter(tool.family for tool in ToolWorld(200).tools.values())
    assert set(counts) == set(FAMILIES)
    assert max(counts.values()) - min(counts.values()) <= 9


def test_spec_is_one_compact_line() -> None:
    tools = {tool.name: tool for tool in ordered_tools(0)}
    assert tools["get_bakery_price"].spec() == "get_bakery_price(item: string) - Price of an item at the bakery."
    assert tools["round_number"].spec() == (
        "round_number(value: number, digits?: integer) - Round a number to some digits."
    )
    assert "priority: low|normal|high" in tools["send_oslo_message"].spec()
    assert all("\n" not in tool.spec() and len(tool.spec()) < 160 for tool in tools.values())
