"""The word pools that the world's data are drawn from, with some non-ASCII text so that bytes are exercised."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

PEOPLE = (
    "Zoë", "Ben", "Ada", "José", "Mia", "Omar", "Søren", "Lena", "Kai", "Ines", "Łukasz", "Ravi", "Nora", "Hugo",
    "Aylin",
    "Chloé", "Tom", "Yuki", "Björn", "Sara", "Amir", "Ewa", "Jonas", "Priya", "Mateo", "Åsa", "Finn", "Leila", "Oskar",
    "Dana", "Iván", "Ruth", "Emil", "Naomi", "Pavel", "Gita", "Said", "Tilda", "Marek", "小林", "Lucía", "Otto", "Vera",
    "Hana", "Noah", "Petra", "Elif", "Rosa", "Sven", "Clara",
)  # fmt: skip
NAME_STARTS = (
    "Vel", "Mar", "Tor", "Bel", "Kan", "Lor", "Sil", "Dun", "Fen", "Gal", "Har", "Ister", "Jar", "Nor", "Ost", "Pel",
    "Quin", "Ros", "Tal", "Wen",
)  # fmt: skip
NAME_ENDS = ("ora", "isk", "moor", "dale", "eth", "ia", "stad", "wick", "holm", "ano", "ück", "é")
RARE_NAMES = ("東京", "São Tomé", "Łódź", "Ñuñoa", "Reykjavík", "Zürich", "Αθήνα", "Київ", "서울", "Tromsø")
ADJECTIVES = (
    "blue", "red", "green", "small", "large", "old", "new", "soft", "round", "white", "black", "silver", "golden",
    "light",
    "heavy", "warm", "thin", "striped", "plain", "bright",
)  # fmt: skip
NOUNS = (
    "lamp", "chair", "rope", "bowl", "scarf", "clock", "basket", "mug", "brush", "mirror", "bag", "kettle", "candle",
    "drum", "ladder", "pillow", "hat", "knife", "jar", "box", "crêpe pan", "piñata", "vase", "torch", "blanket",
    "spoon",
    "helmet", "bell", "stool", "tray",
)  # fmt: skip
TITLES = (
    "budget", "launch", "safety", "hiring", "design", "quarterly", "customer", "training", "planning", "security",
    "press",
    "travel", "product", "data", "kick-off", "Zürich",
)  # fmt: skip
MEETINGS = ("review", "meeting", "call", "workshop", "lunch", "demo", "briefing", "café", "interview", "party 🎉")
FILE_WORDS = (
    "notes", "report", "plan", "budget", "letter", "summary", "agenda", "draft", "minutes", "outline", "guide", "list",
    "schedule", "recipe", "invoice", "memo", "résumé", "log", "index", "survey",
)  # fmt: skip
EXTENSIONS = ("txt", "md", "csv", "log")
TEXT_WORDS = (
    "river", "stone", "apple", "night", "green", "garden", "music", "winter", "cloud", "silver", "naïve", "train",
    "paper",
    "bread", "ocean", "bridge", "tiger", "window", "honey", "forest", "candle", "señor", "orange", "market", "summer",
    "piano", "rocket", "castle", "Öl", "letter", "sugar", "planet", "mountain", "island", "copper", "velvet", "lantern",
    "東京", "café", "thunder",
)  # fmt: skip
EMOJI = ("🙂", "🚀", "✅", "🎉", "☕", "🌧️")


def proper_name(rng: Random) -> str:
    if rng.random() < 0.06:
        return rng.choice(RARE_NAMES)
    return rng.choice(NAME_STARTS) + rng.choice(NAME_ENDS)


def item_name(rng: Random) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def event_title(rng: Random) -> str:
    return f"{rng.choice(TITLES)} {rng.choice(MEETINGS)}"


def file_name(rng: Random) -> str:
    return f"{rng.choice(FILE_WORDS)}_{rng.randint(1, 60)}.{rng.choice(EXTENSIONS)}"


def phrase(rng: Random, shortest: int = 3, longest: int = 5) -> str:
    words: list[str] = rng.sample(TEXT_WORDS, rng.randint(shortest, longest))
    if rng.random() < 0.12:
        words.append(rng.choice(EMOJI))
    return " ".join(words)


def distinct(rng: Random, draw: Callable[[Random], str], count: int) -> list[str]:
    """`count` different values of `draw(rng)`, in the order they came."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(rng)] = None
    return list(found)


def code(rng: Random) -> str:
    """An id such as K417."""
    return f"{rng.choice('ABCDEFGHKLMNPRSTVW')}{rng.randint(100, 999)}"
