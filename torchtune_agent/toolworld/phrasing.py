"""How users word their requests, per split, and how results are put into words.

The three splits share no wording: every frame, joint and small-talk line below belongs to one split, and so does every
clause of a tool's `Usage.asks`. A model that only learned the train phrasings shows it on validation and test.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from random import Random
from string import Formatter
from typing import Any

from torchtune_agent.toolworld.words import PEOPLE, code, item_name, proper_name

SPLITS = ("train", "validation", "test")

FRAMES = {
    "train": (
        "Please {do}.", "{Do}.", "Can you {do}?", "I need you to {do}.", "{Do}, please.", "Could you {do} for me?",
        "I would like you to {do}.", "Hi, please {do}.", "Would you {do}?", "Do me a favour and {do}.",
    ),
    "validation": ("Kindly {do}.", "It would help me if you could {do}.", "Next job: {do}."),
    "test": ("Your task is to {do}.", "Right now I want you to {do}.", "One more thing: {do}."),
}  # fmt: skip
SEQUENCES = {
    "train": ("{first}, then {second}", "{first} and then {second}"),
    "validation": ("{first} and after that {second}",),
    "test": ("{first}; next, {second}",),
}
PAIRS = {
    "train": ("{first} and {second}", "{first}, and also {second}"),
    "validation": ("{first}; besides, {second}",),
    "test": ("{first}, plus {second}",),
}
# (user, assistant, what the answer must contain)
SMALL_TALK = {
    "train": (
        ("Hi, I'm {name}!", "Hello {name}, how can I help?", "{name}"),
        ("Good morning, this is {name}.", "Good morning {name}! What can I do for you?", "{name}"),
        ("My dog is called {other} and my cat {name}. What is my cat's name?", "Your cat is called {name}.", "{name}"),
        (
            "The talk moved from room {less} to room {number}. Where is it now?",
            "It is now in room {number}.",
            "{number}",
        ),
        ("I bought a {item} for {name}. Who gets it?", "The {item} is for {name}.", "{name}"),
        ("I paid {number} for the {item}. How much was it?", "You paid {number} for the {item}.", "{number}"),
        ("Thank you, {name} is happy with the {item}!", "I am glad that {name} likes the {item}.", "{name}"),
        ("My code is {code}, not {wrong}. Which code is right?", "The right code is {code}.", "{code}"),
        ("We live in {place} and work in {town}. Where do we live?", "You live in {place}.", "{place}"),
    ),
    "validation": (
        ("Hey there, {name} speaking.", "Hello {name}, what do you need?", "{name}"),
        ("The key is under the {item}. Where did I say it is?", "You said it is under the {item}.", "{item}"),
        ("{name} sits left and {other} right. Who is on the left?", "On the left sits {name}.", "{name}"),
    ),
    "test": (
        ("Nice to meet you, my name is {name}.", "Nice to meet you too, {name}.", "{name}"),
        (
            "Our train leaves from platform {number}, I think. Which one was it?",
            "It was platform {number}.",
            "{number}",
        ),
        ("{name} won and {other} came second. Who came first?", "The winner is {name}.", "{name}"),
    ),
}
DECLINES = (
    "Sorry, I can't do that: none of my tools works with {topic}.",
    "I can't help with {topic}, because none of my tools covers that.",
    "I have no tool for {topic}, so I can't do this. Sorry!",
)
DECLINED = re.compile(r"\b(can't|cannot|can not|unable|not able|no tool|none of my tools|don't have)\b", re.IGNORECASE)


def spoken(value: Any) -> str:
    """A value as people write it in a sentence."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        parts = [spoken(item) for item in value]
        return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)
    if isinstance(value, dict):
        return " and ".join(f"{spoken(count)} of the {name}" for name, count in value.items())
    return str(value)


def fill(template: str, arguments: Mapping[str, Any], result: Any = None) -> str:
    """`template` with arguments and result in words; the fields of a result that is an object can be named."""
    shown = {key: spoken(item) for key, item in result.items()} if isinstance(result, dict) else spoken(result)
    return template.format(**{key: spoken(value) for key, value in arguments.items()}, result=shown)


def facts(template: str, arguments: Mapping[str, Any], result: Any) -> tuple[str, ...]:
    """What an answer must contain: the parts of the result the reply names, or its arguments if it names none."""
    fields = [field for _, field, _, _ in Formatter().parse(template) if field]
    from_result = [field for field in fields if field.startswith("result")]
    if from_result == ["result"] and isinstance(result, list):
        return tuple(spoken(item) for item in result)
    return tuple(fill(f"{{{field}}}", arguments, result) for field in from_result or fields)


def request(
    rng: Random, split: str, clauses: Sequence[tuple[str, Mapping[str, Any]]], joints: Mapping[str, tuple[str, ...]]
) -> tuple[str, str]:
    """The user's text for clauses with their arguments, and its wording: the same text with its blanks unfilled."""
    frame, joint = rng.choice(FRAMES[split]), rng.choice(joints[split])
    text, wording = fill(*clauses[0]), clauses[0][0]
    for template, arguments in clauses[1:]:
        text = joint.format(first=text, second=fill(template, arguments))
        wording = joint.format(first=wording, second=template)
    return _framed(frame, text), _framed(frame, wording)


def ask(rng: Random, split: str, asks: tuple[str, str, str, str]) -> str:
    """One of the clauses that belong to the split."""
    return {"train": asks[rng.randrange(2)], "validation": asks[2], "test": asks[3]}[split]


def small_talk(rng: Random, split: str) -> tuple[str, str, str, str]:
    """A message that needs no tool, its answer, the fact in it, and its wording."""
    user, answer, fact = rng.choice(SMALL_TALK[split])
    name, other = rng.sample(PEOPLE, 2)
    place, town = proper_name(rng), proper_name(rng)
    right, wrong = code(rng), code(rng)
    number = rng.randint(20, 999)
    blanks = {
        "name": name, "other": other, "number": number, "less": number - rng.randint(1, 9), "item": item_name(rng),
        "code": right, "wrong": wrong, "place": place, "town": town,
    }  # fmt: skip
    return user.format(**blanks), answer.format(**blanks), fact.format(**blanks), user


def _framed(frame: str, text: str) -> str:
    # str.format would read the blanks in a wording as its own fields.
    return frame.replace("{do}", text).replace("{Do}", text[0].upper() + text[1:])
