"""What the assistant said in a conversation, each turn in the context a server would have shown it.

For turn i the context is the rendering of the messages before it with the generation prompt, and the turn's own text is
what the rendering through it adds, to its end-of-turn. A template that rewrites history (Qwen3 drops earlier thinking)
shows a turn differently later on, so its turns make several texts; turns whose context continues the text of the turn
before join it, so that most templates give one text per conversation, and every turn is in exactly one text.

Three things templates do beyond that, and what it means here:
- The generation prompt may open `<think>` where the rendered turn has no thinking (DeepSeek-R1 drops it). What the
  assistant thought is then written as the model had to: right behind the prompt, closed by `</think>`. Of a message
  without thinking, and wherever else the prompt says more than the rendered turn has, the context is what both have in
  common, and the turn is not `as_served`.
- The turn may change what stands before it (gpt-oss drops the analysis before a final answer). The context is as
  served, and the turn's own text is what follows the last generation prompt before its first words.
- What is written only because the conversation ends (an end-of-text token) belongs to no turn.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torchtune_agent.data.chat_template import RenderError, Rendering
from torchtune_agent.data.control_tokens import ControlTokens
from torchtune_agent.data.conversation import Conversation, Role

TrainOn = Literal["all", "last", "explicit"]
History = Literal["as_served", "single"]

THINK, THINK_END = "<think>", "</think>"
_LONGEST_OPENING = 20  # characters: <think> with white space around it
_MAX_ENDINGS = 1000  # remembered for each template: one for every list of tools


@dataclass(frozen=True)
class Source:
    """A marked rendering of the first `num_messages`."""

    text: str
    num_messages: int
    prompt: bool = False


@dataclass(frozen=True)
class Place:
    """A turn in a rendered text: its own words are [start, end), its end-of-turn [end, stop)."""

    message: int
    start: int
    end: int
    stop: int
    as_served: bool
    thinking: bool  # the words begin inside of <think>
    left_out: tuple[str, ...]  # of "content", "reasoning": what is not in the text


@dataclass
class Draft:
    """A text to train on, marked, and the trained turns in it; `tail` is what the template wrote after the last.
    `sources` are the renderings it was made of."""

    text: str
    tail: str = ""
    sources: list[Source] = field(default_factory=list)
    turns: list[Place] = field(default_factory=list)


@dataclass(frozen=True)
class _Ending:
    """How the template ends: `turn` after an assistant's words, `conversation` where nothing follows."""

    turn: str
    conversation: str


def chosen_turns(conversation: Conversation, train_on: TrainOn) -> list[int]:
    """The messages to train; a message's own `train` decides before `train_on` does."""
    turns = [i for i, m in enumerate(conversation.messages) if m.role is Role.ASSISTANT]
    for i, message in enumerate(conversation.messages):
        if message.train and message.role is not Role.ASSISTANT:
            raise RenderError("train_role", f"message {i} has train: true, but only the assistant's can be trained.")
    default = {"all": set(turns), "last": set(turns[-1:]), "explicit": set()}[train_on]
    flags = {i: conversation.messages[i].train for i in turns}
    return [i for i in turns if (i in default if flags[i] is None else flags[i])]


def draft(rendering: Rendering, controls: ControlTokens, chosen: Sequence[int], history: History) -> list[Draft] | None:
    """The texts that train the `chosen` turns, each turn in one of them; None where marking changed a rendering."""
    turns = _Turns(rendering, controls)
    drafts = [turns.in_one_text(chosen)] if history == "single" else turns.as_served(chosen)
    sources = [source for made in drafts for source in made.sources]
    if all(rendering.verified(s.text, s.num_messages, prompt=s.prompt) for s in sources):
        return drafts
    return None


@dataclass(frozen=True)
class _Said:
    """A turn: `context`, then `words` with the end-of-turn (`num_ending` characters), then what else was written."""

    context: str
    words: str
    num_ending: int
    tail: str
    sources: list[Source]
    as_served: bool
    thinking: bool

    def follows(self, other: "_Said") -> bool:
        """Whether the context is one that continues the other turn."""
        return self.context.startswith(other.context) and self.context.startswith(other.words, len(other.context))

    def place(self, message: int, start: int, left_out: tuple[str, ...], *, as_served: bool = True) -> Place:
        stop = start + len(self.words)
        served = as_served and self.as_served
        return Place(message, start, stop - self.num_ending, stop, served, self.thinking, left_out)


class _Turns:
    """The turns of one conversation."""

    def __init__(self, rendering: Rendering, controls: ControlTokens) -> None:
        self._rendering = rendering
        self._controls = controls
        self._marks = rendering.marks
        self._ending = _ending(rendering)

    def as_served(self, chosen: Sequence[int]) -> list[Draft]:
        texts: list[tuple[_Said, list[Place]]] = []  # the last turn of each, and all of them
        for message in chosen:
            said = self._said(message)
            place = said.place(message, len(said.context), self._left_out(message, said.words))
            if texts and said.follows(texts[-1][0]):
                texts[-1] = said, [*texts[-1][1], place]
            else:
                texts.append((said, [place]))
        return [Draft(said.context + said.words, said.tail, said.sources, places) for said, places in texts]

    def in_one_text(self, chosen: Sequence[int]) -> Draft:
        whole = self._rendering.render()
        result = Draft(whole, sources=[Source(whole, len(self._rendering.messages))])
        stop = 0
        for message in chosen:
            said = self._said(message, as_rendered=True)
            start = len(said.context)
            if whole.startswith(said.words, start) and whole.startswith(said.context):
                place = said.place(message, start, self._left_out(message, said.words))
            else:
                place = self._rewritten(whole, message, said, stop)
            result.turns.append(place)
            stop = place.stop
        return result

    def _said(self, message: int, *, as_rendered: bool = False) -> _Said:
        """One turn; with `as_rendered`, only what the template writes of it."""
        served = self._rendering.render(message, prompt=True)
        through = self._rendering.render(message + 1)
        sources = [Source(through, message + 1)]
        if through.startswith(served):
            return self._cut(served, through[len(served) :], sources, as_served=True)
        without_prompt = _num_common(served, self._rendering.render(message))
        common = self._outside_a_token(through, _num_common(served, through))
        if common >= without_prompt:
            thought = "" if as_rendered else self._thought(message, served[common:], through[common:])
            if thought:
                return self._cut(served, thought + through[common:], sources, as_served=True)
            return self._cut(served[:common], through[common:], sources, as_served=False)
        span = self._data_span(message, through, message + 1)
        start = self._after_header(through, served, without_prompt, span[0] if span else len(through))
        if start is None:
            raise RenderError("rewrites", f"chat template: message {message} is not what follows its context.")
        sources.append(Source(served, message, prompt=True))
        return self._cut(served, through[start:], sources, as_served=True)

    def _thought(self, message: int, prompt: str, rest: str) -> str:
        """What a message thought and `</think>`, where the prompt ends in `prompt`, an opened `<think>`, and `rest`,
        what the template wrote of the message, has no thinking."""
        plain = self._marks.plain if self._marks else str
        if plain(prompt).strip() != THINK or THINK_END in plain(rest):
            return ""
        form = self._rendering.messages[message]
        close = self._marks.mark(THINK_END) if self._marks else THINK_END
        if plain(form.get("reasoning_content", "")).strip():
            return form["reasoning_content"].strip("\n") + f"\n{close}\n\n"
        before = plain(form["content"]).rfind(THINK_END)
        thought = form["content"][: max(0, before)].lstrip()
        if plain(thought).startswith(THINK):
            thought = thought[len(THINK) :]
        return thought.lstrip("\n") + close if plain(thought).strip() else ""

    def _after_header(self, text: str, served: str, without_prompt: int, before: int) -> int | None:
        """The end of the last header before position `before` of `text`: of the generation prompt that `served` ends
        with, or, in templates that have none, of what the template wrote last in `served`."""
        header = served[without_prompt:]
        if not header and self._marks is not None:
            ending = re.search(r"\S+\s*$", served[len(self._marks.before_ending(served)) :])
            header = ending[0] if ending else ""
        found = text.rfind(header, 0, before) if header else -1
        return found + len(header) if found >= 0 else None

    def _cut(self, context: str, rest: str, sources: list[Source], *, as_served: bool) -> _Said:
        ending = self._ending
        kept = rest.removesuffix(ending.conversation) if ending.conversation else rest
        words = kept.rstrip()
        if self._marks is not None and words and not self._marks.found_in(words[-1]):
            words = kept  # no end-of-turn in sight, so this white space may be the assistant's
        known = next((t for t in self._controls.specials(self._marks) if words.endswith(t)), "")
        num_ending = len(known) or (len(ending.turn) if ending.turn and words.endswith(ending.turn) else 0)
        return _Said(context, words, num_ending, rest[len(words) :], sources, as_served, self._in_thinking(context))

    def _in_thinking(self, context: str) -> bool:
        """Whether a context ends with an opened `<think>`."""
        end = context[-_LONGEST_OPENING:].rstrip()
        return (self._marks.plain(end) if self._marks else end).endswith(THINK)

    def _outside_a_token(self, text: str, at: int) -> int:
        """`at`, or where the special token or end-of-turn begins that it is inside of: two may begin alike."""
        for token in filter(None, (self._ending.turn, *self._controls.specials(self._marks))):
            for back in range(1, min(len(token), at + 1)):
                if text.startswith(token, at - back):
                    return at - back
        return at

    def _data_span(self, message: int, text: str, stop: int | None) -> tuple[int, int] | None:
        """Where the words of `message` stand in `text`, the rendering of the first `stop` messages: from before its
        first visible character to after its last one. None where it has none."""
        flag = next(chr(c) for c in range(0xE000, 0xF8FF) if not any(chr(c) in text for text in self._rendering.data))
        flagged = self._rendering.flagged(message, flag).render(stop)
        first, last = flagged.find(flag), flagged.rfind(flag)
        if flagged.replace(flag, "") != text:
            raise RenderError("rewrites", f"chat template: cannot tell where it writes message {message}.")
        if first < 0:
            return None
        after = last + 1 - flagged.count(flag)
        # Numbers hold no flag, but are not the template's own either.
        return first, after if self._marks is None else self._marks.end_of_data(text, after)

    def _rewritten(self, whole: str, message: int, said: _Said, after: int) -> Place:
        """A turn that the whole text shows elsewhere or otherwise: from the last header before its words (or from its
        words) through the end-of-turn behind them."""
        if self._marks is None:
            raise RenderError("rewrites", f"chat template: cannot tell where it writes message {message}.")
        span = self._data_span(message, whole, None)
        first, last = span or (len(whole), len(whole))
        served = self._rendering.render(message, prompt=True)
        start = self._after_header(whole, served, _num_common(served, self._rendering.render(message)), first)
        start = first if start is None or start < after else start
        if whole.startswith(said.words, start):
            return said.place(message, start, self._left_out(message, said.words), as_served=False)
        if span is None:
            raise RenderError("rewrites", f"chat template: cannot tell where it writes message {message}.")
        ending = said.words[len(self._marks.before_ending(said.words)) :]
        stop = whole.find(ending, first, last + len(ending)) + len(ending) if ending else last
        if stop < first + len(ending):
            stop = last + next((len(t) for t in self._controls.specials(self._marks) if whole.startswith(t, last)), 0)
        known = next((t for t in self._controls.specials(self._marks) if whole.endswith(t, start, stop)), "")
        left_out = self._left_out(message, whole[start:stop])
        return Place(message, start, stop - len(known), stop, False, self._in_thinking(whole[:start]), left_out)

    def _left_out(self, message: int, words: str) -> tuple[str, ...]:
        """What of the message the template did not write. Calls that would be lost are an error: the turn would be
        trained to say nothing, or something else, where it called a tool."""
        form = self._rendering.messages[message]
        for call in form.get("tool_calls", ()):
            if call["function"]["name"] not in words:
                raise RenderError(
                    "left_out",
                    f"chat template: it does not write message {message}'s call to {call['function']['name']!r}.",
                )
        plain = self._marks.plain if self._marks else str
        parts = {"content": plain(form["content"]), "reasoning": plain(form.get("reasoning_content", ""))}
        # What stands between the marks of the words is in them without marks as well: most often that is all.
        parts = {name: text for name, text in parts.items() if _is_missing(text, words)}
        words = plain(words) if parts else words
        return tuple(name for name, text in parts.items() if _is_missing(text, words))


def _is_missing(text: str, words: str) -> bool:
    parts = re.split("</?think>", text) if "think>" in text else (text,)
    return any(part.strip() not in words for part in parts)


def _ending(rendering: Rendering) -> _Ending:
    """How the template ends with the tools and arguments of this rendering."""
    known = rendering.template.endings
    key = repr((rendering.tools, rendering.arguments, rendering.marks is None or rendering.marks.plane))
    if key not in known:
        if len(known) >= _MAX_ENDINGS:
            known.clear()
        known[key] = _measured_ending(rendering)
    return known[key]


def _measured_ending(rendering: Rendering) -> _Ending:
    """Read off a conversation of two messages with this one's tools. A template that refuses it is taken to write
    nothing where a conversation ends."""
    probe = rendering.of([{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}])
    try:
        open_end, prompted = probe.pieces(1), probe.pieces(1, prompt=True)
        through = probe.render()
    except RenderError:
        return _Ending("", "")
    same = next(
        (i for i, (a, b) in enumerate(zip(open_end, prompted, strict=False)) if a != b),
        min(len(open_end), len(prompted)),
    )
    conversation = "".join(open_end[same:])
    if not through.endswith(conversation):
        conversation = ""
    turn = through.removesuffix(conversation)[through.rfind("Answer") + len("Answer") :]
    return _Ending(turn.rstrip(), conversation)


def _num_common(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a.startswith(b[:middle]) else (low, middle - 1)
    return low
