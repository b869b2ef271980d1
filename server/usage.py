"""Counting tokens for the `usage` of an answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jaxpaged.request import RequestOutput


@dataclass
class Usage:
    """Of one answer, over its prompts. details: with prompt_tokens_details (--enable-prompt-tokens-details)."""

    details: bool = False
    reasoning_tokens: int | None = None
    _prompts: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # prompt -> (its tokens, cached, generated)

    def add(self, prompt: int, output: RequestOutput, generated: int) -> None:
        """Takes the counts of an output, which are totals since the request began."""
        self._prompts[prompt] = len(output.prompt_token_ids), output.num_cached_tokens, generated

    def totals(self) -> tuple[int, int, int]:
        """(prompt tokens, cached ones among them, generated tokens)."""
        return tuple(sum(one[i] for one in self._prompts.values()) for i in range(3))  # type: ignore[return-value]

    def body(self) -> dict[str, Any]:
        prompt, cached, generated = self.totals()
        usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
        if self.details:
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        if self.reasoning_tokens is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": self.reasoning_tokens}
        return usage
