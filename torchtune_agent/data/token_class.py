"""What a token is: the classes every metric, weight and selection in this package speaks of."""

from enum import IntEnum


class TokenClass(IntEnum):
    """One class per token. A token that covers bytes of several classes takes the highest."""

    IGNORED = 0  # not trained: prompts, headers, tool results, padding
    SPECIAL = 1  # trained, but outside reasoning and calls: the end-of-turn token
    REASONING = 2  # assistant text outside of calls
    THINK = 3  # assistant text inside <think> ... </think>
    CALL_SYNTAX = 4  # <function=, >, <parameter=, </parameter>, </function> and the white space between
    CALL_NAME = 5
    ARG_NAME = 6
    ARG_VALUE = 7


REASONING_CLASSES = (TokenClass.REASONING, TokenClass.THINK)
TOOL_CALL_CLASSES = (TokenClass.CALL_SYNTAX, TokenClass.CALL_NAME, TokenClass.ARG_NAME, TokenClass.ARG_VALUE)

# The groups of the metric names, then the finer classes. "overall" has no prefix in names.
GROUPS: dict[str, tuple[TokenClass, ...]] = {
    "overall": REASONING_CLASSES + TOOL_CALL_CLASSES,
    "reasoning": REASONING_CLASSES,
    "tool_call": TOOL_CALL_CLASSES,
    "think": (TokenClass.THINK,),
    "call_syntax": (TokenClass.CALL_SYNTAX,),
    "call_name": (TokenClass.CALL_NAME,),
    "arg_name": (TokenClass.ARG_NAME,),
    "arg_value": (TokenClass.ARG_VALUE,),
    "stop": (TokenClass.SPECIAL,),
}
