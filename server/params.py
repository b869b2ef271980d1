"""From a body's sampling fields to SamplingParams. What the user says counts, then the server's default (the model's
generation_config.json, --override-generation-config), then OpenAI's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxpaged.request import RequestError, RequestOutputKind, SamplingParams
from jaxpaged_server.schemas import ChatRequest, CompletionRequest, Sampled, StreamOptions

DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # None in a body: the server's default
SAME = ("n", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "presence_penalty",
        "frequency_penalty", "logit_bias", "allowed_token_ids", "bad_words", "prompt_logprobs", "spaces_between_special_tokens",
        "skip_reading_prefix_cache")  # fmt: skip
MAX_STOPS = 16  # OpenAI and vLLM take 4
COMPLETION_MAX_TOKENS = 16


def completion_params(body: CompletionRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """For /v1/completions. max_tokens=0 with echo asks for the prompt alone: one token is made and dropped."""
    max_tokens = body.max_tokens if body.max_tokens is not None else defaults.get("max_tokens", COMPLETION_MAX_TOKENS)
    if max_tokens == 0 and body.echo:
        max_tokens = 1
    wanted = {"max_tokens": max_tokens, "logprobs": body.logprobs}
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        wanted["prompt_logprobs"] = body.logprobs
    return _params(body, defaults, wanted)


def chat_params(body: ChatRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """For /v1/chat/completions: as many tokens as fit unless the user says otherwise."""
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true.", "top_logprobs")
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    name = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    if max_tokens is not None and max_tokens < 1:
        raise RequestError(f"{name} must be an integer >= 1, got {max_tokens}.", name)
    wanted = {"max_tokens": max_tokens if max_tokens is not None else defaults.get("max_tokens")}
    wanted["logprobs"] = body.top_logprobs if body.logprobs else None
    return _params(body, defaults, wanted)


def _params(body: Sampled, defaults: Mapping[str, Any], wanted: dict[str, Any]) -> SamplingParams:
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > MAX_STOPS:
        raise RequestError(f"stop may have at most {MAX_STOPS} strings, got {len(stops)}.", "stop")
    check_streaming(body)
    values = {name: getattr(body, name) for name in SAME}
    for name in DEFAULTED:
        given = getattr(body, name)
        if given is not None or name in defaults:
            values[name] = defaults[name] if given is None else given
    values["skip_special_tokens"] = body.skip_special_tokens is not False
    return SamplingParams(output_kind=output_kind(body.stream), **{**values, **wanted})


def output_kind(stream: bool) -> RequestOutputKind:
    return RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY


def check_streaming(body: Sampled) -> None:
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream: true.", "stream_options")
    if body.stream and body.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs cannot be streamed; leave stream out.", "prompt_logprobs")
    if body.stream_interval is not None and body.stream_interval < 1:
        raise RequestError(f"stream_interval must be at least 1, got {body.stream_interval}.", "stream_interval")


def usage_options(options: StreamOptions | None, force: bool) -> tuple[bool, bool]:
    """(a last chunk with usage, usage in every chunk)."""
    last = force or bool(options and options.include_usage)
    return last, bool(options and options.include_usage and options.continuous_usage_stats)


def truncated(ids: list[int], limit: int | None, side: str, max_model_len: int) -> list[int]:
    """truncate_prompt_tokens: the last (side "left") or first so many tokens of a prompt; -1: as many as the model takes."""
    if side not in ("left", "right"):
        raise RequestError(f"truncation_side must be left or right, got {side!r:.80}.", "truncation_side")
    if limit is None:
        return ids
    if limit < -1 or limit == 0:
        raise RequestError(f"truncate_prompt_tokens must be -1 or at least 1, got {limit}.", "truncate_prompt_tokens")
    keep = max_model_len - 1 if limit == -1 else limit
    if len(ids) <= keep:
        return ids
    return ids[-keep:] if side == "left" else ids[:keep]
