"""From sampled tokens to what the user reads: text, logprobs, stop strings, one RequestOutput for n samples; or from
hidden states to an embedding.

A `Group` is a user's request; each of its n samples is a `Track` (a request to pool has one, without tokens). Both are the
engine's own mutable records.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from jaxpaged.batch import TokenLogprobs
from jaxpaged.request import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    EngineOutput,
    FinishReason,
    Logprob,
    PoolingParams,
    Request,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
)
from jaxpaged.tokenizer import Detokenizer, Tokenizer

Output = TypeVar("Output", RequestOutput, EmbeddingRequestOutput)
TINY = 1e-12  # a shorter vector is not scaled to length 1: torch's normalize has the same limit


class Track:
    """One sample of a request as it grows."""

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer | None):
        self.index, self.request, self._tokenizer = index, request, tokenizer
        params = request.params
        self._detokenizer = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = Detokenizer(tokenizer, request.prompt, params)
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self.cumulative_logprob = 0.0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._new_text, self._tokens_reported = "", 0  # not yet in an output

    @property
    def text(self) -> str:
        return self._detokenizer.text if self._detokenizer else ""

    def push(self, token: int, finish: FinishReason | None, logprobs: TokenLogprobs | None, row: int) -> bool:
        """Takes one sampled token. True when a stop string ended the text, which the scheduler does not know yet."""
        params = self.request.params
        self.token_ids.append(token)
        if self.logprobs is not None and logprobs is not None:
            entry = logprob_entry(logprobs, row, token, _width(params.logprobs, logprobs), self._tokenizer)
            self.logprobs.append(entry)
            self.cumulative_logprob += entry[token].logprob
        hidden = finish is FinishReason.STOP and not params.include_stop_str_in_output
        if self._detokenizer and not hidden:
            text, stop = self._detokenizer.push((token,))
            self._new_text += text
            if stop is not None:
                self.end(FinishReason.STOP, stop)
                return finish is None
        if finish is not None:
            self.end(finish, token if finish is FinishReason.STOP and token in (params.stop_token_ids or ()) else None)
        return False

    def end(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Ends the sample; what the detokenizer held back belongs to the text."""
        if self.finish_reason is None:
            self.finish_reason, self.stop_reason = reason, stop_reason
            if self._detokenizer:
                self._new_text += self._detokenizer.finish()

    def output(self, delta: bool) -> CompletionOutput:
        first = self._tokens_reported if delta else 0
        text, self._new_text = (self._new_text if delta else self.text), ""
        self._tokens_reported = len(self.token_ids)
        return CompletionOutput(
            self.index,
            text,
            self.token_ids[first:],
            None if self.logprobs is None else self.cumulative_logprob,
            None if self.logprobs is None else self.logprobs[first:],
            None if self.finish_reason is None else str(self.finish_reason),
            self.stop_reason,
        )


@dataclass
class Group:
    """A user's request: its samples, the logprobs of its prompt, its times."""

    request: Request  # as asked, n samples
    tracks: list[Track]
    arrival_time: float  # seconds on the monotonic clock, as those below
    scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int | None = None
    error: str | None = None
    changed: set[int] = field(default_factory=set)
    pooled: np.ndarray | None = None  # float32 [E]: the prompt's last hidden state, or their sum, as far as computed

    def __post_init__(self) -> None:
        self.prompt_token_ids = list(self.request.prompt)  # one list for all outputs: a copy a token is O(prompt)

    @property
    def finished(self) -> bool:
        for track in self.tracks:  # a loop: it runs twice a token
            if track.finish_reason is None:
                return False
        return True

    def note_token(self, now: float) -> None:
        self.first_token_time = self.first_token_time or now
        self.last_token_time = now
        self.num_generation_tokens += 1

    def score_prompt(self, first: int, count: int, values: TokenLogprobs, at: int, tokenizer: Tokenizer | None) -> None:
        """Logprobs of prompt tokens: rows at.. of `values` are the predictions made at positions first.."""
        prompt, wanted = self.request.prompt, self.request.params.prompt_logprobs
        scores: list[dict[int, Logprob] | None] = self.prompt_logprobs or [None] * len(prompt)
        self.prompt_logprobs = scores
        width = _width(wanted, values)
        for i in range(min(count, len(prompt) - 1 - first)):
            token = prompt[first + i + 1]
            scores[first + i + 1] = logprob_entry(values, at + i, token, width, tokenizer)

    def pool(self, start: int, total: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Takes in a chunk of the prompt that begins at position `start`: the sum of its hidden states and the last one.
        Returns what is pooled by now. A sequence that was preempted begins at 0 again."""
        assert self.request.pooling is not None
        if self.request.pooling.pooling == "last":
            self.pooled = last
        elif start == 0:
            self.pooled = total
        else:
            assert self.pooled is not None, "a prompt is computed from its beginning"
            self.pooled = self.pooled + total
        return self.pooled

    def output(self) -> EngineOutput | None:
        """What to tell the user now, None for nothing."""
        if self.request.pooling is not None:
            return self._pooled_output(self.request.pooling) if self.finished else None
        return self._sampled_output()

    def _pooled_output(self, params: PoolingParams) -> EmbeddingRequestOutput:
        outputs, error = None, self.error
        if self.tracks[0].finish_reason is FinishReason.ABORT:
            error = "the request was aborted."
        elif error is None:
            assert self.pooled is not None, "a request ends well when its prompt has been pooled"
            outputs = EmbeddingOutput(embedding(self.pooled, len(self.prompt_token_ids), params))
        return EmbeddingRequestOutput(self.request.id, outputs, self.prompt_token_ids, self.num_cached_tokens or 0, True,
                                      self._metrics(), error)  # fmt: skip

    def _sampled_output(self) -> RequestOutput | None:
        kind, finished = self.request.params.output_kind, self.finished
        everything = kind is RequestOutputKind.FINAL_ONLY
        if everything and not finished:
            return None
        shown = self.tracks if everything else [self.tracks[i] for i in sorted(self.changed)]
        self.changed.clear()
        if not shown and not finished:
            return None
        delta = kind is RequestOutputKind.DELTA
        return RequestOutput(self.request.id, self.request.prompt_text, self.prompt_token_ids,
                             [track.output(delta) for track in shown], finished, self.prompt_logprobs,
                             self.num_cached_tokens or 0, self._metrics(), self.error,
                             self.request.adapter and self.request.adapter.request)  # fmt: skip

    def _metrics(self) -> RequestMetrics:
        return RequestMetrics(self.arrival_time, self.scheduled_time, self.first_token_time, self.last_token_time,
                              self.num_generation_tokens, self.num_preemptions)  # fmt: skip


def embedding(pooled: np.ndarray, num_tokens: int, params: PoolingParams) -> list[float]:
    """The vector to answer with, float32 values: the mean of a sum over `num_tokens`, cut, scaled to length 1."""
    vector = pooled.astype(np.float64)[: params.dimensions] / (num_tokens if params.pooling == "mean" else 1)
    if params.use_activation:
        vector /= max(float(np.linalg.norm(vector)), TINY)
    return vector.astype(np.float32).tolist()


def merged(old: Output, new: Output, kind: RequestOutputKind) -> Output:
    """Two successive outputs of one request as one, for a reader who had no time for the first, which is used up."""
    if kind is RequestOutputKind.FINAL_ONLY or not (isinstance(old, RequestOutput) and isinstance(new, RequestOutput)):
        return new
    before = {completion.index: completion for completion in old.outputs}
    for completion in new.outputs:
        earlier = before.get(completion.index)
        if earlier is not None and kind is RequestOutputKind.DELTA:
            _extend(earlier, completion)
        else:
            before[completion.index] = completion
    old.outputs = [before[index] for index in sorted(before)]
    old.finished, old.error, old.metrics = new.finished, new.error, new.metrics
    old.prompt_logprobs, old.num_cached_tokens = new.prompt_logprobs, new.num_cached_tokens
    return old


def _extend(old: CompletionOutput, new: CompletionOutput) -> None:
    old.text += new.text
    old.token_ids += new.token_ids
    if old.logprobs is not None:
        old.logprobs += new.logprobs or []
    old.cumulative_logprob, old.finish_reason, old.stop_reason = new.cumulative_logprob, new.finish_reason, new.stop_reason


def _width(asked: int | None, values: TokenLogprobs) -> int:
    """Alternatives to list: `asked`, where -1 is all there are."""
    return values.top.shape[1] if asked == -1 else asked or 0


def logprob_entry(values: TokenLogprobs, row: int, token: int, width: int, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """The chosen token and the `width` most probable ones, by token id."""

    def text(token: int) -> str | None:
        return None if tokenizer is None else tokenizer.token(token)

    entry = {token: Logprob(float(values.logprob[row]), int(values.rank[row]), text(token))}
    alternatives: Iterable[tuple[int, float]] = zip(values.top_ids[row, :width].tolist(), values.top[row].tolist())
    for rank, (other, logprob) in enumerate(alternatives, 1):
        entry.setdefault(other, Logprob(logprob, rank, text(other)))
    return entry
