"""Conversations longer than the model's limit, cut where turns end: windows that keep the system prompt."""

from collections.abc import Callable
from dataclasses import replace

from torchtune_agent.data.conversation import Conversation, Message, Role


def windows(conversation: Conversation, fits: Callable[[Conversation], bool]) -> list[Conversation]:
    """Split into windows of whole turns, each as long as `fits` allows, every turn in exactly one.

    A turn is a user's message with everything up to the next one. A single turn that does not fit is a window
    of its own.
    """
    start = next((i for i, m in enumerate(conversation.messages) if m.role is not Role.SYSTEM), 0)
    system, turns = conversation.messages[:start], _turns(conversation.messages[start:])
    result: list[Conversation] = []
    first = 0
    while first < len(turns):
        last = first + 1
        while last < len(turns) and fits(_window(conversation, system, turns[first : last + 1])):
            last += 1
        result.append(_window(conversation, system, turns[first:last]))
        first = last
    return result


def _turns(messages: list[Message]) -> list[list[Message]]:
    turns: list[list[Message]] = []
    for message in messages:
        if message.role is Role.USER or not turns:
            turns.append([])
        turns[-1].append(message)
    return turns


def _window(conversation: Conversation, system: list[Message], turns: list[list[Message]]) -> Conversation:
    return replace(conversation, messages=[*system, *(message for turn in turns for message in turn)])
