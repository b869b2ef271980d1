"""What a parser gives: OpenAI deltas, and the message that they add up to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple


class ToolCallDelta(NamedTuple):
    """A piece of one call: id and name come once, with its first piece; `arguments` is a fragment of JSON text."""

    index: int
    id: str | None
    name: str | None
    arguments: str


class Delta(NamedTuple):
    """What a piece of text adds. Nothing: `not any(delta)`."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class ToolCall(NamedTuple):
    """arguments: JSON text."""

    id: str
    name: str
    arguments: str


class Message(NamedTuple):
    """A whole answer. content is None beside reasoning or tool calls that are all there is."""

    content: str | None
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]


def join(deltas: Iterable[Delta]) -> Message:
    """The message that the deltas of one answer add up to."""
    deltas = list(deltas)
    content, reasoning = "".join(delta.content for delta in deltas), "".join(delta.reasoning for delta in deltas)
    heads: list[ToolCallDelta] = []
    arguments: list[list[str]] = []
    for piece in (piece for delta in deltas for piece in delta.tool_calls):
        if piece.index == len(heads):
            heads.append(piece)
            arguments.append([])
        arguments[piece.index].append(piece.arguments)
    calls = tuple(ToolCall(head.id or "", head.name or "", "".join(texts)) for head, texts in zip(heads, arguments))
    return Message(content or (None if reasoning or calls else ""), reasoning or None, calls)


class Output:
    """Collects what a grammar finds until the next `take`.

    content, reasoning: lists to append text to. parallel: False drops every call but the first. marked: reasoning or a
    call has begun, so whitespace beside it is no content.
    """

    def __init__(self, new_id: Callable[[], str], parallel: bool = True):
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.marked, self.num_calls = False, 0
        self._new_id, self._parallel, self._dropping = new_id, parallel, False
        self._calls: list[tuple[int, str | None, str | None, list[str]]] = []

    def begin_call(self, name: str) -> None:
        """A call begins, for good; `arguments` are its own until the next one begins."""
        self.marked = True
        self._dropping = self.num_calls > 0 and not self._parallel
        if not self._dropping:
            self._calls.append((self.num_calls, self._new_id(), name, []))
            self.num_calls += 1

    def arguments(self, text: str) -> None:
        """A further fragment of the JSON text of the call's arguments."""
        if self._dropping or not text:
            return
        if not self._calls:
            self._calls.append((self.num_calls - 1, None, None, []))
        self._calls[-1][3].append(text)

    def take(self) -> Delta:
        calls = [ToolCallDelta(index, id, name, "".join(parts)) for index, id, name, parts in self._calls]
        delta = Delta("".join(self.content), "".join(self.reasoning), tuple(calls))
        self.content.clear()
        self.reasoning.clear()
        self._calls.clear()
        return delta
