"""The answer of the Responses API: its output items, and the events by which they grow."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from jaxpaged.request import CompletionOutput, RequestError, RequestOutput
from jaxpaged_server.logprobs import TokenNames, chat_logprobs
from jaxpaged_server.parts import CALL, REASONING, TEXT, Part, Parts

Event = dict[str, Any]  # as items make them: without the item's id and place, which all of an item's events have


@dataclass
class MessageItem:
    """What the assistant says. logprobs_of: the logprobs of a part, empty if they are not asked for."""

    id: str
    logprobs_of: Callable[[Part], list[dict[str, Any]]]
    text: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    kind: str = TEXT

    def value(self, status: str) -> dict[str, Any]:
        return {"type": "message", "id": self.id, "role": "assistant", "status": status, "content": [self._content()]}

    def _content(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": list(self.logprobs)}

    def begin(self) -> list[Event]:
        return [{"type": "response.content_part.added", "content_index": 0, "part": self._content()}]

    def add(self, part: Part) -> Event:
        new = self.logprobs_of(part)
        self.text += part.text
        self.logprobs += new
        return {"type": "response.output_text.delta", "content_index": 0, "delta": part.text, "logprobs": new}

    def end(self) -> list[Event]:
        text = {"type": "response.output_text.done", "content_index": 0, "text": self.text, "logprobs": self.logprobs}
        return [text, {"type": "response.content_part.done", "content_index": 0, "part": self._content()}]


@dataclass
class ReasoningItem:
    """What the assistant thinks, in the open."""

    id: str
    text: str = ""
    num_tokens: int = 0
    kind: str = REASONING

    def value(self, status: str) -> dict[str, Any]:
        return {"type": "reasoning", "id": self.id, "summary": [], "content": [self._content()], "encrypted_content": None,
                "status": status}  # fmt: skip

    def _content(self) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": self.text}

    def begin(self) -> list[Event]:
        return [{"type": "response.content_part.added", "content_index": 0, "part": self._content()}]

    def add(self, part: Part) -> Event:
        self.text += part.text
        self.num_tokens += len(part.tokens)
        return {"type": "response.reasoning_text.delta", "content_index": 0, "delta": part.text}

    def end(self) -> list[Event]:
        text = {"type": "response.reasoning_text.done", "content_index": 0, "text": self.text}
        return [text, {"type": "response.content_part.done", "content_index": 0, "part": self._content()}]


@dataclass
class CallItem:
    """One function call."""

    id: str
    call_id: str
    name: str
    arguments: str = ""
    kind: str = CALL

    def value(self, status: str) -> dict[str, Any]:
        return {"type": "function_call", "id": self.id, "call_id": self.call_id, "name": self.name, "arguments": self.arguments,
                "status": status}  # fmt: skip

    def begin(self) -> list[Event]:
        return []

    def add(self, part: Part) -> Event:
        self.arguments += part.text
        return {"type": "response.function_call_arguments.delta", "delta": part.text}

    def end(self) -> list[Event]:
        return [{"type": "response.function_call_arguments.done", "name": self.name, "arguments": self.arguments}]


@dataclass
class ResponseAnswer:
    """A response in the making. echo: its fields that repeat the request. top: alternatives a token in the logprobs; None:
    there are none."""

    id: str
    echo: dict[str, Any]
    parts: Parts
    names: TokenNames
    top: int | None
    created: int = field(default_factory=lambda: int(time.time()))
    _items: list[MessageItem | ReasoningItem | CallItem] = field(default_factory=list)
    _is_open: bool = False  # the last item still grows
    _status: str = "in_progress"
    _error: dict[str, str] | None = None
    _usage: dict[str, Any] | None = None
    _numbers: Iterable[int] = field(default_factory=itertools.count)

    def body(self) -> dict[str, Any]:
        """The response object as it is now. Only its last item can be unfinished."""
        cut = "completed" if self._status == "completed" else "in_progress" if self._status == "in_progress" else "incomplete"
        last = len(self._items) - 1
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": self._status,
            "completed_at": int(time.time()) if self._status == "completed" else None, "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "output": [item.value(cut if i == last else "completed") for i, item in enumerate(self._items)],
            "usage": self._usage, **self.echo,
        }  # fmt: skip

    def begin(self) -> list[Event]:
        return self._numbered([self._whole("response.created"), self._whole("response.in_progress")])

    def push(self, output: RequestOutput) -> list[Event]:
        """The events of a DELTA output, or of a FINAL_ONLY one."""
        events: list[Event] = []
        for completion in output.outputs:
            for part in self.parts.push(completion):
                events += self._add(part)
            if completion.finish_reason is not None:
                events += self._finish(output, completion)
        return self._numbered(events)

    def fail(self, error: RequestError) -> list[Event]:
        self._status, self._error = "failed", {"code": "server_error", "message": error.message}
        told = {"type": "error", "code": "server_error", "message": error.message, "param": error.param}
        return self._numbered([told, self._whole("response.failed")])

    # -- events ------------------------------------------------------------------------------------------------------------

    def _numbered(self, events: list[Event]) -> list[Event]:
        return [{**event, "sequence_number": number} for event, number in zip(events, self._numbers)]

    def _whole(self, kind: str) -> Event:
        return {"type": kind, "response": self.body()}

    def _at(self, events: list[Event]) -> list[Event]:
        """Events of the last item."""
        index = len(self._items) - 1
        return [{**event, "item_id": self._items[index].id, "output_index": index} for event in events]

    def _add(self, part: Part) -> list[Event]:
        events: list[Event] = []
        if not self._is_open or part.id is not None or self._items[-1].kind != part.kind:
            events = self._close("completed") + self._open(part)
        return events + self._at([self._items[-1].add(part)])

    def _open(self, part: Part) -> list[Event]:
        item = self._item(part)
        self._items.append(item)
        self._is_open = True
        begun = item.value("in_progress")
        if "content" in begun:
            begun["content"] = []  # its part is added by the next event
        added = {"type": "response.output_item.added", "output_index": len(self._items) - 1, "item": begun}
        return [added, *self._at(item.begin())]

    def _item(self, part: Part) -> MessageItem | ReasoningItem | CallItem:
        if part.kind == TEXT:
            return MessageItem(_new_id("msg"), self._logprobs)
        if part.kind == REASONING:
            return ReasoningItem(_new_id("rs"))
        return CallItem(_new_id("fc"), part.id or "", part.name or "")

    def _logprobs(self, part: Part) -> list[dict[str, Any]]:
        return [] if self.top is None else chat_logprobs(part.tokens, part.entries, self.names, self.top)["content"]

    def _close(self, status: str) -> list[Event]:
        if not self._is_open:
            return []
        self._is_open = False
        item = self._items[-1]
        done = {"type": "response.output_item.done", "output_index": len(self._items) - 1, "item": item.value(status)}
        return [*self._at(item.end()), done]

    def _finish(self, output: RequestOutput, completion: CompletionOutput) -> list[Event]:
        opened = [] if self._items else self._open(Part(TEXT, ""))  # an answer of nothing is a message of nothing
        status = "incomplete" if completion.finish_reason == "length" else "completed"
        closed = self._close(status)
        self._status, self._usage = status, self._count(output)
        return [*opened, *closed, self._whole(f"response.{status}")]

    def _count(self, output: RequestOutput) -> dict[str, Any]:
        prompt, generated = len(output.prompt_token_ids), output.metrics.num_generation_tokens
        reasoning = sum(item.num_tokens for item in self._items if isinstance(item, ReasoningItem))
        return {"input_tokens": prompt, "output_tokens": generated, "total_tokens": prompt + generated,
                "input_tokens_details": {"cached_tokens": output.num_cached_tokens, "cache_write_tokens": 0},
                "output_tokens_details": {"reasoning_tokens": reasoning}}  # fmt: skip


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
