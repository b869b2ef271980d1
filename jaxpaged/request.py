"""The values that cross the engine's edge: what is asked (Request, SamplingParams, PoolingParams) and what is answered
(RequestOutput, EmbeddingRequestOutput).

Floor 0: standard library only. Everything here can be pickled. What is asked is frozen; what is answered is not, since an
engine makes one a token and a frozen dataclass takes three times as long to make.
Names, defaults, ranges and meanings of SamplingParams are vLLM's (0.33); what we do not implement is refused by name.
"""

from __future__ import annotations

import difflib
import enum
import reprlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from jaxpaged.adapter import Adapter, LoRARequest

MAX_NUM_SAMPLES = 16384  # largest `n`, as in vLLM
MAX_LOGIT_BIAS = 1024  # entries of `logit_bias` a request: the width of the bias table on the device
MAX_BAD_WORDS = 128
MAX_BAD_WORD = 256  # characters: each is tokenised when the request comes
SAMPLING_EPS = 1e-5  # a temperature below this is greedy
MAX_FLOAT32 = (2 - 2**-23) * 2.0**127
MIN_FLOAT32 = 2.0**-126  # smallest normal number: a smaller penalty would be 0 on the device
MAX_DIGITS = 20  # of a token id that is written as text
MIN_TEMPERATURE = 1e-2  # a smaller one that is not greedy is raised to this: 1 / t would overflow


class RequestError(ValueError):
    """A request that cannot be served: says what was given, what is allowed and what to do.

    `status` is the HTTP status a server answers with, `param` the field at fault (OpenAI's error body has both).
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.message, self.param, self.status = message, param, status

    def __reduce__(self):
        return type(self), (self.message, self.param, self.status)


class FinishReason(enum.StrEnum):
    """Why a sequence ended: OpenAI's words, plus `abort` and `error`."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class RequestOutputKind(enum.Enum):
    """What each streamed RequestOutput carries: all so far, only what is new, or nothing until the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


def refuse_unknown(kind: str, given: Any, known: Sequence[str]) -> None:
    """Raises RequestError for the first name of `given` that is not in `known`, with the nearest known name."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise RequestError(f"{kind} has no parameter {name!r}{hint} It takes: {', '.join(sorted(known))}.", name)


def _check(ok: bool, param: str, rule: str, given: Any) -> None:
    if not ok:
        raise RequestError(f"{param} must be {rule}, got {reprlib.repr(given)}.", param)


def _is_int(x: Any) -> bool:
    """Of 64 bits, with a sign or without: JSON knows no bound, arrays and messages do."""
    return isinstance(x, int) and not isinstance(x, bool) and -(2**63) <= x < 2**64


def _is_finite(x: Any) -> bool:
    """Also an int must have a float's size: JSON knows no bound."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) <= sys.float_info.max


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next tokens of one request.

    n: samples drawn for the prompt, 1..16384. They share the prompt's pages. Greedy sampling takes n = 1 only.
    presence_penalty, frequency_penalty: [-2, 2], subtracted for tokens of the output so far (once / per occurrence).
    repetition_penalty: > 0 (a float32); logits of tokens seen in prompt or output are divided (if > 0) or multiplied by it.
    temperature: [0, 2]; below 1e-5 is greedy (top_p, top_k, min_p are then off); up to 0.01 is raised to 0.01.
    top_p: (0, 1]. top_k: 0 or -1 is off. min_p: [0, 1], relative to the most probable token.
    seed: makes the request repeatable, whatever else runs beside it. None or -1: drawn by the engine.
    stop: strings that end the text (not part of it unless include_stop_str_in_output).
    stop_token_ids: ids that end the sequence; they stay in `token_ids`.
    ignore_eos, max_tokens (>= 1; None: to the end of the context), min_tokens (no end before).
    logprobs: alternatives a generated token (the sampled one always comes along). prompt_logprobs: for the prompt.
    detokenize, skip_special_tokens, spaces_between_special_tokens, include_stop_str_in_output: the text.
    output_kind: what streamed outputs carry. logit_bias: {token id: bias in [-100, 100]}, at most 1024 entries.
    allowed_token_ids: only these can be sampled. bad_words: words that are not generated.
    skip_reading_prefix_cache: compute the whole prompt. extra_args: carried along for callers; the engine reads none.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    skip_reading_prefix_cache: bool | None = None
    extra_args: dict[str, Any] | None = None

    def __new__(cls, *args: Any, **kwargs: Any):
        refuse_unknown("SamplingParams", kwargs, [f.name for f in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._normalise()
        self._check_ranges()
        self._check_kinds()
        self._check_lists()
        if self.greedy:  # only now: what is off must be right all the same
            for name, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
                self._set(name, off)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _normalise(self) -> None:
        self._set("stop", (self.stop,) if isinstance(self.stop, str) else _as_tuple("stop", self.stop))
        for name in ("stop_token_ids", "bad_words"):
            self._set(name, _as_tuple(name, getattr(self, name)))
        if self.allowed_token_ids is not None:
            self._set("allowed_token_ids", _as_tuple("allowed_token_ids", self.allowed_token_ids))
        if self.seed == -1:
            self._set("seed", None)
        if self.top_k == -1:
            self._set("top_k", 0)
        if self.logprobs is True:
            self._set("logprobs", 1)
        if self.skip_reading_prefix_cache is None:
            self._set("skip_reading_prefix_cache", self.prompt_logprobs is not None)
        if _is_finite(self.temperature) and 0 <= self.temperature < MIN_TEMPERATURE:
            self._set("temperature", 0.0 if self.temperature < SAMPLING_EPS else MIN_TEMPERATURE)
        if isinstance(self.logit_bias, dict):
            self._set("logit_bias", {_as_id(k): _as_bias(v) for k, v in self.logit_bias.items()})

    def _check_ranges(self) -> None:
        ok_n = _is_int(self.n) and 1 <= self.n <= MAX_NUM_SAMPLES
        _check(ok_n, "n", f"an integer in 1..{MAX_NUM_SAMPLES}", self.n)
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(_is_finite(value) and -2 <= value <= 2, name, "a number in [-2, 2]", value)
        value = self.repetition_penalty
        ok_penalty = _is_finite(value) and MIN_FLOAT32 <= value <= MAX_FLOAT32
        _check(ok_penalty, "repetition_penalty", "a number > 0 that float32 can hold", value)
        self._set("repetition_penalty", float(value))  # it may be an int of a hundred bits
        _check(
            _is_finite(self.temperature) and 0 <= self.temperature <= 2, "temperature", "a number in [0, 2]", self.temperature
        )
        _check(_is_finite(self.top_p) and 0 < self.top_p <= 1, "top_p", "a number in (0, 1]", self.top_p)
        _check(_is_int(self.top_k) and self.top_k >= 0, "top_k", "0 or -1 (off), or a positive integer of 64 bits", self.top_k)
        _check(_is_finite(self.min_p) and 0 <= self.min_p <= 1, "min_p", "a number in [0, 1]", self.min_p)
        ok_seed = self.seed is None or (_is_int(self.seed) and -(2**63) <= self.seed < 2**64)
        _check(ok_seed, "seed", "None or a 64-bit integer", self.seed)
        ok_max = self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens >= 1)
        _check(ok_max, "max_tokens", "None or an integer >= 1 (of 64 bits)", self.max_tokens)
        _check(_is_int(self.min_tokens) and self.min_tokens >= 0, "min_tokens", "an integer >= 0 (of 64 bits)", self.min_tokens)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) must not be larger than max_tokens ({self.max_tokens}).", "min_tokens"
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _check(value is None or (_is_int(value) and value >= -1), name, "None, -1 (all) or an integer >= 0", value)
        if self.n > 1 and self.temperature == 0.0:
            raise RequestError(f"n must be 1 when using greedy sampling, got {self.n}; set temperature > 0.", "n")

    def _check_kinds(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "bool" or f.name == "skip_reading_prefix_cache":  # which is no longer None
                _check(isinstance(value, bool), f.name, "True or False", value)
        kinds = ", ".join(f"RequestOutputKind.{kind.name}" for kind in RequestOutputKind)
        _check(isinstance(self.output_kind, RequestOutputKind), "output_kind", f"one of {kinds}", self.output_kind)

    def _check_lists(self) -> None:
        _check(all(isinstance(s, str) and s for s in self.stop or ()), "stop", "non-empty strings", self.stop)
        if self.stop and not self.detokenize:
            raise RequestError("stop strings need detokenize=True; use stop_token_ids instead.", "stop")
        for name in ("stop_token_ids", "allowed_token_ids"):
            value = getattr(self, name) or ()
            _check(all(_is_int(t) and t >= 0 for t in value), name, "token ids (integers >= 0)", value)
        _check(
            self.allowed_token_ids is None or len(self.allowed_token_ids) > 0,
            "allowed_token_ids",
            "None or a non-empty list",
            self.allowed_token_ids,
        )
        words = self.bad_words or ()
        _check(all(isinstance(w, str) and w for w in words), "bad_words", "non-empty strings", words)
        _check(len(words) <= MAX_BAD_WORDS, "bad_words", f"at most {MAX_BAD_WORDS} words", len(words))
        longest = max(map(len, words), default=0)
        _check(longest <= MAX_BAD_WORD, "bad_words", f"words of at most {MAX_BAD_WORD} characters", longest)
        _check(
            self.logit_bias is None or isinstance(self.logit_bias, dict),
            "logit_bias",
            "a dict of token id -> bias",
            self.logit_bias,
        )
        _check(
            len(self.logit_bias or ()) <= MAX_LOGIT_BIAS,
            "logit_bias",
            f"at most {MAX_LOGIT_BIAS} entries",
            len(self.logit_bias or ()),
        )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def clone(self, **changes: Any) -> SamplingParams:
        if self.skip_reading_prefix_cache == (self.prompt_logprobs is not None):  # as it is by default: find it anew
            changes = {"skip_reading_prefix_cache": None, **changes}
        return replace(self, **changes)


def _as_tuple(name: str, value: Any) -> tuple:
    if isinstance(value, (str, bytes, dict)) or not (value is None or hasattr(value, "__iter__")):
        raise RequestError(f"{name} must be a list, got {value!r}.", name)
    return () if value is None else tuple(value)


def _as_id(key: Any) -> int:
    """JSON has string keys: "50256" is taken for 50256, anything else is refused."""
    if _is_int(key) and key >= 0:
        return key
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= MAX_DIGITS:
        return int(key)
    raise RequestError(f"logit_bias keys must be token ids (integers >= 0), got {reprlib.repr(key)}.", "logit_bias")


def _as_bias(value: Any) -> float:
    if not _is_finite(value):
        raise RequestError(f"logit_bias values must be finite numbers, got {value!r}.", "logit_bias")
    return max(-100.0, min(100.0, float(value)))


@dataclass(frozen=True)
class BeamSearchParams:
    """Beam search, as in vLLM: keep the `beam_width` sequences of highest score, where
    score = sum of logprobs / length ** length_penalty."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __new__(cls, *args: Any, **kwargs: Any):
        refuse_unknown("BeamSearchParams", kwargs, [f.name for f in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        _check(_is_int(self.beam_width) and self.beam_width >= 1, "beam_width", "an integer >= 1", self.beam_width)
        _check(_is_int(self.max_tokens) and self.max_tokens >= 1, "max_tokens", "an integer >= 1", self.max_tokens)
        _check(_is_finite(self.length_penalty), "length_penalty", "a finite number", self.length_penalty)
        _check(self.temperature == 0.0, "temperature", "0 (beam search is not sampled here)", self.temperature)


POOLINGS = ("last", "mean")


@dataclass(frozen=True)
class PoolingParams:
    """How to turn a prompt into one vector, its embedding; nothing is generated.

    pooling: of the prompt's hidden states (the final norm's outputs, one a token): the "last" one, or their "mean".
    use_activation: scale the vector to length 1 (the name is vLLM's).
    dimensions: only the first so many numbers of it, scaled after the cut; for models that were trained for that
      (Kusupati et al. 2022, Matryoshka representation learning). None: all.
    skip_reading_prefix_cache: compute the whole prompt, which the mean always does. None: only then.
    """

    pooling: str = "last"
    use_activation: bool = True
    dimensions: int | None = None
    skip_reading_prefix_cache: bool | None = None

    def __new__(cls, *args: Any, **kwargs: Any):
        refuse_unknown("PoolingParams", kwargs, [f.name for f in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        _check(self.pooling in POOLINGS, "pooling", f"one of {', '.join(POOLINGS)}", self.pooling)
        _check(isinstance(self.use_activation, bool), "use_activation", "True or False", self.use_activation)
        ok_dimensions = self.dimensions is None or (_is_int(self.dimensions) and self.dimensions >= 1)
        _check(ok_dimensions, "dimensions", "None or an integer >= 1", self.dimensions)
        skip, needed = self.skip_reading_prefix_cache, self.pooling == "mean"
        _check(skip is None or isinstance(skip, bool), "skip_reading_prefix_cache", "None, True or False", skip)
        _check(skip is not False or not needed, "skip_reading_prefix_cache", "None or True for the mean of all tokens", skip)
        object.__setattr__(self, "skip_reading_prefix_cache", needed if skip is None else skip)

    @property
    def output_kind(self) -> RequestOutputKind:
        """There is one output, the last."""
        return RequestOutputKind.FINAL_ONLY


@dataclass(frozen=True)
class Request:
    """One prompt to complete, or to pool. The engine turns n > 1 into n requests of one sequence each before scheduling.

    id: unique among live requests. prompt: token ids. arrival: order of arrival, given by the engine (fcfs, ties).
    priority: lower first (policy "priority"). cache_salt: requests share pages only with requests of the same salt.
    stop_ids: every token id that ends the sequence: EOS ids (unless ignore_eos) and params.stop_token_ids.
    max_total_tokens: prompt and output together, limited by max_model_len; both filled in by the engine at admission.
    bad_words_ids: params.bad_words as token ids: a word's last token is banned where those before it have been generated.
    pooling: None, or the vector to make instead of sampling: the sequence ends when its prompt has been computed.
    adapter: the LoRA adapter to compute it with.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    arrival: int = 0
    cache_salt: str = ""
    stop_ids: frozenset[int] = frozenset()
    max_total_tokens: int = 0
    prompt_text: str | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    pooling: PoolingParams | None = None
    adapter: Adapter | None = None

    @property
    def salt(self) -> str:
        """Pages are shared with requests of the same salt and the same version of the same adapter only."""
        return self.cache_salt if self.adapter is None else f"{self.cache_salt}\0{self.adapter.key}"


@dataclass(frozen=True)
class Logprob:
    """Natural-log probability of a token under the model (before penalties and temperature), its rank (1 = most
    probable) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request in seconds on the monotonic clock, and counts."""

    arrival_time: float = 0.0
    scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    num_generation_tokens: int = 0
    num_preemptions: int = 0


@dataclass(slots=True)
class CompletionOutput:
    """One sampled continuation. `stop_reason`: the stop string or the stop token id that ended it, None for EOS."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """What `LLM.generate` returns for a prompt. `error` is the message when a sequence ended with reason "error"."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    error: str | None = None
    lora_request: LoRARequest | None = None


@dataclass(frozen=True)
class EmbeddingOutput:
    """A prompt's vector, of float32 values."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(frozen=True)
class EmbeddingRequestOutput:
    """What `LLM.embed` returns for a prompt. `outputs` is None where the request failed or was aborted; `error` says why."""

    request_id: str
    outputs: EmbeddingOutput | None
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    error: str | None = None


EngineOutput = RequestOutput | EmbeddingRequestOutput
