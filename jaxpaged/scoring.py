"""Scores of pairs of texts: the cosine of their embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxpaged.prompts import ParsedPrompt, parse_prompts
from jaxpaged.request import EmbeddingRequestOutput, RequestError


@dataclass(frozen=True)
class ScoringOutput:
    """A pair's score, between -1 and 1."""

    score: float


@dataclass(frozen=True)
class ScoringRequestOutput:
    """What `LLM.score` returns for a pair. `outputs` is None where one of the two failed or was aborted; `error` says why.
    prompt_token_ids: the first text's, then the second's."""

    request_id: str
    outputs: ScoringOutput | None
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True
    error: str | None = None


def parse_pairs(data_1: Any, data_2: Any) -> tuple[list[ParsedPrompt], list[tuple[int, int]]]:
    """All prompts, and the pairs of their numbers. One with one, one with each, or each with the one at its place."""
    first, second = parse_prompts(data_1), parse_prompts(data_2)
    if len(first) not in (1, len(second)):
        raise RequestError(f"score: {len(first)} first texts and {len(second)} second ones; give one first text for all, or as "
                           "many as second ones.", "data_1")  # fmt: skip
    lone = len(first) == 1
    return [*first, *second], [(0 if lone else i, len(first) + i) for i in range(len(second))]


def score(one: EmbeddingRequestOutput, two: EmbeddingRequestOutput) -> ScoringRequestOutput:
    error = one.error or two.error
    found = None
    if one.outputs is not None and two.outputs is not None:
        found = ScoringOutput(cosine(one.outputs.embedding, two.outputs.embedding))
    return ScoringRequestOutput(f"{one.request_id}_{two.request_id}", found, one.prompt_token_ids + two.prompt_token_ids,
                                one.num_cached_tokens + two.num_cached_tokens, error=error)  # fmt: skip


def cosine(one: Sequence[float], two: Sequence[float]) -> float:
    x, y = np.asarray(one, np.float64), np.asarray(two, np.float64)
    lengths = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / lengths if lengths else 0.0
