"""Logprobs as OpenAI's two APIs show them. Minus infinity, which JSON does not have, becomes -9999."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxpaged.request import Logprob
from jaxpaged.tokenizer import Tokenizer

LEAST = -9999.0
Entry = Mapping[int, Logprob]


class TokenNames:
    """How a token is written: its text, or "token_id:123", which is unambiguous."""

    def __init__(self, tokenizer: Tokenizer | None, as_ids: bool):
        self._tokenizer, self._as_ids = tokenizer, as_ids or tokenizer is None

    def text(self, token: int) -> str:
        if self._as_ids or self._tokenizer is None:
            return f"token_id:{token}"
        return self._tokenizer.token(token)

    def bytes(self, token: int) -> list[int]:
        return list(self._tokenizer.token_bytes(token)) if self._tokenizer else []


def clamped(value: float) -> float:
    return max(value, LEAST)


def completion_logprobs(
    tokens: Sequence[int], entries: Iterable[Entry | None], names: TokenNames, offset: int
) -> dict[str, Any]:
    """/v1/completions: four lists. `offset`: characters of text before the first token. An entry that is None (the
    prompt's first token) has no logprob."""
    out: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for token, entry in zip(tokens, entries):
        text = names.text(token)
        out["text_offset"].append(offset)
        out["token_logprobs"].append(None if entry is None else clamped(entry[token].logprob))
        out["tokens"].append(text)
        out["top_logprobs"].append(None if entry is None else {names.text(t): clamped(p.logprob) for t, p in entry.items()})
        offset += len(text)
    return out


def chat_logprobs(tokens: Sequence[int], entries: Sequence[Entry], names: TokenNames, top: int) -> dict[str, Any]:
    """/v1/chat/completions: an object a token, with the `top` most probable ones (-1: all there are)."""
    return {"content": [_chat_token(token, entry, names, top) for token, entry in zip(tokens, entries)]}


def _chat_token(token: int, entry: Entry, names: TokenNames, top: int) -> dict[str, Any]:
    ranked = sorted(entry.items(), key=lambda item: item[1].rank or 0)
    kept = [item for item in ranked if top < 0 or (item[1].rank or 0) <= top]
    return {**_one(token, entry[token], names), "top_logprobs": [_one(t, p, names) for t, p in kept]}


def _one(token: int, p: Logprob, names: TokenNames) -> dict[str, Any]:
    return {"token": names.text(token), "logprob": clamped(p.logprob), "bytes": names.bytes(token)}


def prompt_logprobs(entries: Sequence[Entry | None] | None) -> list[dict[str, Any] | None] | None:
    """vLLM's `prompt_logprobs` of a response: an object a token, by token id."""
    if entries is None:
        return None
    return [None if entry is None else {str(t): _by_id(p) for t, p in entry.items()} for entry in entries]


def _by_id(p: Logprob) -> dict[str, Any]:
    return {"logprob": clamped(p.logprob), "rank": p.rank, "decoded_token": p.decoded_token}
