"""The forms a prompt may have (vLLM's): a string, a list of token ids, or a dictionary of one of these two types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

from jaxpaged.request import RequestError, refuse_unknown


class TextPrompt(TypedDict, total=False):
    prompt: str
    cache_salt: str


class TokensPrompt(TypedDict, total=False):
    prompt_token_ids: Sequence[int]
    prompt: str
    cache_salt: str


Prompt = str | Sequence[int] | TextPrompt | TokensPrompt


class ParsedPrompt(NamedTuple):
    content: str | Sequence[int]
    text: str | None
    cache_salt: str


def parse_prompt(prompt: Any) -> ParsedPrompt:
    """One prompt in any of its forms; RequestError for anything else."""
    if isinstance(prompt, dict):
        refuse_unknown("a prompt", prompt, ["prompt", "prompt_token_ids", "cache_salt"])
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if text is None and ids is None:
            raise RequestError("a prompt dictionary needs 'prompt' or 'prompt_token_ids'.", "prompt")
        content: Any = text if ids is None else ids
        return ParsedPrompt(content, text, prompt.get("cache_salt") or "")
    if isinstance(prompt, str):
        return ParsedPrompt(prompt, prompt, "")
    if isinstance(prompt, (bytes, int)) or not hasattr(prompt, "__iter__"):
        raise RequestError(f"a prompt is a string, token ids or a dictionary; got {type(prompt).__name__}.", "prompt")
    return ParsedPrompt(list(prompt), None, "")


def parse_prompts(prompts: Any) -> list[ParsedPrompt]:
    """One prompt or a list of them. A list of integers is one prompt of token ids."""
    if isinstance(prompts, (str, dict)):
        return [parse_prompt(prompts)]
    prompts = list(prompts)
    if prompts and not isinstance(prompts[0], (str, dict)) and not hasattr(prompts[0], "__iter__"):
        return [parse_prompt(prompts)]
    return [parse_prompt(prompt) for prompt in prompts]
