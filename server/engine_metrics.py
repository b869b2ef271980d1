"""What the server tells Prometheus about an engine. Names, types, labels and buckets are vLLM's where vLLM has them, so that
its dashboards work with `--metrics-prefix vllm`.

A request is counted once, whatever its `n`; only `request_success` and the latencies between tokens count each sample.
Tokens that arrive together (a request that is not streamed tells them when it ends) count as evenly spaced.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from jaxpaged.async_engine import StepReport, StepTimes, Stream
from jaxpaged.engine import Counters
from jaxpaged.request import (
    EmbeddingRequestOutput,
    EngineOutput,
    FinishReason,
    RequestError,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from jaxpaged.state import Stats
from jaxpaged_server.instruments import Family, Histogram, Recent, Sample, Speed
from jaxpaged_server.metric_names import histograms
from jaxpaged_server.request_times import RequestTimes, request_times

REJECTIONS = ("queue", "draining")  # the reasons that AsyncEngine gives
NUM_RECENT = 32768  # latencies kept for percentiles
SPEED_WINDOW = 5.0  # seconds


class Totals(NamedTuple):
    """Tokens since the start: prompt tokens that had to be computed, counted when their request starts to run (again, if
    it was preempted), and generated tokens."""

    prompt: float
    generation: float


class EngineMetrics:
    """An observer of an AsyncEngine that counts.

    engine: its number. counters: the engine's own. cache_config: what is said about the cache, as labels. num_pages counts
    the null page.
    num_compilations: programs compiled since the warm-up. prefix: before every name.
    """

    def __init__(self, *, model_name: str, max_model_len: int, num_pages: int, cache_config: Mapping[str, str],
                 counters: Counters, num_compilations: Callable[[], int], prefix: str = "jaxpaged",
                 engine: int = 0):  # fmt: skip
        if not re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", prefix):
            raise RequestError(
                f"metrics_prefix must be letters, digits and _, not a digit first, got {prefix!r}.", "metrics_prefix"
            )
        self.engine, self.counters, self.num_compilations, self.prefix = engine, counters, num_compilations, prefix
        self.stats = Stats(0, 0, 0, 0, num_pages - 1, 0, 0, 0)
        self._labels = {"model_name": model_name, "engine": str(engine)}
        self._cache_config = dict(cache_config)
        self._shapes = histograms(max_model_len)
        self._histograms = {name: Histogram(shape.buckets) for name, shape in self._shapes.items()}
        self._prompt_tokens = self._cached_tokens = 0
        self._rejected: dict[str, int] = dict.fromkeys(REJECTIONS, 0)
        self._progress: dict[str, Progress] = {}  # of requests that have begun to answer
        self.recent_ttft, self.recent_gaps = Recent(NUM_RECENT), Recent(NUM_RECENT)
        self._speed = Speed(SPEED_WINDOW)
        self._speed.note(time.monotonic(), self.totals)

    # -- observing -----------------------------------------------------------------------------------------------------

    def submitted(self, stream: Stream) -> None:
        """Nothing to count yet."""

    def rejected(self, reason: str) -> None:
        self._rejected[reason] = self._rejected.get(reason, 0) + 1

    def stepped(self, report: StepReport, streams: dict[str, Stream]) -> None:
        self.stats = report.stats
        for step in report.steps:
            self._count_step(step)
        gaps = Gaps([], [])
        for output in report.outputs:
            stream = streams.get(output.request_id)
            if stream is None:
                continue
            if isinstance(output, RequestOutput):
                self._count_tokens(output, stream.params.output_kind, gaps, report.at)
            if output.finished:
                self._count_finished(output, stream, report.at)
        if gaps.times:
            self._count_gaps(gaps, report.at)
        self._speed.note(report.at, self.totals)

    def _observe(self, name: str, value: float | None) -> None:
        if value is not None:
            self._histograms[name].observe(value)

    def _count_step(self, step: StepTimes) -> None:
        self._observe("iteration_tokens_total", step.num_tokens or None)
        self._observe("step_host_seconds", step.seconds - step.waited)
        self._observe("step_device_wait_seconds", step.waited)

    def _count_tokens(self, output: RequestOutput, kind: RequestOutputKind, gaps: Gaps, at: float) -> None:
        progress = self._progress.get(output.request_id)
        if progress is None:
            if output.metrics.first_token_time is None:
                return
            progress = self._progress[output.request_id] = Progress()
            self._count_first_token(output, at)
        progress.advance(output, kind, gaps)

    def _count_first_token(self, output: RequestOutput, at: float) -> None:
        first_token = request_times(output.metrics, at).first_token
        self._observe("time_to_first_token_seconds", first_token)
        self.recent_ttft.add(at, np.array([first_token]))
        self._count_prompt(output)

    def _count_prompt(self, output: EngineOutput) -> None:
        self._prompt_tokens += len(output.prompt_token_ids)
        self._cached_tokens += output.num_cached_tokens

    def _count_gaps(self, gaps: Gaps, at: float) -> None:
        seconds, times = np.array(gaps.seconds), np.array(gaps.times)
        self._histograms["inter_token_latency_seconds"].observe_many(seconds, times)
        self.recent_gaps.add(at, np.repeat(seconds, times))

    def _count_finished(self, output: EngineOutput, stream: Stream, at: float) -> None:
        times = request_times(output.metrics, at)
        self._observe("e2e_request_latency_seconds", times.e2e)
        self._observe("request_queue_time_seconds", times.queue)
        self._observe("request_prefill_time_seconds", times.prefill)
        self._observe("request_decode_time_seconds", times.decode)
        self._observe("request_inference_time_seconds", times.inference)
        self._observe("request_prompt_tokens", len(output.prompt_token_ids))
        self._observe("request_num_preemptions", output.metrics.num_preemptions)
        if times.prefill is not None:
            self._observe("request_prefill_kv_computed_tokens", len(output.prompt_token_ids) - output.num_cached_tokens)
        if isinstance(stream.params, SamplingParams):
            self._count_generation(output, stream.params, times)
        elif isinstance(output, EmbeddingRequestOutput) and output.outputs is not None:
            self._count_prompt(output)

    def _count_generation(self, output: EngineOutput, params: SamplingParams, times: RequestTimes) -> None:
        num_tokens, progress = output.metrics.num_generation_tokens, self._progress.pop(output.request_id, Progress())
        self._observe("request_params_n", params.n)
        self._observe("request_params_max_tokens", params.max_tokens)
        self._observe("request_generation_tokens", num_tokens)
        self._observe("request_max_num_generation_tokens", progress.longest)
        if times.decode is not None and num_tokens > params.n:  # the first token of a sample is the prefill's
            self._observe("request_time_per_output_token_seconds", times.decode * params.n / (num_tokens - params.n))

    # -- telling -------------------------------------------------------------------------------------------------------

    @property
    def totals(self) -> Totals:
        return Totals(self.stats.prefix_queries - self.stats.prefix_hits, self.counters.generated_tokens)

    @property
    def kv_cache_usage(self) -> float:
        """The part of the pages that requests hold, 0..1."""
        return self.stats.num_held_pages / (self.stats.num_held_pages + self.stats.num_free_pages)

    def throughput(self) -> Totals:
        """Tokens a second, of `totals`, over the last SPEED_WINDOW seconds."""
        return Totals(*self._speed.read(time.monotonic()))

    def families(self) -> list[Family]:
        """The same ones in the same order for every engine."""
        return [*self._gauges(), *self._counters(), *self._all_histograms()]

    def _gauges(self) -> list[Family]:
        s = self.stats
        blank = s.num_free_pages - s.num_cached_pages
        return [
            self._family("gauge", "num_requests_running", "Number of requests in model execution batches.", s.num_running),
            self._family("gauge", "num_requests_waiting", "Number of requests waiting to be processed.", s.num_waiting),
            self._family("gauge", "num_requests_waiting_by_reason", "Number of waiting requests by reason.",
                         {"capacity": s.num_waiting}, "reason"),
            self._family("gauge", "kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", self.kv_cache_usage),
            self._family("gauge", "kv_cache_pages", "Pages: held by requests, cached for their contents, free (blank).",
                         {"free": blank, "held": s.num_held_pages, "cached": s.num_cached_pages}, "state"),
            Family("gauge", self._name("cache_config_info"), "Information of the KV cache's configuration.",
                   [Sample({**self._cache_config, "engine": self._labels["engine"]}, 1)]),
        ]  # fmt: skip

    def _counters(self) -> list[Family]:
        counter = lambda *arguments: self._family("counter", *arguments)
        s, computed = self.stats, self._prompt_tokens - self._cached_tokens
        return [
            counter("prefix_cache_queries", "Prefix cache queries, in terms of number of queried tokens.", s.prefix_queries),
            counter("prefix_cache_hits", "Prefix cache hits, in terms of number of cached tokens.", s.prefix_hits),
            counter("num_preemptions", "Cumulative number of preemption from the engine.", s.num_preemptions),
            counter("prompt_tokens", "Number of prefill tokens processed.", self._prompt_tokens),
            counter("prompt_tokens_by_source", "Number of prompt tokens by source.",
                    {"local_compute": computed, "local_cache_hit": self._cached_tokens}, "source"),
            counter("prompt_tokens_cached", "Number of cached prompt tokens.", self._cached_tokens),
            counter("generation_tokens", "Number of generation tokens processed.", self.counters.generated_tokens),
            counter("request_success", "Count of requests by the reason that ended them (of n samples, each counts).",
                    {str(reason): self.counters.finished.get(reason, 0) for reason in FinishReason}, "finished_reason"),
            counter("admission_rejections", "Number of admission attempts rejected by a limit, by reason.", self._rejected,
                    "reason"),
            counter("engine_steps", "Steps that were dispatched to the device.", self.counters.steps),
            counter("failed_steps", "Steps that failed; their requests ended with an error.", self.counters.failed_steps),
            counter("recompiles", "Programs compiled since the warm-up: 0, or something is wrong.", self.num_compilations()),
        ]  # fmt: skip

    def _all_histograms(self) -> list[Family]:
        return [
            Family("histogram", self._name(name), self._shapes[name].help, [Sample(self._labels, histogram)])
            for name, histogram in self._histograms.items()
        ]

    def _family(self, kind: str, name: str, help: str, value: float | Mapping[str, float], label: str = "") -> Family:
        """A metric with the engine's labels, and with one of its own if `value` has a value for each of that label's."""
        if isinstance(value, Mapping):
            samples = [Sample({**self._labels, label: key}, of_key) for key, of_key in value.items()]
        else:
            samples = [Sample(self._labels, value)]
        return Family(kind, self._name(name), help, samples)

    def _name(self, name: str) -> str:
        return f"{self.prefix}:{name}"


class Gaps(NamedTuple):
    """What a step tells of the time between tokens: times[i] tokens came seconds[i] after one another."""

    seconds: list[float]
    times: list[int]


class Progress:
    """How far each sample of a request is."""

    def __init__(self) -> None:
        self._told: dict[int, tuple[int, float]] = {}  # sample -> (tokens, when the last of them came)

    def advance(self, output: RequestOutput, kind: RequestOutputKind, gaps: Gaps) -> None:
        """Takes in the tokens that are new, and adds to `gaps` how they came after those before."""
        first, last = output.metrics.first_token_time, output.metrics.last_token_time
        assert first is not None and last is not None, "a token has come"
        for completion in output.outputs:
            before, at = self._told.get(completion.index, (0, first))
            total = len(completion.token_ids) + (before if kind is RequestOutputKind.DELTA else 0)
            new = total - max(before, 1)  # nothing comes before a sample's first token
            if new > 0:
                gaps.seconds.append((last - at) / new)
                gaps.times.append(new)
            self._told[completion.index] = total, last

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max((tokens for tokens, _ in self._told.values()), default=0)
