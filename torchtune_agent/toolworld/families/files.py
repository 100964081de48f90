"""Files: virtual folders whose text files can be listed, searched, read, written and deleted."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from torchtune_agent.toolworld.tool import MAX_STRING, Lookup, Pipe, State, Tool, ToolError, Usage, parameters
from torchtune_agent.toolworld.words import distinct, file_name, phrase

FAMILY = "files"
FOLDERS = (
    "legal", "finance", "research", "garden", "travel", "kitchen", "school", "music", "health", "history", "design",
    "sales", "press", "board", "safety", "energy", "climate", "fashion", "sports", "movie", "poetry", "science",
    "robotics",
    "tax", "housing", "family", "festival", "chess", "physics", "biology", "ocean", "space", "theatre", "podcast",
    "archive",
    "museum", "startup", "church", "union", "village",
)  # fmt: skip
NUM_FILES = 4


def groups() -> list[list[Tool]]:
    return [[_lister(name), _reader(name), _finder(name), _counter(name), _writer(name), _adder(name),
             _deleter(name)] for name in FOLDERS]  # fmt: skip


def _files(state: State, folder: str) -> dict[str, str]:
    def make(rng: Random) -> dict[str, Any]:
        return {name: phrase(rng, 3, 6) for name in distinct(rng, file_name, NUM_FILES)}

    return state.table(f"{folder}/files", make)


def _content(state: State, folder: str, name: str) -> str:
    files = _files(state, folder)
    if name not in files:
        raise ToolError(f"no file '{name}' in the {folder} folder")
    return files[name]


def _one_file(folder: str) -> Callable[[Random, State], dict[str, Any]]:
    return lambda rng, state: {"file": rng.choice(list(_files(state, folder)))}


def _tool(
    folder: str,
    name: str,
    description: str,
    schema: dict[str, Any],
    run: Callable[[State, dict[str, Any]], Any],
    usage: Usage,
) -> Tool:
    return Tool(name, description, schema, FAMILY, folder, f"the {folder} folder", run, usage)


def _lookup(folder: str) -> Lookup:
    return Lookup("file", f"list_{folder}_files")


def _lister(folder: str) -> Tool:
    usage = Usage(
        lambda rng, state: {},
        (f"list the {folder} files", f"tell me which files the {folder} folder has",
         f"show what is in the {folder} folder",
         f"name all files kept under {folder}"),
        f"the names of the {folder} files", "The files are {result}.",
    )  # fmt: skip
    return _tool(
        folder, f"list_{folder}_files", f"List the files of the {folder} folder.", parameters(),
        lambda state, args: list(_files(state, folder)), usage,
    )  # fmt: skip


def _reader(folder: str) -> Tool:
    usage = Usage(
        _one_file(folder),
        (f"read {{file}} from the {folder} folder", f"tell me what the {folder} file {{file}} says",
         f"open {{file}} in the {folder} folder", f"show the text kept in {{file}} under {folder}"),
        f"the text of {{file}} in the {folder} folder", "{file} says: {result}",
        gives="text",
        pipe=Pipe("file", f"{folder}/file", ("read it", "tell me what it says", "open it", "show the text kept in it")),
        lookup=_lookup(folder),
    )  # fmt: skip
    return _tool(
        folder, f"read_{folder}_file", f"Read a file of the {folder} folder.", parameters(file="string"),
        lambda state, args: _content(state, folder, args["file"]), usage,
    )  # fmt: skip


def _finder(folder: str) -> Tool:
    def run(state: State, args: dict[str, Any]) -> str:
        for name, content in _files(state, folder).items():
            if args["word"] in content.split():
                return name
        raise ToolError(f"no {folder} file contains '{args['word']}'")

    def sample(rng: Random, state: State) -> dict[str, Any]:
        # A word of one file only, so that there is one right answer; the first words are never an emoji.
        texts = [text.split()[:3] for text in _files(state, folder).values()]
        words = [word for text in _files(state, folder).values() for word in text.split()]
        single = [word for text in texts for word in text if words.count(word) == 1]
        return {"word": rng.choice(single or words)}

    usage = Usage(
        sample,
        (f"find the {folder} file that contains the word {{word}}", f"tell me which {folder} file mentions {{word}}",
         f"search the {folder} folder for {{word}}", f"see where under {folder} the word {{word}} occurs"),
        f"the {folder} file that contains {{word}}", "The word {word} is in {result}.", gives=f"{folder}/file",
    )  # fmt: skip
    description = f"Find the {folder} file with a given word."
    return _tool(folder, f"find_{folder}_file", description, parameters(word="string"), run, usage)


def _counter(folder: str) -> Tool:
    usage = Usage(
        _one_file(folder),
        (f"count the words of {{file}} in the {folder} folder",
         f"tell me how many words the {folder} file {{file}} has",
         f"work out the word count of {{file}} in the {folder} folder", f"measure {{file}} under {folder} in words"),
        f"the number of words in the {folder} file {{file}}", "{file} has {result} words.",
        gives="number",
        pipe=Pipe("file", f"{folder}/file",
                  ("count its words", "tell me how many words it has", "work out its word count",
                   "measure it in words")),
        lookup=_lookup(folder),
    )  # fmt: skip
    return _tool(
        folder, f"count_{folder}_words", f"Count the words of a {folder} file.", parameters(file="string"),
        lambda state, args: len(_content(state, folder, args["file"]).split()), usage,
    )  # fmt: skip


def _writer(folder: str) -> Tool:
    def run(state: State, args: dict[str, Any]) -> str:
        _files(state, folder)[args["file"]] = args["text"]
        return f"wrote {len(args['text'])} characters"

    usage = Usage(
        lambda rng, state: {"file": file_name(rng), "text": phrase(rng)},
        (f'write "{{text}}" to {{file}} in the {folder} folder', f'save the text "{{text}}" as {folder} file {{file}}',
         f'create {{file}} in the {folder} folder saying "{{text}}"', f'keep "{{text}}" under {folder} in {{file}}'),
        f"to write that text to {{file}} in the {folder} folder", "I wrote the text to {file}.",
    )  # fmt: skip
    schema = parameters(file="string", text="string")
    return _tool(folder, f"write_{folder}_file", f"Write a file of the {folder} folder.", schema, run, usage)


def _adder(folder: str) -> Tool:
    def run(state: State, args: dict[str, Any]) -> str:
        longer = f"{_content(state, folder, args['file'])}\n{args['line']}"
        if len(longer) > MAX_STRING:
            raise ToolError(f"{args['file']} is full")
        _files(state, folder)[args["file"]] = longer
        return f"{args['file']} has {longer.count(chr(10)) + 1} lines"

    usage = Usage(
        lambda rng, state: _one_file(folder)(rng, state) | {"line": phrase(rng, 2, 4)},
        (f'add the line "{{line}}" to {{file}} in the {folder} folder',
         f'append "{{line}}" to the {folder} file {{file}}',
         f'extend {{file}} in the {folder} folder by "{{line}}"',
         f'put "{{line}}" at the end of {{file}} under {folder}'),
        f"to add that line to {{file}} in the {folder} folder", "I added the line to {file}.",
        pipe=Pipe("file", f"{folder}/file",
                  ('add the line "{line}" to it', 'append "{line}" to it', 'extend it by "{line}"',
                   'put "{line}" at its end')),
        lookup=_lookup(folder),
    )  # fmt: skip
    schema = parameters(file="string", line="string")
    return _tool(folder, f"add_{folder}_line", f"Add a line to a {folder} file.", schema, run, usage)


def _deleter(folder: str) -> Tool:
    def run(state: State, args: dict[str, Any]) -> str:
        _content(state, folder, args["file"])
        del _files(state, folder)[args["file"]]
        return f"deleted {args['file']}"

    usage = Usage(
        _one_file(folder),
        (f"delete {{file}} from the {folder} folder", f"remove the {folder} file {{file}}",
         f"erase {{file}} in the {folder} folder", f"throw away {{file}} kept under {folder}"),
        f"to delete {{file}} from the {folder} folder", "{file} is deleted.",
        pipe=Pipe("file", f"{folder}/file", ("delete it", "remove it", "erase it", "throw it away")),
        lookup=_lookup(folder),
    )  # fmt: skip
    return _tool(
        folder, f"delete_{folder}_file", f"Delete a file of the {folder} folder.", parameters(file="string"), run, usage
    )
