"""How classes are called and coloured, on the screen and on the page."""

from typing import NamedTuple

from torchtune_agent.data.token_class import TokenClass


class Look(NamedTuple):
    title: str
    light: str  # on a light page
    dark: str  # on a dark page
    terminal: int  # of a terminal's 256 colours, behind black text


LOOKS = {
    TokenClass.IGNORED: Look("not trained", "#6b7280", "#8b93a1", 0),
    TokenClass.SPECIAL: Look("end of turn", "#ae9114", "#e3c24a", 221),
    TokenClass.REASONING: Look("reasoning", "#284abe", "#4484f5", 153),
    TokenClass.THINK: Look("think", "#2e9ecb", "#3fb8dd", 80),
    TokenClass.CALL_SYNTAX: Look("call syntax", "#889692", "#8f9089", 250),
    TokenClass.CALL_NAME: Look("call name", "#520090", "#bb58ba", 183),
    TokenClass.ARG_NAME: Look("arg name", "#158665", "#90ddad", 115),
    TokenClass.ARG_VALUE: Look("arg value", "#aa3525", "#d8452f", 210),
}


def css_variables() -> str:
    """A style sheet that has every colour as `--class-NAME`, for the light and the dark page."""
    light = " ".join(f"--class-{kind.name.lower()}: {look.light};" for kind, look in LOOKS.items())
    dark = " ".join(f"--class-{kind.name.lower()}: {look.dark};" for kind, look in LOOKS.items())
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
