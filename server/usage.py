"""Counting tokens for the `usage` of an answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jaxpaged.request import RequestOutput


@dataclass
class Usage:
    """Of one answer, over its prompts. details: with prompt_tokens_details (--enable-prompt-tokens-details). prompt_only: what
    was generated is not part of the answer."""

    details: bool = False
    prompt_only: bool = False
    _last: dict[int, RequestOutput] = field(default_factory=dict)  # the latest output of each prompt: its counts are totals

    def add(self, prompt: int, output: RequestOutput) -> None:
        self._last[prompt] = output

    def body(self) -> dict[str, Any]:
        outputs = self._last.values()
        prompt = sum(len(output.prompt_token_ids) for output in outputs)
        generated = 0 if self.prompt_only else sum(output.metrics.num_generation_tokens for output in outputs)
        usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
        if self.details:
            usage["prompt_tokens_details"] = {"cached_tokens": sum(output.num_cached_tokens for output in outputs)}
        return usage
