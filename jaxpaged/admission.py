"""From what a user gives to a `Request` that can be served, or one RequestError with the numbers and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from jaxpaged.request import PoolingParams, Request, RequestError, SamplingParams
from jaxpaged.scheduler import Limits
from jaxpaged.tokenizer import Tokenizer


def make_request(
    request_id: str,
    prompt: str | Sequence[int],
    params: SamplingParams,
    limits: Limits,
    tokenizer: Tokenizer | None,
    eos_ids: frozenset[int],
    max_logprobs: int,
    priority: int = 0,
    cache_salt: str = "",
    prompt_text: str | None = None,
) -> Request:
    """Tokenises a text prompt, checks ids, lengths and everything that depends on the vocabulary."""
    text, tokens = _tokens(prompt, tokenizer)
    _check_ids(tokens, limits.vocab_size, "prompt")
    total = _total_tokens(len(tokens), params, limits.max_model_len)
    _check_vocabulary(params, limits.vocab_size)
    _check_logprobs(params, limits.vocab_size, max_logprobs)
    stop_ids = frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else eos_ids)
    bad_words = _bad_words(params, tokenizer)
    _check_some_allowed(params, stop_ids, bad_words)
    if tokenizer is None and params.detokenize and params.stop:
        raise RequestError("stop strings need a tokenizer, and this engine has none; use stop_token_ids.", "stop")
    return Request(
        id=request_id,
        prompt=tokens,
        params=params,
        priority=priority,
        cache_salt=cache_salt,
        stop_ids=stop_ids,
        max_total_tokens=total,
        prompt_text=prompt_text if text is None else text,
        bad_words_ids=bad_words,
    )


def make_pooling_request(
    request_id: str,
    prompt: str | Sequence[int],
    pooling: PoolingParams,
    limits: Limits,
    tokenizer: Tokenizer | None,
    embed_dim: int,
    priority: int = 0,
    cache_salt: str = "",
    prompt_text: str | None = None,
) -> Request:
    """Tokenises a text prompt, checks ids and lengths: the prompt may have all max_model_len tokens."""
    text, tokens = _tokens(prompt, tokenizer)
    _check_ids(tokens, limits.vocab_size, "prompt")
    if len(tokens) > limits.max_model_len:
        raise RequestError(f"the prompt has {len(tokens):,} tokens and max_model_len is {limits.max_model_len:,}; shorten the "
                           "prompt or raise max_model_len.", "prompt")  # fmt: skip
    if pooling.dimensions is not None and pooling.dimensions > embed_dim:
        raise RequestError(f"dimensions={pooling.dimensions} is more than the {embed_dim} numbers of this model's vectors; ask "
                           "for fewer, or leave it out for all.", "dimensions")  # fmt: skip
    nothing = SamplingParams(temperature=0, detokenize=False, skip_reading_prefix_cache=pooling.skip_reading_prefix_cache)
    return Request(request_id, tokens, nothing, priority, cache_salt=cache_salt, max_total_tokens=len(tokens),
                   prompt_text=prompt_text if text is None else text, pooling=pooling)  # fmt: skip


def _tokens(prompt: str | Sequence[int], tokenizer: Tokenizer | None) -> tuple[str | None, tuple[int, ...]]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError("a text prompt needs a tokenizer, and this engine has none; give token ids.", "prompt")
        text, tokens = prompt, tuple(tokenizer.encode(prompt))
    else:
        text, tokens = None, tuple(map(_plain_int, prompt))
    if not tokens:
        raise RequestError("the prompt is empty; give at least one token.", "prompt")
    return text, tokens


def _plain_int(token: Any) -> Any:
    """numpy's integers become Python's; anything else stays what it is, to be refused by name."""
    return int(token) if isinstance(token, Integral) and not isinstance(token, bool) else token


def _check_ids(tokens: Sequence[int], vocab_size: int, param: str) -> None:
    for token in tokens:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise RequestError(f"{param}: {token!r} is not a token id of this model; ids are integers in "
                               f"0..{vocab_size - 1}.", param)  # fmt: skip


def _total_tokens(num_prompt: int, params: SamplingParams, max_model_len: int) -> int:
    if num_prompt >= max_model_len:
        raise RequestError(
            f"the prompt has {num_prompt:,} tokens, max_model_len is {max_model_len:,} and the output needs at least "
            f"one of them; shorten the prompt to {max_model_len - 1:,} tokens or raise max_model_len.", "prompt",
        )  # fmt: skip
    if params.max_tokens is None:
        return max_model_len
    total = num_prompt + params.max_tokens
    if total > max_model_len:
        raise RequestError(
            f"the prompt has {num_prompt:,} tokens and max_tokens is {params.max_tokens:,}: {total:,} together, but "
            f"max_model_len is {max_model_len:,}; set max_tokens to at most {max_model_len - num_prompt:,}, or to None "
            "for as many as fit.", "max_tokens",
        )  # fmt: skip
    return total


def _check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    _check_ids(params.stop_token_ids or (), vocab_size, "stop_token_ids")
    _check_ids(params.allowed_token_ids or (), vocab_size, "allowed_token_ids")
    _check_ids(tuple(params.logit_bias or ()), vocab_size, "logit_bias")


def _check_logprobs(params: SamplingParams, vocab_size: int, max_logprobs: int) -> None:
    for name in ("logprobs", "prompt_logprobs"):
        asked = getattr(params, name)
        width = vocab_size if asked == -1 else asked or 0
        if width > max_logprobs:
            raise RequestError(f"{name}={asked} asks for {width:,} alternatives, max_logprobs is {max_logprobs}; "
                               f"ask for fewer, or start the engine with max_logprobs={width}.", name)  # fmt: skip


def _check_some_allowed(params: SamplingParams, stop_ids: frozenset[int], bad_words: Sequence[tuple[int, ...]]) -> None:
    """What may be sampled must not be empty: a row without any word cannot be sampled from."""
    if params.allowed_token_ids is None:
        return
    left = set(params.allowed_token_ids) - {word[0] for word in bad_words if len(word) == 1}
    left -= stop_ids if params.min_tokens else frozenset()
    if not left:
        raise RequestError("allowed_token_ids leave nothing to sample: bad_words, or min_tokens (which bans the tokens that "
                           "end the sequence), forbid all of them; allow another token.", "allowed_token_ids")  # fmt: skip


def _bad_words(params: SamplingParams, tokenizer: Tokenizer | None) -> tuple[tuple[int, ...], ...]:
    """Each word as it is tokenised at the start of a text and after a space, where that differs (as in vLLM)."""
    if not params.bad_words:
        return ()
    if tokenizer is None:
        raise RequestError("bad_words need a tokenizer, and this engine has none.", "bad_words")
    found: list[tuple[int, ...]] = []
    for word in params.bad_words:
        plain = tuple(tokenizer.encode(word.lstrip(), add_special_tokens=False))
        spaced = tuple(tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
        found.append(plain)
        if len(spaced) == len(plain) and spaced[0] != plain[0]:
            found.append(spaced)
    return tuple(word for word in found if word)
