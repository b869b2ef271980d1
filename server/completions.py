"""/v1/completions: a body becomes prompts, outputs become OpenAI's text completions. Pure functions and small records."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxpaged.request import CompletionOutput, RequestError, RequestOutput
from jaxpaged_server.errors import failed_request
from jaxpaged_server.logprobs import Entry, TokenNames, completion_logprobs, prompt_logprobs
from jaxpaged_server.schemas import CompletionRequest
from jaxpaged_server.usage import Usage


def split_prompts(prompt: str | list[Any], limit: int) -> list[str | list[int]]:
    """The prompts of a body: a string, token ids, or a list of either."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = set(map(type, prompt))
    if not prompt or len(kinds) > 1:
        raise RequestError("prompt must be a string, a list of token ids, or a list of strings or of lists of token ids, not "
                           f"{'an empty list' if not prompt else 'a list of a mixture'}.", "prompt")  # fmt: skip
    if kinds == {int}:
        return [prompt]
    if len(prompt) > limit:
        raise RequestError(f"prompt may have at most {limit} prompts, got {len(prompt)}; send them in several requests.",
                           "prompt")  # fmt: skip
    if [] in prompt:
        raise RequestError(f"prompt number {prompt.index([])} is empty; give at least one token.", "prompt")
    return prompt


@dataclass
class Completions:
    """One answer in the making: of `body.n` samples for each prompt. Choices are numbered prompt by prompt."""

    id: str
    model: str
    body: CompletionRequest
    names: TokenNames
    usage: Usage
    created: int = field(default_factory=lambda: int(time.time()))
    _offsets: dict[int, int] = field(default_factory=dict)  # choice -> characters sent
    _begun: set[int] = field(default_factory=set)  # choices of which something has been sent

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The response; outputs in the order of the prompts. RequestError (500) if one of them failed."""
        choices = []
        for prompt, output in enumerate(outputs):
            if output.error is not None:
                raise failed_request(output.error)
            self.usage.add(prompt, output)
            for completion in output.outputs:
                choices.append(self._choice(prompt, output, completion, first=True))
                if output.prompt_logprobs is not None:
                    choices[-1]["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        return {**self._head("text_completion"), "choices": choices, "usage": self.usage.body()}

    def chunk(self, prompt: int, output: RequestOutput, usage: bool) -> list[dict[str, Any]]:
        """The chunks of a DELTA output: one for each sample that has something new."""
        self.usage.add(prompt, output)
        chunks = []
        for completion in output.outputs:
            index = self._index(prompt, completion)
            first = index not in self._begun
            choice = self._choice(prompt, output, completion, first)
            if choice["text"] or choice["finish_reason"] or choice["logprobs"] or choice.get("token_ids"):
                self._begun.add(index)
                chunks.append({**self._head("text_completion"), "choices": [choice]})
                if usage:
                    chunks[-1]["usage"] = self.usage.body()
        return chunks

    def usage_chunk(self) -> dict[str, Any]:
        return {**self._head("text_completion"), "choices": [], "usage": self.usage.body()}

    @property
    def _prompt_only(self) -> bool:
        return self.body.echo and self.body.max_tokens == 0

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _index(self, prompt: int, completion: CompletionOutput) -> int:
        return completion.index + prompt * self.body.n

    def _choice(self, prompt: int, output: RequestOutput, completion: CompletionOutput, first: bool) -> dict[str, Any]:
        body, index = self.body, self._index(prompt, completion)
        text, tokens, entries = completion.text, completion.token_ids, completion.logprobs or []
        if self._prompt_only:
            text, tokens, entries = "", [], []
        if body.echo and first:
            text, tokens, entries = self._echoed(output, text, tokens, entries)
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": completion.finish_reason,
                                  "stop_reason": completion.stop_reason}  # fmt: skip
        if body.logprobs is not None and tokens:
            choice["logprobs"] = completion_logprobs(tokens, entries, self.names, self._offsets.get(index, 0))
        if body.return_token_ids:
            choice["token_ids"] = [] if self._prompt_only else completion.token_ids
            choice["prompt_token_ids"] = output.prompt_token_ids if first else None
        self._offsets[index] = self._offsets.get(index, 0) + len(text)
        return choice

    def _echoed(
        self, output: RequestOutput, text: str, tokens: list[int], entries: list[Any]
    ) -> tuple[str, list[int], list[Any]]:
        shown: Sequence[Entry | None] = output.prompt_logprobs or []
        return (output.prompt or "") + text, [*output.prompt_token_ids, *tokens], [*shown, *entries]
