"""Assistant turns of every call style, written together with the class and the call of every character.

The truth is there before the text is: whoever writes a quote knows that it is syntax. Nothing is parsed here, and
nothing is taken from the package but the TokenClass enum.
"""

import json
import random
from dataclasses import dataclass, field

from torchtune_agent.data.token_class import TokenClass

R, T, S = TokenClass.REASONING, TokenClass.THINK, TokenClass.CALL_SYNTAX
N, A, V = TokenClass.CALL_NAME, TokenClass.ARG_NAME, TokenClass.ARG_VALUE

PROSE = [
    "I look it up.",
    "東京の天気は？",
    "👩‍👩‍👧‍👦 ok",
    "Zoë — déjà vu",
    "a < b > c",
    "{x}",
    "it's 5\" long",
    " [1] ",
    "\\n",
    "\n\n",
]
NAMES = ["add", "get_weather", "検索", "a.b.c", "naïve_tool", "f"]
KEYS = ["a", "city", "größe", "x_1", "鍵"]
STRINGS = [
    "",
    "7",
    "Zoë 👩‍🚀",
    "two\nlines",
    'say "hi"',
    "back\\slash\\",
    "it's",
    "{[(,:)]}",
    "東京, 日本",
    "\\",
    "</parameter",
    "é" * 9,
]


@dataclass
class Written:
    """Text with the class and call of every character."""

    text: str = ""
    kinds: list[TokenClass] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    call: int = -1
    block: int | None = None  # where a block began that has no call yet

    def add(self, text: str, kind: TokenClass) -> "Written":
        self.text += text
        self.kinds += [kind] * len(text)
        self.calls += [self.call if kind > T else -1] * len(text)
        return self

    def open_block(self, opening: str) -> None:
        """What a block begins with belongs to its first call."""
        self.block = len(self.text)
        self.add(opening, S)

    def new_call(self) -> None:
        self.call += 1
        if self.block is not None:
            self.calls[self.block :] = [self.call] * (len(self.text) - self.block)
            self.block = None

    def bytes_of(self) -> tuple[bytes, list[int], list[int]]:
        """The text in UTF-8, and the class and call of every byte."""
        sizes = [len(char.encode()) for char in self.text]
        kinds = [int(kind) for kind, size in zip(self.kinds, sizes, strict=True) for _ in range(size)]
        calls = [call for call, size in zip(self.calls, sizes, strict=True) for _ in range(size)]
        return self.text.encode(), kinds, calls


def _space(rng: random.Random) -> str:
    return rng.choice(["", "", " ", "\n  "])


def _nested(rng: random.Random) -> object:
    deep = [1, {"k": rng.choice(STRINGS)}]
    return rng.choice(
        [{}, [], {"name": "no call"}, {"arguments": {"x": [deep]}}, [["]", "}"]], deep, {"q": '"', "b": "\\"}]
    )


def _json_value(out: Written, rng: random.Random, kind: TokenClass = V) -> None:
    form = rng.randrange(3)
    if form == 0:
        spelled = json.dumps(rng.choice(STRINGS), ensure_ascii=rng.random() < 0.3)
        out.add('"', S).add(spelled[1:-1], kind).add('"', S)
    elif form == 1:
        out.add(rng.choice(["0", "-1.5e9", "true", "null", "42"]), kind)
    else:
        out.add(json.dumps(_nested(rng), ensure_ascii=False), kind)


def _json_object(out: Written, rng: random.Random) -> None:
    """An object of arguments."""
    out.add("{", S)
    for number in range(rng.randrange(4)):
        out.add(("," if number else "") + _space(rng), S)
        out.add('"', S).add(rng.choice(KEYS), A).add('"', S).add(_space(rng) + ":" + _space(rng), S)
        _json_value(out, rng)
        out.add(_space(rng), S)
    out.add("}", S)


def _json_call(out: Written, rng: random.Random) -> None:
    out.new_call()
    name_first, wrapped = rng.random() < 0.8, rng.random() < 0.15
    out.add('{"type": "function", "function": {' if wrapped else "{" + _space(rng), S)

    def name() -> None:
        out.add('"name"' + _space(rng) + ":" + _space(rng) + '"', S).add(rng.choice(NAMES), N).add('"', S)

    def arguments() -> None:
        out.add(f'"{rng.choice(["arguments", "parameters"])}": ', S)
        if rng.random() < 0.1:
            out.add('"', S).add('{\\"a\\": 1}', V).add('"', S)
        else:
            _json_object(out, rng)

    for number, part in enumerate([name, arguments] if name_first else [arguments, name]):
        out.add(", " if number else "", S)
        part()
    if rng.random() < 0.3:
        out.add(', "id": ', S)
        _json_value(out, rng, S)
    out.add(_space(rng) + ("}}" if wrapped else "}"), S)


def _json_list(out: Written, rng: random.Random) -> None:
    out.add("[", S)
    for number in range(rng.randrange(1, 4)):
        out.add("," + _space(rng) if number else "", S)
        _json_call(out, rng)
    out.add("]", S)


def _json_calls(out: Written, rng: random.Random, separators: list[str]) -> None:
    for number in range(rng.randrange(1, 4)):
        out.add(rng.choice(separators) if number else "", S)
        _json_call(out, rng)


def _function(out: Written, rng: random.Random) -> None:
    out.new_call()
    out.add("<function=", S).add(rng.choice(NAMES), N).add(">" + _space(rng), S)
    for _ in range(rng.randrange(3)):
        value = rng.choice([*STRINGS, "<think>", "<function=x>", "\nkept\n"])
        out.add("<parameter=", S).add(rng.choice(KEYS), A).add(">\n", S).add(value, V).add("\n</parameter>\n", S)
    out.add("</function>", S)


def _prose(out: Written, rng: random.Random) -> None:
    out.add(rng.choice(["", *PROSE]), R)
    if rng.random() < 0.3:
        inside = rng.choice([*PROSE, "<function=f></function>", '<tool_call>{"name": "f"}</tool_call>', "<think>"])
        out.add(f"<think>{inside}</think>", T)
    out.add(rng.choice(["", *PROSE]), R)


def xml(out: Written, rng: random.Random) -> None:
    for _ in range(rng.randrange(3)):
        _prose(out, rng)
        _function(out, rng)
    _prose(out, rng)


def tool_call(out: Written, rng: random.Random) -> None:
    for _ in range(rng.randrange(3)):
        _prose(out, rng)
        out.open_block("<tool_call>" + _space(rng))
        form = rng.randrange(3)
        if form == 0:
            for number in range(rng.randrange(1, 3)):
                out.add("\n" if number else "", S)
                _function(out, rng)
        elif form == 1:
            _json_list(out, rng)
        else:
            _json_calls(out, rng, ["", "\n", "; "])
        out.add(_space(rng) + "</tool_call>", S)
    _prose(out, rng)


def _head(out: Written, rng: random.Random) -> None:
    out.add(rng.choice(["", "\n"]), R)
    if rng.random() < 0.3:
        out.add(f"<think>{rng.choice(PROSE)}</think>", T).add("\n\n", R)


def llama3(out: Written, rng: random.Random) -> None:
    form = rng.randrange(4)
    if form == 0:
        _head(out, rng)
        out.open_block("")
        if rng.random() < 0.5:
            return _json_calls(out, rng, ["", "; ", "\n"])
        return _json_list(out, rng)
    _prose(out, rng)
    out.open_block("<|python_tag|>" + _space(rng))
    if form == 1:
        _json_calls(out, rng, ["; "])
    elif form == 2:
        _python_call(out, rng, ".call")
    else:
        out.new_call()
        out.add(rng.choice(["print(1)\nl", "x = [int('0')]\nl.remove(3.6)", "東京 = 1", "[i for i in x]"]), V)


def mistral(out: Written, rng: random.Random) -> None:
    _prose(out, rng)
    for _ in range(rng.randrange(1, 3)):
        out.open_block("[TOOL_CALLS]" + _space(rng))
        if rng.random() < 0.5:
            _json_list(out, rng)
        else:
            out.new_call()
            out.add(rng.choice(NAMES), N).add(rng.choice(["", " ", "[ARGS]", "[CALL_ID]abc[ARGS]"]), S)
            _json_object(out, rng)
        out.add(rng.choice(["", "\n"]), R)


def _python_call(out: Written, rng: random.Random, suffix: str = "") -> None:
    out.new_call()
    out.add(rng.choice(NAMES), N).add(suffix + "(" + rng.choice(["", " "]), S)
    for number in range(rng.randrange(4)):
        out.add(", " if number else "", S)
        if rng.random() < 0.9:
            out.add(rng.choice(KEYS), A).add(rng.choice(["=", " = "]), S)
        if rng.random() < 0.5:
            quote = rng.choice(["'", '"', '"""', "'''"])
            value = rng.choice(STRINGS).replace("\\", "\\\\").replace("'", "\\'").replace('"', '\\"')
            out.add(quote, S).add(value, V).add(quote, S)
        else:
            out.add(
                rng.choice(["1", "-2.5", "True", "[1, (2), {'a': ')'}]", "g(x=1, y=[2])", '"a" + "b"', "x == 1"]), V
            )
        out.add(rng.choice(["", " "]), S)
    out.add(")", S)


def pythonic(out: Written, rng: random.Random) -> None:
    _head(out, rng)
    out.open_block("[" + _space(rng))
    for number in range(rng.randrange(1, 4)):
        out.add(", " if number else "", S)
        _python_call(out, rng)
    out.add(rng.choice(["", ",", " "]) + "]", S).add(rng.choice(["", "\n", " Done."]), R)


def react(out: Written, rng: random.Random) -> None:
    for _ in range(rng.randrange(1, 3)):
        out.add("Thought: " + rng.choice(PROSE).replace("\n", "") + "\n", R)
        out.new_call()
        out.add("Action: ", S).add(rng.choice(NAMES), N)
        form = rng.randrange(3)
        if form == 0:
            out.add("[", S).add(rng.choice(["query", "東京 [1]", "", "who?"]), V).add("]", S)
        else:
            out.add("\nAction Input: ", S)
            if form == 1:
                _json_object(out, rng)
            else:
                out.add(rng.choice(["text", '"quoted"', "東京\nlines", '{"a": }', '{"a": 1} and', "[1]"]), V)
        out.add(rng.choice(["\n", "\n\n"]), R).add(rng.choice(["", "Observation: x\n"]), R)
    out.add(rng.choice(["", "Final Answer: 7"]), R)


def fenced(out: Written, rng: random.Random) -> None:
    for _ in range(rng.randrange(1, 3)):
        out.add(rng.choice(PROSE) + "\n", R)
        if rng.random() < 0.2:
            out.add("```python\nx = 1\n```\n", R)
        out.new_call()
        out.add(rng.choice(["```bash\n", "```\n", "```sh \n"]), S)
        command = rng.choice(["ls -la", "cat <<'E'\nZoë\nE", "echo `date`", "<think>", ""])
        out.add(command, V).add("\n```", S).add("\n", R)


def custom(out: Written, rng: random.Random) -> None:
    """Between <<CALL>> and <<END>>."""
    _prose(out, rng)
    for _ in range(rng.randrange(1, 3)):
        out.open_block("<<CALL>>\n")
        form = rng.randrange(3)
        if form == 0:
            _json_calls(out, rng, ["\n"])
        elif form == 1:
            _function(out, rng)
        else:
            out.new_call()
            out.add(rng.choice(["ls -la", "東京 7", "f(x)"]), V)
        out.add("\n<<END>>", S)
        _prose(out, rng)


WRITERS = {write.__name__: write for write in (xml, tool_call, llama3, mistral, pythonic, react, fenced, custom)}


def written_turn(style: str, rng: random.Random) -> Written:
    out = Written()
    WRITERS[style](out, rng)
    return out
