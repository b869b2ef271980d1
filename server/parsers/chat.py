"""`ChatParser`: the text of a chat's answer, as it comes, to OpenAI deltas."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from jaxpaged.request import RequestError
from jaxpaged_server.parsers.formats import NO_TOOLS, TOOL_PARSERS, ToolFormat, read_answer
from jaxpaged_server.parsers.output import Delta, Message, Output, join
from jaxpaged_server.parsers.reasoning import REASONING_PARSERS, ReasoningFormat, read_reasoning
from jaxpaged_server.parsers.source import Hidden, Reading, Source
from jaxpaged_server.parsers.values import Schemas, schemas_of

F = TypeVar("F", ToolFormat, ReasoningFormat)


class ChatParser:
    """Parses one answer.

    tool_parser, reasoning_parser: keys of TOOL_PARSERS and REASONING_PARSERS; None: such text is content.
    tools: OpenAI tool definitions, for the types of arguments. Calls of tools that are not among them are given too.
    prompt_end: the last characters of the prompt's text: they tell whether the reasoning was begun, or ended, there.
    parallel_tool_calls: False: only the first call is given, later ones are dropped.
    new_id: makes the calls' ids; None: the format's own way.
    special: texts of the tokenizer's special tokens, if the text shows them: those that are no markers are taken out.
    """

    def __init__(
        self,
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
        *,
        tools: Sequence[Mapping] = (),
        prompt_end: str = "",
        parallel_tool_calls: bool = True,
        new_id: Callable[[], str] | None = None,
        special: Collection[str] = (),
    ):
        form, thinks = _formats(tool_parser, reasoning_parser)
        hidden = frozenset(special) - {"", *form.markers, *(thinks.markers if thinks else ())}
        self._hidden = Hidden(hidden) if hidden else None
        self._source, self._out = Source(), Output(new_id or form.new_id, parallel_tool_calls)
        self._reading = self._read(form, thinks, schemas_of(tools), prompt_end)

    def _read(self, form: ToolFormat, thinks: ReasoningFormat | None, schemas: Schemas, prompt_end: str) -> Reading[None]:
        lead = ""
        if thinks:
            lead = yield from read_reasoning(self._source, self._out, thinks, thinks.begins_inside(prompt_end))
        yield from read_answer(self._source, self._out, form, schemas, lead)

    @property
    def num_tool_calls(self) -> int:
        """Calls that have begun."""
        return self._out.num_calls

    def push(self, text: str) -> Delta:
        """What `text` adds; what may yet become a marker or a call comes later. O(length of the text)."""
        self._source.feed(self._hidden.push(text) if self._hidden else text)
        next(self._reading, None)
        return self._out.take()

    def finish(self) -> Delta:
        """What was held back: the text has ended."""
        if self._hidden:
            self._source.feed(self._hidden.push("", ended=True))
        self._source.ended = True
        next(self._reading, None)
        return self._out.take()


def parse(text: str, tool_parser: str | None = None, reasoning_parser: str | None = None, **options) -> Message:
    """The message that a whole text is: the deltas of `ChatParser(..., **options)`, joined."""
    parser = ChatParser(tool_parser, reasoning_parser, **options)
    return join([parser.push(text), parser.finish()])


def opening(tool_parser: str, name: str | None) -> str:
    """The text that forces a call, of the tool `name` or of any (None): goes behind the prompt, and first into the parser."""
    return _named(TOOL_PARSERS, tool_parser, "tool_parser").opening(name)


def end_of_reasoning(reasoning_parser: str | None, prompt_end: str) -> str:
    """The text that ends reasoning which the prompt begins, "" if it does not: goes between the prompt and `opening`."""
    _, thinks = _formats(None, reasoning_parser)
    return f"{thinks.end}\n\n" if thinks and thinks.begins_inside(prompt_end) else ""


def needs_special_tokens(tool_parser: str | None, reasoning_parser: str | None, special: Collection[str] | None = None) -> bool:
    """Whether markers may be lost in text without special tokens.

    special: the texts of the tokenizer's special tokens. With them the answer is exact, without them cautious.
    """
    form, thinks = _formats(tool_parser, reasoning_parser)
    markers = {*form.markers, *(thinks.markers if thinks else ())}
    return bool(markers if special is None else markers & set(special))


def _formats(tool_parser: str | None, reasoning_parser: str | None) -> tuple[ToolFormat, ReasoningFormat | None]:
    return (
        NO_TOOLS if tool_parser is None else _named(TOOL_PARSERS, tool_parser, "tool_parser"),
        None if reasoning_parser is None else _named(REASONING_PARSERS, reasoning_parser, "reasoning_parser"),
    )


def _named(forms: Mapping[str, F], name: str, param: str) -> F:
    if name not in forms:
        raise RequestError(f"{param} must be one of {', '.join(forms)}, got {name!r}.", param)
    return forms[name]
