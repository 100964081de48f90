"""Text: stateless tools on strings, whose results have to be copied byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from torchtune_agent.toolworld.tool import Pipe, Tool, ToolError, Usage, parameters
from torchtune_agent.toolworld.words import TEXT_WORDS, phrase

FAMILY = "text"
Asks = tuple[str, str, str, str]


def groups() -> list[list[Tool]]:
    return [_shape(), _count(), _edit()]


def _tool(
    group: str,
    name: str,
    description: str,
    compute: Callable[..., Any],
    asks: Asks,
    goal: str,
    reply: str,
    pipe: Asks | None = None,
    gives: str = "text",
    extra: dict[str, tuple[str, Callable[[Random], Any]]] | None = None,
) -> Tool:
    """`extra` adds parameters beside `text`: name -> (type, how to draw a value).

    Tools whose result is gibberish or long give nothing to a chain: it costs many tokens and is copied again and again.
    """
    more = extra or {}
    usage = Usage(
        sample=lambda rng, state: {"text": phrase(rng)} | {key: draw(rng) for key, (_, draw) in more.items()},
        asks=asks,
        goal=goal,
        reply=reply,
        gives=gives,
        pipe=Pipe("text", "text", pipe) if pipe else None,
    )
    schema = parameters(text="string", **{key: kind for key, (kind, _) in more.items()})
    return Tool(name, description, schema, FAMILY, group, "text", lambda state, args: compute(**args), usage)


def _positive(count: int) -> int:
    if not 1 <= count <= 50:
        raise ToolError("count must be from 1 to 50")
    return count


def _caesar(text: str, shift: int) -> str:
    def shifted(letter: str) -> str:
        if not (letter.isascii() and letter.isalpha()):
            return letter
        first = ord("a") if letter.islower() else ord("A")
        return chr(first + (ord(letter) - first + shift) % 26)

    return "".join(map(shifted, text))


def _shape() -> list[Tool]:
    return [
        _tool(
            "shape", "uppercase_text", "Text in capital letters.", lambda text: text.upper(),
            ('write "{text}" in capitals', 'put "{text}" in upper case', 'capitalise all of "{text}"',
             'show "{text}" with only capital letters'),
            "the text in capitals", "In capitals: {result}",
            ("write it in capitals", "put the result in upper case", "capitalise all of it",
             "show that in capital letters"),
        ),
        _tool(
            "shape", "reverse_text", "Text with its characters reversed.", lambda text: text[::-1],
            ('reverse the text "{text}"', 'spell "{text}" backwards', 'turn "{text}" around letter by letter',
             'write "{text}" from its end to its start'),
            "the text backwards", "Backwards: {result}",
            ("reverse it", "spell the result backwards", "turn it around letter by letter",
             "write that from end to start"),
            gives="",
        ),
        _tool(
            "shape", "reverse_words", "Text with its words in reverse order.",
            lambda text: " ".join(text.split()[::-1]),
            ('reverse the word order of "{text}"', 'put the words of "{text}" in opposite order',
             'list "{text}" last word first', 'flip the order of words in "{text}"'),
            "the words of the text in reverse order", "In reverse word order: {result}",
            ("reverse its word order", "put its words in opposite order", "list it last word first",
             "flip the words of that"),
        ),
        _tool(
            "shape", "sort_words", "Words of a text in alphabetical order.",
            lambda text: " ".join(sorted(text.split())),
            ('sort the words of "{text}"', 'put the words in "{text}" in alphabetical order',
             'order "{text}" from A to Z',
             'alphabetise the words "{text}"'),
            "the sorted words of the text", "Sorted: {result}",
            ("sort its words", "put its words in alphabetical order", "order it from A to Z", "alphabetise that"),
        ),
        _tool(
            "shape", "title_text", "Text with every word capitalised.", lambda text: text.title(),
            ('write "{text}" as a title', 'capitalise each word of "{text}"', 'give "{text}" title case',
             'start every word in "{text}" with a capital'),
            "the text as a title", "As a title: {result}",
            ("write it as a title", "capitalise each word of it", "give it title case",
             "start every word with a capital"),
        ),
        _tool(
            "shape", "hyphenate_words", "Words of a text joined by hyphens.", lambda text: "-".join(text.split()),
            ('join the words of "{text}" with hyphens', 'put hyphens between the words of "{text}"',
             'link "{text}" by hyphens', 'make one hyphenated word of "{text}"'),
            "the text with hyphens", "With hyphens: {result}",
        ),
    ]  # fmt: skip


def _count() -> list[Tool]:
    return [
        _tool(
            "count", "count_words", "Number of words in a text.", lambda text: len(text.split()),
            ('count the words in "{text}"', 'tell me how many words "{text}" has',
             'work out the word count of "{text}"',
             'find the number of words of "{text}"'),
            "the number of words in the text", "There are {result} words.", gives="number",
            pipe=("count its words", "tell me how many words it has", "work out its word count",
                  "find its number of words"),
        ),
        _tool(
            "count", "count_characters", "Number of characters in a text.", lambda text: len(text),
            ('count the characters in "{text}"', 'tell me how many characters "{text}" has',
             'work out the length of "{text}"', 'find the number of characters of "{text}"'),
            "the number of characters in the text", "There are {result} characters.", gives="number",
            pipe=("count its characters", "tell me how many characters it has", "work out its length",
                  "find its number of characters"),
        ),
        _tool(
            "count", "count_vowels", "Number of vowels a, e, i, o, u in a text.",
            lambda text: sum(letter in "aeiou" for letter in text.lower()),
            ('count the vowels in "{text}"', 'tell me how many vowels "{text}" has',
             'work out the vowel count of "{text}"',
             'find the number of vowels of "{text}"'),
            "the number of vowels in the text", "There are {result} vowels.", gives="number",
        ),
        _tool(
            "count", "longest_word", "Longest word of a text.", lambda text: max(text.split(), key=len, default=""),
            ('find the longest word of "{text}"', 'tell me which word in "{text}" is longest',
             'pick the word of most letters from "{text}"', 'name the lengthiest word in "{text}"'),
            "the longest word of the text", "The longest word is {result}.",
            pipe=("find its longest word", "tell me which of its words is longest", "pick its word of most letters",
                  "name its lengthiest word"),
        ),
    ]  # fmt: skip


def _edit() -> list[Tool]:
    return [
        _tool(
            "edit", "repeat_text", "Text repeated some times.", lambda text, count: " ".join([text] * _positive(count)),
            ('repeat "{text}" {count} times', 'write "{text}" {count} times in a row',
             'say "{text}" {count} times over',
             'give {count} copies of "{text}"'),
            "the text {count} times", "{count} times: {result}",
            extra={"count": ("integer", lambda rng: rng.randint(2, 3))}, gives="",
        ),
        _tool(
            "edit", "first_words", "First words of a text.", lambda text,
            count: " ".join(text.split()[: _positive(count)]),
            ('take the first {count} words of "{text}"', 'keep only the first {count} words of "{text}"',
             'cut "{text}" after {count} words', 'give the opening {count} words of "{text}"'),
            "the first {count} words of the text", "The first {count} words: {result}",
            ("take its first {count} words", "keep only its first {count} words", "cut it after {count} words",
             "give the opening {count} words of that"),
            extra={"count": ("integer", lambda rng: rng.randint(2, 3))},
        ),
        _tool(
            "edit", "shift_letters", "Caesar cipher: letters moved along the alphabet.", _caesar,
            ('shift the letters of "{text}" by {shift}', 'encode "{text}" with a Caesar shift of {shift}',
             'move each letter of "{text}" {shift} places', 'cipher "{text}" by {shift} letters'),
            "the text shifted by {shift}", "Shifted: {result}",
            extra={"shift": ("integer", lambda rng: rng.randint(1, 12))}, gives="",
        ),
        _tool(
            "edit", "append_word", "Text with a word added at its end.", lambda text, word: f"{text} {word}",
            ('add the word {word} to the end of "{text}"', 'append {word} to "{text}"', 'finish "{text}" with {word}',
             'put {word} after "{text}"'),
            "the text followed by {word}", "The new text: {result}",
            ("add the word {word} to its end", "append {word} to it", "finish it with {word}", "put {word} after that"),
            extra={"word": ("string", lambda rng: rng.choice(TEXT_WORDS))},
        ),
        _tool(
            "edit", "mask_letter", "Text with a letter replaced by a star.", lambda text, letter: text.replace(letter,
                                                                                                               "*"),
            ('replace every {letter} in "{text}" by a star', 'mask the letter {letter} in "{text}"',
             'put * for each {letter} of "{text}"', 'hide all {letter} in "{text}" by stars'),
            "the text with {letter} masked", "Masked: {result}",
            extra={"letter": ("string", lambda rng: rng.choice("aeiorstnl"))},
        ),
    ]  # fmt: skip
