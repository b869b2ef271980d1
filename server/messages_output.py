"""The answer of the Messages API: its content blocks, and the events by which they grow."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import msgspec

from jaxpaged.request import CompletionOutput, RequestError, RequestOutput
from jaxpaged_server.errors import anthropic_error_body
from jaxpaged_server.parts import CALL, REASONING, TEXT, Part, Parts

Event = dict[str, Any]
SIGNATURE = "unsigned"  # Anthropic signs thoughts; clients that see no signature drop them, so there is one. We check none.


@dataclass
class Block:
    """A content block while it grows: text, thoughts, or the JSON text of a tool's input."""

    kind: str
    id: str = ""
    name: str = ""
    text: str = ""

    def value(self) -> dict[str, Any]:
        if self.kind == TEXT:
            return {"type": "text", "text": self.text, "citations": None}
        if self.kind == REASONING:
            return {"type": "thinking", "thinking": self.text, "signature": SIGNATURE}
        return {"type": "tool_use", "id": self.id, "name": self.name, "input": arguments(self.text)}

    def begun(self) -> dict[str, Any]:
        """What the block begins as: its signature comes at its end."""
        return {**self.value(), "signature": ""} if self.kind == REASONING else self.value()

    def add(self, text: str) -> dict[str, Any]:
        """The delta."""
        self.text += text
        kind, name = {TEXT: ("text_delta", "text"), REASONING: ("thinking_delta", "thinking"),
                      CALL: ("input_json_delta", "partial_json")}[self.kind]  # fmt: skip
        return {"type": kind, name: text}

    def end(self) -> list[dict[str, Any]]:
        """Deltas that end it."""
        return [{"type": "signature_delta", "signature": SIGNATURE}] if self.kind == REASONING else []


@dataclass
class MessageAnswer:
    """A message in the making. num_prompt_tokens: of the whole prompt. shows_thinking: False leaves thinking blocks empty."""

    id: str
    model: str
    parts: Parts
    num_prompt_tokens: int
    shows_thinking: bool = True
    _blocks: list[Block] = field(default_factory=list)
    _is_open: bool = False  # the last block still grows
    _stop: dict[str, Any] = field(default_factory=lambda: {"stop_reason": None, "stop_sequence": None})
    _usage: dict[str, Any] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        content = [block.value() for block in self._blocks]
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content, **self._stop,
                "usage": self._usage}  # fmt: skip

    def begin(self) -> list[Event]:
        self._usage = _usage(self.num_prompt_tokens, 0, 0)
        return [{"type": "message_start", "message": self.body()}, {"type": "ping"}]

    def push(self, output: RequestOutput) -> list[Event]:
        """The events of a DELTA output, or of a FINAL_ONLY one."""
        events: list[Event] = []
        for completion in output.outputs:
            for part in self.parts.push(completion):
                events += self._add(part)
            if completion.finish_reason is not None:
                events += self._finish(output, completion)
        return events

    def fail(self, error: RequestError) -> list[Event]:
        return [anthropic_error_body(error.message, error.status)]

    def _add(self, part: Part) -> list[Event]:
        events: list[Event] = []
        if not self._is_open or part.id is not None or self._blocks[-1].kind != part.kind:
            events = self._close()
            self._blocks.append(Block(part.kind, part.id or "", part.name or ""))
            self._is_open = True
            events.append({"type": "content_block_start", "index": self._last, "content_block": self._blocks[-1].begun()})
        if part.kind == REASONING and not self.shows_thinking:
            return events
        return [*events, self._delta(self._blocks[-1].add(part.text))]

    @property
    def _last(self) -> int:
        return len(self._blocks) - 1

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self._last, "delta": delta}

    def _close(self) -> list[Event]:
        if not self._is_open:
            return []
        self._is_open = False
        return [*map(self._delta, self._blocks[-1].end()), {"type": "content_block_stop", "index": self._last}]

    def _finish(self, output: RequestOutput, completion: CompletionOutput) -> list[Event]:
        closed = self._close()
        called = any(block.kind == CALL for block in self._blocks)
        self._stop = stop(completion, called)
        prompt, generated = len(output.prompt_token_ids), output.metrics.num_generation_tokens
        self._usage = _usage(prompt, output.num_cached_tokens, generated)
        return [*closed, {"type": "message_delta", "delta": self._stop, "usage": self._usage}, {"type": "message_stop"}]


def stop(completion: CompletionOutput, called: bool) -> dict[str, Any]:
    """Why the answer ended, in Anthropic's words."""
    if completion.finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if isinstance(completion.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": completion.stop_reason}
    return {"stop_reason": "tool_use" if called else "end_turn", "stop_sequence": None}


def _usage(prompt: int, cached: int, generated: int) -> dict[str, Any]:
    """Anthropic's input_tokens are those that were not cached."""
    return {"input_tokens": prompt - cached, "output_tokens": generated, "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0}  # fmt: skip


# -- arguments ---------------------------------------------------------------------------------------------------------------


def arguments(text: str) -> dict[str, Any]:
    """The object that JSON text is; of one that breaks off (max_tokens came), the members that are whole."""
    for attempt in (lambda: text, lambda: _closed(text, anywhere=True), lambda: _closed(text, anywhere=False)):
        with contextlib.suppress(msgspec.DecodeError, RecursionError):
            value = msgspec.json.decode(attempt())
            return value if isinstance(value, dict) else {}
    return {}


def _closed(text: str, anywhere: bool) -> str:
    """The text with its open brackets closed: behind its last character, or where the last value was whole for sure (before
    a comma, or behind a bracket that opens)."""
    closing, in_string, escaped = "", False, False
    safe = 0, ""
    for i, character in enumerate(text):
        if in_string:
            in_string = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            in_string = True
        elif character in "{[":
            closing = ("}" if character == "{" else "]") + closing
            safe = i + 1, closing
        elif character in "}]":
            closing = closing[1:]
        elif character == ",":
            safe = i, closing
    return text + closing if anywhere else text[: safe[0]] + safe[1]
