"""Prompts for a load test: random tokens, repeated prefixes, or the turns of a ShareGPT file. Flags are vLLM's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpaged.bench_options import DatasetOptions
from jaxpaged.request import RequestError

CHARACTERS_PER_TOKEN = 4  # of English text, about
MIN_TOKENS, MAX_PROMPT_TOKENS, MAX_TOTAL_TOKENS = 4, 1024, 2048  # which ShareGPT turns count, as in vLLM


class Sample(NamedTuple):
    """prompt: token ids or text. output_len: most tokens to generate."""

    prompt: list[int] | str
    output_len: int


def load(options: DatasetOptions, count: int, as_text: bool) -> list[Sample]:
    """`count` samples; the same ones for the same options. as_text: prompts must be text (chat), not token ids."""
    makers = {"random": _random, "sharegpt": _sharegpt, "prefix_repetition": _prefix_repetition}
    samples = makers[options.dataset_name](options, count, np.random.default_rng(options.seed))
    return _as_text(samples, options) if as_text else samples


def _tokens(options: DatasetOptions, rng: np.random.Generator, length: int) -> list[int]:
    return rng.integers(options.vocab_size // 10, options.vocab_size, length).tolist()


def _random(options: DatasetOptions, count: int, rng: np.random.Generator) -> list[Sample]:
    def lengths(middle: int) -> list[int]:
        ratio = options.random_range_ratio
        low, high = int(middle * (1 - ratio)), int(middle * (1 + ratio))
        return rng.integers(max(low, 1), high, count, endpoint=True).tolist()

    prefix = _tokens(options, rng, options.random_prefix_len)
    inputs, outputs = lengths(options.random_input_len), lengths(options.random_output_len)
    return [Sample(prefix + _tokens(options, rng, i), o) for i, o in zip(inputs, outputs)]


def _prefix_repetition(options: DatasetOptions, count: int, rng: np.random.Generator) -> list[Sample]:
    """Prefixes take turns, then the order is shuffled."""
    prefixes = [_tokens(options, rng, options.prefix_repetition_prefix_len)
                for _ in range(options.prefix_repetition_num_prefixes)]  # fmt: skip
    prompts = [prefixes[i % len(prefixes)] + _tokens(options, rng, options.prefix_repetition_suffix_len) for i in range(count)]
    return [Sample(prompts[i], options.prefix_repetition_output_len) for i in rng.permutation(count)]


def _sharegpt(options: DatasetOptions, count: int, rng: np.random.Generator) -> list[Sample]:
    """First question and length of the first answer of conversations in random order, without very short and long ones."""
    turns, num_tokens, samples = _read_sharegpt(options), _counter(options), []
    for i in rng.permutation(len(turns)):
        question, answer = turns[i]
        asked, answered = num_tokens(question), options.sharegpt_output_len or num_tokens(answer)
        too_long = asked > MAX_PROMPT_TOKENS or asked + answered > MAX_TOTAL_TOKENS
        if not too_long and asked >= MIN_TOKENS and (answered >= MIN_TOKENS or options.sharegpt_output_len):
            samples.append(Sample(question, answered))
            if len(samples) == count:
                return samples
    raise RequestError(f"{options.dataset_path} has {len(samples)} conversations of a fitting length, {count} are needed (one "
                       "is for the test request): give a smaller --num-prompts or a larger file.", "num_prompts")  # fmt: skip


def _read_sharegpt(options: DatasetOptions) -> list[tuple[str, str]]:
    path = options.dataset_path
    try:
        conversations = [c["conversations"] for c in json.loads(Path(str(path)).read_text(encoding="utf-8"))]
        return [(c[0]["value"], c[1]["value"]) for c in conversations if len(c) >= 2]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RequestError(f'{path} cannot be read as ShareGPT, a JSON list of {{"conversations": [{{"value": TEXT}}, ...]}}: '
                           f"{type(error).__name__}: {error}", "dataset_path") from None  # fmt: skip


def _counter(options: DatasetOptions) -> Callable[[str], int]:
    if options.tokenizer is None:
        return lambda text: len(text) // CHARACTERS_PER_TOKEN
    tokenizer = _tokenizer(options.tokenizer)
    return lambda text: len(tokenizer.encode(text))


def _as_text(samples: list[Sample], options: DatasetOptions) -> list[Sample]:
    if isinstance(samples[0].prompt, str):
        return samples
    if options.tokenizer is None:
        raise RequestError("a chat takes text, and random prompts are token ids: give --tokenizer (a model's name or folder), "
                           "or use --backend openai.", "tokenizer")  # fmt: skip
    tokenizer = _tokenizer(options.tokenizer)
    return [Sample(tokenizer.decode(ids), length) for ids, length in samples]  # type: ignore[arg-type]


def _tokenizer(name: str) -> Any:
    from jaxpaged import hub
    from jaxpaged.tokenizer import load_tokenizer

    return load_tokenizer(hub.resolve(name, weights=False))
