"""The one exception for mistakes a user can mend.

Its message names the key or file, the value, and the remedy. Recipes print it once, without a
traceback; every other exception is a bug and keeps its traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake in a config, a file or a command line, with the way out of it."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown `word`: the nearest known one, or all of them."""
    choices = sorted(known)
    near = get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(choices)}."
