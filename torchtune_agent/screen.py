"""Text that is safe on a terminal. Data, configs and error messages may hold escape sequences that move the cursor,
rename the window, or turn the direction of the text; none of them reaches a screen as it is.
"""

from torchtune_agent.redaction import redacted_text


def printable(text: str) -> str:
    """Text on one line, with everything that could drive a terminal, or not be encoded, written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(text: str) -> str:
    """Text of several lines as it may be printed: made printable line by line, its secrets hidden."""
    return "\n".join(printable(line.expandtabs()) for line in redacted_text(text).split("\n"))
