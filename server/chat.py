"""/v1/chat/completions: outputs become messages, with reasoning and tool calls parsed out of the text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxpaged.request import CompletionOutput, RequestOutput
from jaxpaged_server.errors import failed_request
from jaxpaged_server.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from jaxpaged_server.parsers import ChatParser, Delta, ToolCallDelta
from jaxpaged_server.prompting import Prompt
from jaxpaged_server.schemas import ChatRequest
from jaxpaged_server.usage import Usage


@dataclass
class Gathered:
    """What the parser has found so far in one choice."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        self.content += delta.content
        self.reasoning += delta.reasoning
        for piece in delta.tool_calls:
            if piece.index == len(self.calls):
                self.calls.append({"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": ""}})
            self.calls[piece.index]["function"]["arguments"] += piece.arguments


@dataclass
class Choice:
    """One sample as it grows: its parser, and what waits for the next chunk. `pending`: what a forced call began with."""

    parser: ChatParser | None
    pending: Delta = Delta()
    begun: bool = False
    called: bool = False
    tokens: list[int] = field(default_factory=list)  # not yet in a chunk: their text is held back
    entries: list[Any] = field(default_factory=list)

    def push(self, completion: CompletionOutput) -> Delta:
        """What a piece of output adds."""
        self.tokens += completion.token_ids
        self.entries += completion.logprobs or []
        if self.parser is None:
            return Delta(content=completion.text)
        delta, self.pending = joined(self.pending, self.parser.push(completion.text)), Delta()
        if completion.finish_reason is not None:
            delta = joined(delta, self.parser.finish())
        self.called = self.called or bool(delta.tool_calls)
        return delta

    def take(self) -> tuple[list[int], list[Any]]:
        """The tokens since the last chunk and their logprobs."""
        taken = self.tokens, self.entries
        self.tokens, self.entries = [], []
        return taken


def joined(a: Delta, b: Delta) -> Delta:
    return Delta(a.content + b.content, a.reasoning + b.reasoning, (*a.tool_calls, *b.tool_calls))


@dataclass
class Chat:
    """One answer in the making. new_parser: a parser for each sample; None: the text is the content."""

    id: str
    model: str
    body: ChatRequest
    prompt: Prompt
    names: TokenNames
    usage: Usage
    role: str = "assistant"
    new_parser: Callable[[], ChatParser] | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    _choices: dict[int, Choice] = field(default_factory=dict)

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The response to a FINAL_ONLY output, the only one. RequestError (500) if it failed."""
        (output,) = outputs
        if output.error is not None:
            raise failed_request(output.error)
        self.usage.add(0, output)
        choices = [self._message(completion) for completion in output.outputs]
        body = {**self._head("chat.completion"), "choices": choices, "usage": self.usage.body()}
        if output.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if self.body.return_token_ids:
            body["prompt_token_ids"] = output.prompt_token_ids
        if self.body.return_prompt_text:
            body["prompt_text"] = self.prompt.text
        return body

    def chunk(self, prompt: int, output: RequestOutput, usage: bool) -> list[dict[str, Any]]:
        """The chunks of a DELTA output. `prompt`: always 0, a conversation is one prompt."""
        self.usage.add(0, output)
        chunks = []
        for completion in output.outputs:
            choice = self._choice(completion.index)
            if not choice.begun:
                choice.begun = True
                chunks.append(self._first_chunk(completion.index, output))
            made = self._next(choice, completion)
            if made is not None:
                chunks.append(self._chunk(made))
        if usage:
            chunks = [{**chunk, "usage": self.usage.body()} for chunk in chunks]
        return chunks

    def usage_chunk(self) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage.body()}

    # -- parts of an answer ------------------------------------------------------------------------------------------------

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, index: int) -> Choice:
        choice = self._choices.get(index)
        if choice is None:
            parser = self.new_parser() if self.new_parser else None
            choice = self._choices[index] = Choice(parser)
            if parser is not None and self.prompt.forced:
                choice.pending = parser.push(self.prompt.forced)
        return choice

    def _echo(self) -> str:
        """The message that the answer goes on with, for `echo`."""
        content = self.body.messages[-1].get("content") if self.body.echo else ""
        return content if isinstance(content, str) else ""

    def _message(self, completion: CompletionOutput) -> dict[str, Any]:
        choice, gathered = self._choice(completion.index), Gathered(content=self._echo())
        gathered.add(choice.push(completion))
        message: dict[str, Any] = {"role": self.role, "content": gathered.content, "refusal": None, "annotations": None,
                                   "audio": None, "function_call": None}  # fmt: skip
        if gathered.calls:
            message |= {"tool_calls": gathered.calls, "content": gathered.content or None}
        message |= self._reasoning(gathered.reasoning or None)
        return self._finish(choice, completion, {"index": completion.index, "message": message})

    def _first_chunk(self, index: int, output: RequestOutput) -> dict[str, Any]:
        delta = {"role": self.role, "content": self._echo()}
        chunk = self._chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})
        if self.body.return_token_ids:
            chunk["prompt_token_ids"] = output.prompt_token_ids
        if self.body.return_prompt_text:
            chunk["prompt_text"] = self.prompt.text
        return chunk

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _next(self, choice: Choice, completion: CompletionOutput) -> dict[str, Any] | None:
        """The choice of a chunk; None while nothing of it may be shown."""
        found, delta = choice.push(completion), dict[str, Any]()
        if found.content:
            delta["content"] = found.content
        if found.reasoning:
            delta |= self._reasoning(found.reasoning)
        if found.tool_calls:
            delta["tool_calls"] = [_call_piece(piece) for piece in found.tool_calls]
        shows_tokens = self.body.return_token_ids and choice.tokens
        if not delta and not shows_tokens and completion.finish_reason is None:
            return None
        return self._finish(choice, completion, {"index": completion.index, "delta": delta})

    def _reasoning(self, text: str | None) -> dict[str, Any]:
        """Under both names: vLLM's clients read `reasoning`, others `reasoning_content`."""
        if not self.body.include_reasoning:
            return {}
        return {"reasoning": text, "reasoning_content": text}

    def _finish(self, choice: Choice, completion: CompletionOutput, made: dict[str, Any]) -> dict[str, Any]:
        """Adds logprobs, tokens and the reason of the end."""
        tokens, entries = choice.take()
        wanted = self.body.logprobs and tokens
        made["logprobs"] = chat_logprobs(tokens, entries, self.names, self.body.top_logprobs) if wanted else None
        made["finish_reason"] = self._reason(choice, completion.finish_reason)
        if completion.finish_reason is not None:
            made["stop_reason"] = completion.stop_reason
        if self.body.return_token_ids:
            made["token_ids"] = tokens
        return made

    def _reason(self, choice: Choice, reason: str | None) -> str | None:
        """OpenAI says "tool_calls" where the model chose to call, "stop" where it was told which function to call."""
        named = isinstance(self.body.tool_choice, dict)
        return "tool_calls" if reason == "stop" and choice.called and not named else reason


def _call_piece(piece: ToolCallDelta) -> dict[str, Any]:
    if piece.id is None:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": function}
