"""The colour and the title of every token class, wherever one is drawn. Imports nothing.

The colours stand out from the page (contrast of 3 to 1 and more) and can be told apart by colour-blind eyes; a test
computes both.
"""

from typing import NamedTuple

# Behind everything drawn
PAGE_LIGHT, PAGE_DARK = "#ffffff", "#16181d"


class ClassLook(NamedTuple):
    title: str
    light: str  # on PAGE_LIGHT
    dark: str  # on PAGE_DARK


# The groups of the metric names in the order they are listed in, then what is outside of every metric.
CLASSES: dict[str, ClassLook] = {
    "overall": ClassLook("overall", "#281f1e", "#e8eef5"),
    "reasoning": ClassLook("reasoning", "#284abe", "#4484f5"),
    "tool_call": ClassLook("tool calls", "#b16400", "#e08a10"),
    "think": ClassLook("thinking", "#2e9ecb", "#3fb8dd"),
    "call_syntax": ClassLook("call syntax", "#889692", "#8f9089"),
    "call_name": ClassLook("tool names", "#520090", "#bb58ba"),
    "arg_name": ClassLook("argument names", "#158665", "#90ddad"),
    "arg_value": ClassLook("argument values", "#aa3525", "#d8452f"),
    "stop": ClassLook("end of turn", "#ae9114", "#e3c24a"),
}
# Tokens by the name of their TokenClass, in lower case
TOKEN_COLOURS: dict[str, ClassLook] = {
    **{name: look for name, look in CLASSES.items() if name not in ("overall", "tool_call")},
    "special": CLASSES["stop"],
    "ignored": ClassLook("not trained", "#6b7280", "#8b93a1"),
}


def css_variables() -> str:
    """A style sheet that has every colour as `--class-NAME`, for the light and the dark page."""
    looks = CLASSES | TOKEN_COLOURS
    light = " ".join(f"--class-{name}: {look.light};" for name, look in looks.items())
    dark = " ".join(f"--class-{name}: {look.dark};" for name, look in looks.items())
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
