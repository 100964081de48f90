"""How classes are called and coloured, on the screen and on the page."""

from typing import NamedTuple

from torchtune_agent.data.token_class import TokenClass
from torchtune_agent.metrics.colours import TOKEN_COLOURS

# Of a terminal's 256 colours, behind black text
_TERMINAL = {
    TokenClass.IGNORED: 0,
    TokenClass.SPECIAL: 221,
    TokenClass.REASONING: 153,
    TokenClass.THINK: 80,
    TokenClass.CALL_SYNTAX: 250,
    TokenClass.CALL_NAME: 183,
    TokenClass.ARG_NAME: 115,
    TokenClass.ARG_VALUE: 210,
}


class Look(NamedTuple):
    title: str
    terminal: int


LOOKS = {kind: Look(TOKEN_COLOURS[kind.name.lower()].title, colour) for kind, colour in _TERMINAL.items()}
