"""A model's chat template, rendered as `transformers` renders it, in a sandbox.

Templates come with downloaded models and are programs: they run in jinja's immutable sandbox, see plain JSON values
only, and an error in one is a refusal of the conversation with the template's own words. A `Rendering` is one
conversation made ready, of which every beginning can be rendered.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from types import BuiltinMethodType
from typing import Any, Literal

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, new_context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from torchtune_agent.data.beginnings import Beginnings, beginnings, writes_messages_in_one_loop
from torchtune_agent.data.conversation import Conversation, Message, Role, ToolCall
from torchtune_agent.data.loop_memory import (
    MEMORY,
    TOLD_BY_LOOPS,
    LoopMemory,
    Memory,
    RememberingLoop,
    contents_of,
    remember_loops,
)
from torchtune_agent.data.tracing import Marks, call_on_marked, free_marks, mark_literals, strings_in
from torchtune_agent.errors import UserError

# What a template's own code can raise when a conversation is not what it expects.
_TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)


class RenderError(UserError):
    """A conversation that cannot be rendered or must not be trained; `reason` is a short code for a summary."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ChatTemplate:
    """One template, or several by name (`default`, and `tool_use` where the conversation has tools).

    `special_tokens` are the template's variables such as `eos_token`; `date` is what `strftime_now` reads (now).
    """

    def __init__(
        self, source: str | Mapping[str, str], special_tokens: Mapping[str, str], date: datetime | None = None
    ) -> None:
        self._sources = {"default": source} if isinstance(source, str) else dict(source)
        self._special_tokens = special_tokens
        self._date = date
        self._compiled: dict[tuple[str, Marks | None], tuple[Template, dict[str, Any]]] = {}
        self._in_one_loop: dict[str, bool] = {}
        self.endings: dict[str, Any] = {}  # how it ends with which tools, as `served` found out
        self.own_tokens: frozenset[str] | None = None  # the assistant's, as `own_tokens` found out
        for name in self._sources:
            self._compile(name, None)

    def identity(self) -> dict[str, Any]:
        """All that a rendering depends on beside the conversation. A template that may ask for the time says another
        thing every day."""
        asks = any("strftime_now" in source for source in self._sources.values())
        today = (self._date or datetime.now()).date().isoformat() if asks else None
        return {"sources": self._sources, "special_tokens": dict(self._special_tokens), "today": today}

    def pieces(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        arguments: Mapping[str, Any],
        marks: Marks | None = None,
        memory: Memory | None = None,
    ) -> list[str]:
        """The rendered text in the pieces the template wrote it in; `memory` is for other renderings with the same
        tools, arguments and marks."""
        template, constants = self._compile(self._name(tools), marks)
        values = {**constants, **arguments, "messages": messages, "tools": tools}
        values |= {"add_generation_prompt": add_generation_prompt, MEMORY: {} if memory is None else memory}
        try:
            context = new_context(template.environment, None, template.blocks, values, shared=True)
            return list(template.root_render_func(context))
        except _TEMPLATE_ERRORS as error:
            raise _refusal(error, marks) from error

    def beginnings(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        arguments: Mapping[str, Any],
        marks: Marks | None,
    ) -> Beginnings | None:
        """The renderings of every beginning of `messages`; None where each has to be rendered by itself."""
        name = self._name(tools)
        memory: Memory = {}
        self._compile(name, marks)
        if not self._in_one_loop[name]:
            return None
        try:
            return beginnings(
                lambda prompt: self.pieces(messages, tools, prompt, arguments, marks, memory), memory, messages
            )
        except RenderError:
            return None  # which a beginning need not share

    def _name(self, tools: Sequence[Any] | None) -> str:
        name = "tool_use" if tools is not None and "tool_use" in self._sources else "default"
        if name not in self._sources:
            raise UserError(f"chat template: none is named 'default', only {', '.join(sorted(self._sources))}.")
        return name

    def _compile(self, name: str, marks: Marks | None) -> tuple[Template, dict[str, Any]]:
        """A template, and the variables that are the same in every rendering."""
        key = (name, marks)
        if key not in self._compiled:
            environment = _environment(self._date, marks)
            source = self._sources[name]
            try:
                tree = mark_literals(environment, source, marks) if marks else environment.parse(source)
                self._in_one_loop[name] = writes_messages_in_one_loop(tree)
                template = environment.from_string(remember_loops(environment, tree))
            except TemplateError as error:
                raise UserError(f"chat template {name!r}: {error}") from error
            tokens = {k: marks.mark(v) if marks else v for k, v in self._special_tokens.items()}
            self._compiled[key] = template, {**environment.globals, "documents": None, **tokens}
        return self._compiled[key]

    @cached_property
    def wants_text_arguments(self) -> bool:
        """Whether a call's arguments must be given as JSON text: most templates take an object, a few add strings."""

        def renders(arguments: Any) -> bool:
            call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}}
            messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
            try:
                self.pieces(messages, None, False, {})
            except RenderError as error:
                return not isinstance(error.__cause__, TypeError)
            return True

        return not renders({"a": 1}) and renders('{"a": 1}')


def _refusal(error: Exception, marks: Marks | None) -> RenderError:
    """What an error of the template's code is to the user."""
    said = marks.plain(str(error)) if marks else str(error)
    return RenderError("template", f"chat template: {said or type(error).__name__}")


class Rendering:
    """A conversation in the form templates read, and the marks that none of its data holds.

    `mark_own` marks, in what the assistant says and thinks, the tokens that are its own; where there are no marks for
    it, `marks` is None.
    """

    def __init__(
        self,
        template: ChatTemplate,
        conversation: Conversation,
        arguments: Mapping[str, Any],
        *,
        traced: bool = True,
        mark_own: Callable[[str], str] | None = None,
    ) -> None:
        self.template = template
        self.arguments = arguments
        self.tools = conversation.tools or None
        self.messages = [_as_template_message(m, template) for m in conversation.messages]
        self.data = [*strings_in([_without_role(m) for m in self.messages]), *strings_in([self.tools, arguments])]
        self._plain_messages = self.messages
        self.marks = free_marks(self.data, own=mark_own is not None) if traced else None
        self._memory: Memory = {}
        self._plain_memory: Memory = {}
        self._beginnings: Beginnings | None | Literal["not tried"] = "not tried"
        if traced and self.marks is None and mark_own is None:
            raise RenderError("private_use", "the text holds private-use characters of both planes 15 and 16.")
        if mark_own is not None and self.marks is not None:
            self.messages = [_with_own_marks(m, mark_own) for m in self.messages]

    def render(self, stop: int | None = None, *, prompt: bool = False, plain: bool = False) -> str:
        """The first `stop` messages (all), marked unless `plain`; `prompt` adds the generation prompt."""
        if stop and not plain:
            if self._beginnings == "not tried":
                self._beginnings = self.template.beginnings(self.messages, self.tools, self.arguments, self.marks)
            if self._beginnings is not None:
                try:
                    return self._beginnings.render(stop, prompt)
                except _TEMPLATE_ERRORS as error:
                    raise _refusal(error, self.marks) from error
        return "".join(self.pieces(stop, prompt=prompt, plain=plain))

    def pieces(self, stop: int | None = None, *, prompt: bool = False, plain: bool = False) -> list[str]:
        """The same text, in the pieces the template wrote it in."""
        if plain:
            messages, marks, memory = self._plain_messages, None, self._plain_memory
        else:
            messages, marks, memory = self.messages, self.marks, self._memory
        return self.template.pieces(messages[:stop], self.tools, prompt, self.arguments, marks, memory)

    def verified(self, text: str, stop: int | None = None, *, prompt: bool = False) -> bool:
        """Whether `text`, a marked rendering, is the plain one but for the marks."""
        return self.marks is None or self.marks.split(text)[0] == self.render(stop, prompt=prompt, plain=True)

    def of(self, messages: list[dict[str, Any]]) -> "Rendering":
        """The same for other messages, which must not hold marks."""
        other = copy.copy(self)
        other.messages = other._plain_messages = messages
        other._beginnings = "not tried"
        return other

    def flagged(self, message: int, flag: str) -> "Rendering":
        """The same with the character `flag` at both ends of every string of one message."""
        words = _flagged(_without_role(self.messages[message]), flag)
        here = {**self.messages[message], **words}
        return self.of([*self.messages[:message], here, *self.messages[message + 1 :]])


def _with_own_marks(message: dict[str, Any], mark_own: Callable[[str], str]) -> dict[str, Any]:
    if message["role"] != Role.ASSISTANT.value:
        return message
    texts = {key: mark_own(message[key]) for key in ("content", "reasoning_content", "thinking") if key in message}
    return {**message, **texts}


def _flagged(value: Any, flag: str) -> Any:
    if isinstance(value, str):
        words = value.strip()
        return value.replace(words, f"{flag}{words}{flag}", 1) if words else value
    if isinstance(value, Mapping):
        own = ("id", "type", "function", "name", "arguments", "content", "thinking", "reasoning_content", "tool_calls")
        return {
            k if k in own else _flagged(k, flag): v if k in ("id", "type") else _flagged(v, flag)
            for k, v in value.items()
        }
    return [_flagged(item, flag) for item in value] if isinstance(value, list) else value


def _as_template_message(message: Message, template: ChatTemplate) -> dict[str, Any]:
    """OpenAI form, without the keys that have no value; reasoning under both names that templates read."""
    form: dict[str, Any] = {} if message.reasoning is None else {"thinking": message.reasoning}
    form |= {"role": message.role.value, "content": message.content}
    if message.reasoning is not None:
        form["reasoning_content"] = message.reasoning
    if message.tool_calls:
        form["tool_calls"] = [_as_template_call(call, template) for call in message.tool_calls]
    optional = {"tool_call_id": message.tool_call_id, "name": message.name}
    return form | {key: value for key, value in optional.items() if value is not None}


def _as_template_call(call: ToolCall, template: ChatTemplate) -> dict[str, Any]:
    arguments: Any = call.arguments
    if not template.wants_text_arguments:
        try:
            arguments = json.loads(call.arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise RenderError("arguments", f"the arguments of a call to {call.name!r} are not JSON: {error}") from error
    function = {"name": call.name, "arguments": arguments}
    return ({} if call.id is None else {"id": call.id}) | {"type": "function", "function": function}


def _without_role(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != "role"}


def _environment(date: datetime | None, marks: Marks | None) -> Environment:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock, LoopMemory]
    )
    environment.marks = marks if marks is not None and marks.own is not None else None
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: (date or datetime.now()).strftime(form)
    return environment


class _Sandbox(ImmutableSandboxedEnvironment):
    """Answers what templates ask most without the checks that let it pass anyway."""

    marks: Marks | None = None  # where data may be marked, too

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict:
            if attribute not in _DICT_ATTRIBUTES:
                return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        elif kind is Namespace:
            value = contents_of(obj).get(attribute)
            if type(value) in (str, int, bool) and not attribute.startswith("_"):
                return value
        elif attribute in _HARMLESS.get(kind, ()):
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        if type(__obj) is BuiltinMethodType and type(__obj.__self__) is str:
            kwargs.pop("_loop_vars", None)  # of jinja's own, for functions that want the context
            kwargs.pop("_block_vars", None)
            if __self.marks is not None and not __obj.__self__.isascii():
                return call_on_marked(__self.marks, __obj, args, kwargs)
            return __obj(*args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)


_DICT_ATTRIBUTES = frozenset(dir(dict))
_HARMLESS: dict[type, frozenset[str]] = {
    str: frozenset(name for name in dir(str) if not name.startswith(("_", "format"))),
    LoopContext: TOLD_BY_LOOPS,
    RememberingLoop: TOLD_BY_LOOPS,
}


class _GenerationBlock(Extension):
    """`{% generation %}` blocks, with which some templates mark the assistant's text: rendered as if not there."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Scope:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As `transformers` has it; jinja's own escapes characters that mean something in HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)
