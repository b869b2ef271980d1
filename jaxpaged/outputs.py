"""From sampled tokens to what the user reads: text, logprobs, stop strings, one RequestOutput for n samples.

A `Group` is a user's request; each of its n samples is a `Track`. Both are the engine's own mutable records.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from jaxpaged.batch import TokenLogprobs
from jaxpaged.request import (
    CompletionOutput,
    FinishReason,
    Logprob,
    Request,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
)
from jaxpaged.tokenizer import Detokenizer, Tokenizer


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
        self._text_reported = self._tokens_reported = 0

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
            stop = self._detokenizer.push([token]).stop
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
                self._detokenizer.finish()

    def output(self, delta: bool) -> CompletionOutput:
        text, tokens, logprobs = self.text, self.token_ids, self.logprobs
        if delta:
            text, tokens = text[self._text_reported :], tokens[self._tokens_reported :]
            logprobs = None if logprobs is None else logprobs[self._tokens_reported :]
            self._text_reported, self._tokens_reported = len(self.text), len(self.token_ids)
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=list(tokens),
            cumulative_logprob=None if self.logprobs is None else self.cumulative_logprob,
            logprobs=None if logprobs is None else list(logprobs),
            finish_reason=None if self.finish_reason is None else str(self.finish_reason),
            stop_reason=self.stop_reason,
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

    @property
    def finished(self) -> bool:
        return all(track.finish_reason is not None for track in self.tracks)

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

    def output(self) -> RequestOutput | None:
        """What to tell the user now, None for nothing."""
        kind = self.request.params.output_kind
        if kind is RequestOutputKind.FINAL_ONLY and not self.finished:
            return None
        everything = kind is RequestOutputKind.FINAL_ONLY
        shown = self.tracks if everything else [self.tracks[i] for i in sorted(self.changed)]
        self.changed.clear()
        if not shown and not self.finished:
            return None
        return RequestOutput(
            request_id=self.request.id,
            prompt=self.request.prompt_text,
            prompt_token_ids=list(self.request.prompt),
            outputs=[track.output(kind is RequestOutputKind.DELTA) for track in shown],
            finished=self.finished,
            prompt_logprobs=self.prompt_logprobs,
            num_cached_tokens=self.num_cached_tokens or 0,
            metrics=RequestMetrics(
                self.arrival_time,
                self.scheduled_time,
                self.first_token_time,
                self.last_token_time,
                self.num_generation_tokens,
                self.num_preemptions,
            ),
            error=self.error,
        )


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
