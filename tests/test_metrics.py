"""What the server tells about itself equals what was sent to it: a real AsyncEngine on the paper cache, its exposition read
as Prometheus reads it."""

import asyncio
import contextlib
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeRunner
from prometheus_client import parser
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Mount, Route

from jaxpaged.async_engine import AsyncEngine, StepReport, StepTimes, Stream
from jaxpaged.batch import ladder
from jaxpaged.engine import Counters, Engine
from jaxpaged.request import (
    CompletionOutput,
    PoolingParams,
    RequestError,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from jaxpaged.state import Limits, Stats
from jaxpaged_server.engine_metrics import EngineMetrics
from jaxpaged_server.http_metrics import HttpMetrics
from jaxpaged_server.instruments import Recent, Speed, percentiles
from jaxpaged_server.metrics import Metrics
from jaxpaged_server.summary import Summary

OBSERVABILITY = Path(__file__).parent.parent / "examples" / "observability"
LABELS = {"model_name": "paper", "engine": "0"}
DELTA, CUMULATIVE, FINAL = RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY
NOTHING = Stats(0, 0, 0, 0, 39, 0, 0, 0)


def make_engine(**changes) -> Engine:
    base = dict(max_num_seqs=4, max_num_batched_tokens=16, page_size=4, num_pages=40, max_model_len=64, vocab_size=50)
    fail_at, step_seconds = changes.pop("fail_at", frozenset()), changes.pop("step_seconds", 0.0)
    limits = Limits(**{**base, **changes})
    return Engine(limits, FakeRunner(limits, fail_at, step_seconds), ladder(limits.max_num_batched_tokens, limits.max_num_seqs))


def make_metrics(counters: Counters, **changes) -> Metrics:
    return Metrics([EngineMetrics(**{
        "model_name": "paper", "max_model_len": 64, "num_pages": 40, "cache_config": {"block_size": "4"}, "counters": counters,
        "num_compilations": lambda: 0, **changes,
    })])  # fmt: skip


@contextlib.asynccontextmanager
async def serving(engine: Engine | None = None, max_num_queued_reqs: int | None = None, **changes):
    engine = engine or make_engine()
    metrics = make_metrics(engine.counters, **changes)
    serving = AsyncEngine(engine, metrics.engines, max_num_queued_reqs)
    serving.start()
    try:
        yield serving, metrics
    finally:
        await serving.close()


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 8, "ignore_eos": True, "output_kind": DELTA, **changes})


async def answer(engine: AsyncEngine, request_id: str, prompt: list[int], wanted) -> None:
    with engine.submit(request_id, prompt, wanted) as stream:
        async for _ in stream:
            pass


class Scrape:
    """An exposition, read: scrape("name", label=...) is a value of the engine's, None if there is no such."""

    def __init__(self, metrics: Metrics, prefix: str = "jaxpaged"):
        text = metrics.exposition()[0].decode()
        self.families = {family.name: family for family in parser.text_string_to_metric_families(text)}
        self.values = {
            (s.name, frozenset(s.labels.items())): s.value for family in self.families.values() for s in family.samples
        }
        self.prefix = prefix

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.values.get((f"{self.prefix}:{name}", frozenset({**LABELS, **labels}.items())))

    def bare(self, name: str, **labels: str) -> float | None:
        return self.values.get((name, frozenset(labels.items())))

    def buckets(self, name: str) -> list[float]:
        found = [s.labels["le"] for s in self.families[f"{self.prefix}:{name}"].samples if s.name.endswith("_bucket")]
        return [float(bound) for bound in found]


# -- the engine ------------------------------------------------------------------------------------------------------------


def test_totals_equal_what_was_sent():
    async def run() -> Scrape:
        async with serving() as (engine, metrics):
            await answer(engine, "a", list(range(10)), params(max_tokens=5))
            await answer(engine, "b", list(range(10)), params(max_tokens=7, output_kind=FINAL))
            await answer(engine, "c", [9, 9, 9], params(max_tokens=6, output_kind=CUMULATIVE))
            await answer(engine, "d", [8, 8, 8], params(n=3, temperature=1.0, max_tokens=4, output_kind=FINAL))
            await answer(engine, "e", [7, 7, 7], params(n=2, temperature=1.0, max_tokens=9))
            await answer(engine, "f", [6, 6, 6], PoolingParams())
            return Scrape(metrics)

    scrape = asyncio.run(run())
    generated = 5 + 7 + 6 + 3 * 4 + 2 * 9
    assert scrape("generation_tokens_total") == scrape("request_generation_tokens_sum") == generated
    assert scrape("prompt_tokens_total") == scrape("request_prompt_tokens_sum") == 10 + 10 + 3 + 3 + 3 + 3
    assert scrape("prompt_tokens_by_source_total", source="local_cache_hit") == 8  # two pages of b
    assert scrape("prompt_tokens_by_source_total", source="local_compute") == 32 - 8
    assert scrape("prompt_tokens_cached_total") == 8 and scrape("prefix_cache_hits_total") >= 8
    assert scrape("request_success_total", finished_reason="length") == 1 + 1 + 1 + 3 + 2
    assert scrape("request_success_total", finished_reason="stop") == 1  # the embedding
    for reason in ("abort", "error"):
        assert scrape("request_success_total", finished_reason=reason) == 0
    for name in (
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prompt_tokens",
        "request_num_preemptions",
    ):
        assert scrape(f"{name}_count") == 6
    for name in ("time_to_first_token_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
                 "request_inference_time_seconds", "request_time_per_output_token_seconds", "request_generation_tokens",
                 "request_max_num_generation_tokens", "request_params_max_tokens", "request_params_n"):  # fmt: skip
        assert scrape(f"{name}_count") == 5
    assert scrape("inter_token_latency_seconds_count") == generated - 8  # samples; their first tokens have nothing before
    assert scrape("request_params_n_sum") == 1 + 1 + 1 + 3 + 2
    assert scrape("request_params_max_tokens_sum") == scrape("request_max_num_generation_tokens_sum") == 5 + 7 + 6 + 4 + 9
    assert scrape("request_prefill_kv_computed_tokens_sum") == 29 - 8
    assert scrape("engine_steps_total") == scrape("iteration_tokens_total_count")
    assert scrape("step_host_seconds_count") == scrape("step_device_wait_seconds_count") >= scrape("engine_steps_total")


def test_before_anything_happens_all_is_there_and_zero():
    scrape = Scrape(make_metrics(Counters()))
    for reason in ("stop", "length", "abort", "error"):
        assert scrape("request_success_total", finished_reason=reason) == 0
    assert [scrape("admission_rejections_total", reason=reason) for reason in ("queue", "draining")] == [0, 0]
    assert [scrape("kv_cache_pages", state=state) for state in ("free", "held", "cached")] == [39, 0, 0]
    assert scrape("num_requests_running") == scrape("num_requests_waiting") == scrape("kv_cache_usage_perc") == 0
    assert scrape("time_to_first_token_seconds_count") == scrape("generation_tokens_total") == scrape("recompiles_total") == 0
    assert scrape.bare("jaxpaged:cache_config_info", block_size="4", engine="0") == 1


def test_buckets_are_those_of_vllm():
    """The lists are written down here once more: dashboards compute with them."""
    scrape, inf = Scrape(make_metrics(Counters(), max_model_len=40960)), float("inf")
    assert scrape.buckets("time_to_first_token_seconds") == [
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560, inf
    ]  # fmt: skip
    between = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, inf]
    assert scrape.buckets("inter_token_latency_seconds") == between
    assert scrape.buckets("request_time_per_output_token_seconds") == between
    request = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680, inf]
    for name in (
        "e2e_request_latency",
        "request_queue_time",
        "request_prefill_time",
        "request_decode_time",
        "request_inference_time",
    ):
        assert scrape.buckets(f"{name}_seconds") == request
    tokens = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, inf]
    for name in ("request_prompt_tokens", "request_generation_tokens", "request_params_max_tokens"):
        assert scrape.buckets(name) == tokens
    assert scrape.buckets("iteration_tokens_total") == [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, inf]
    assert scrape.buckets("request_params_n") == [1, 2, 5, 10, 20, inf]


def test_a_request_that_runs_is_seen_and_one_that_is_aborted_is_counted_as_that():
    async def run() -> tuple[Scrape, Scrape]:
        async with serving(make_engine(max_num_seqs=1, step_seconds=0.02)) as (engine, metrics):
            running = engine.submit("a", [1, 2, 3], params(max_tokens=60))
            waiting = engine.submit("b", [1, 2, 3], params(max_tokens=60))
            for _ in range(3):  # the engine knows of both
                await anext(running)
            during = Scrape(metrics)
            waiting.close()
            running.close()
            assert await engine.drain(10)
            return during, Scrape(metrics)

    during, after = asyncio.run(run())
    assert during("num_requests_running") == during("num_requests_waiting") == 1
    assert during("num_requests_waiting_by_reason", reason="capacity") == 1
    assert during("kv_cache_usage_perc") == during("kv_cache_pages", state="held") / 39 > 0
    assert during("time_to_first_token_seconds_count") == 1 and during("prompt_tokens_total") == 3
    assert during("e2e_request_latency_seconds_count") == 0
    assert after("request_success_total", finished_reason="abort") == 2
    assert after("request_success_total", finished_reason="length") == 0
    assert after("num_requests_running") == after("num_requests_waiting") == 0
    assert after("e2e_request_latency_seconds_count") == 2
    assert after("request_queue_time_seconds_count") == after("request_prefill_time_seconds_count") == 1  # b never ran
    assert after("prompt_tokens_total") == 3
    assert sum(after("kv_cache_pages", state=state) for state in ("free", "held", "cached")) == 39


def test_failed_steps_and_their_requests():
    async def run() -> Scrape:
        async with serving(make_engine(fail_at=frozenset({3}))) as (engine, metrics):
            await answer(engine, "a", [1, 2, 3], params())
            await answer(engine, "b", [1, 2, 3], params())
            return Scrape(metrics)

    scrape = asyncio.run(run())
    assert scrape("failed_steps_total") == 1
    assert scrape("request_success_total", finished_reason="error") == 1
    assert scrape("request_success_total", finished_reason="length") == 1


def test_rejected_requests_are_counted_by_reason():
    async def run() -> Scrape:
        async with serving(max_num_queued_reqs=0) as (engine, metrics):
            engine.engine._num_queued = 1
            with pytest.raises(RequestError, match="max_num_queued_reqs is 0"):
                engine.submit("a", [1], params())
            assert await engine.drain(10)
            for _ in range(2):
                with pytest.raises(RequestError, match="shutting down"):
                    engine.submit("a", [1], params())
            return Scrape(metrics)

    scrape = asyncio.run(run())
    assert scrape("admission_rejections_total", reason="queue") == 1
    assert scrape("admission_rejections_total", reason="draining") == 2


def test_preemptions():
    async def run() -> tuple[Scrape, Engine]:
        async with serving(make_engine(num_pages=12)) as (engine, metrics):
            streams = [engine.submit(str(i), [i] * 8, params(max_tokens=30)) for i in range(4)]
            await asyncio.gather(*(stream.last() for stream in streams))
            return Scrape(metrics), engine.engine

    scrape, engine = asyncio.run(run())
    assert scrape("num_preemptions_total") == engine.stats().num_preemptions > 0
    assert scrape("request_num_preemptions_sum") == engine.stats().num_preemptions
    assert scrape("generation_tokens_total") == 4 * 30 and scrape("inter_token_latency_seconds_count") == 4 * 29


def test_with_vllms_prefix_its_dashboards_find_their_metrics():
    async def run() -> tuple[Scrape, str]:
        async with serving(prefix="vllm", num_compilations=lambda: 2) as (engine, metrics):
            await answer(engine, "a", [1, 2, 3], params())
            return Scrape(metrics, "vllm"), metrics.exposition()[1]

    scrape, content_type = asyncio.run(run())
    assert scrape("generation_tokens_total") == 8 and scrape("recompiles_total") == 2
    assert not [name for name in scrape.families if name.startswith("jaxpaged")]
    assert "process_resident_memory_bytes" in scrape.families
    assert content_type.startswith("text/plain; version=0.0.4")


def test_a_prefix_that_prometheus_would_refuse_is_refused():
    with pytest.raises(RequestError, match="metrics_prefix must be .* got 'my-prefix'"):
        make_metrics(Counters(), prefix="my-prefix")


# -- latencies -------------------------------------------------------------------------------------------------------------


def told(request_id: str, tokens: dict[int, int], first: float, last: float, finished: bool = False) -> RequestOutput:
    """An output at time `last`, of a request that came at 0; tokens: sample -> tokens in this output."""
    outputs = [CompletionOutput(i, "", [0] * n, finish_reason="length" if finished else None) for i, n in tokens.items()]
    times = RequestMetrics(0.0, 0.5, first, last, sum(tokens.values()))
    return RequestOutput(request_id, None, [1, 2], outputs, finished, metrics=times)


def step(metrics: Metrics, wanted: SamplingParams, *outputs: RequestOutput) -> None:
    streams = {o.request_id: Stream(None, o.request_id, wanted, 2) for o in outputs}
    at = max(o.metrics.last_token_time for o in outputs)
    metrics.engines[0].stepped(StepReport(list(outputs), NOTHING, [StepTimes(1, 0.25, 0.125)], at), streams)


def test_time_between_tokens_is_that_of_each_sample():
    metrics = make_metrics(Counters())
    wanted = params(n=2, temperature=1.0)
    step(metrics, wanted, told("a", {0: 1}, 1.0, 1.0))
    step(metrics, wanted, told("a", {0: 1, 1: 1}, 1.0, 1.0625))  # 0.0625 s; sample 1 begins
    step(metrics, wanted, told("a", {0: 1, 1: 1}, 1.0, 1.5625))  # 0.5 s, twice: a bucket's bound belongs to it
    step(metrics, wanted, told("a", {1: 1}, 1.0, 1.8125, finished=True))  # 0.25 s
    scrape = Scrape(metrics)
    assert scrape("inter_token_latency_seconds_sum") == 0.0625 + 2 * 0.5 + 0.25
    bucket = lambda le: scrape("inter_token_latency_seconds_bucket", le=le)
    assert [bucket(le) for le in ("0.05", "0.075", "0.2", "0.3", "0.4", "0.5", "+Inf")] == [0, 1, 1, 2, 2, 4, 4]
    assert scrape("time_to_first_token_seconds_sum") == 1.0 and scrape("time_to_first_token_seconds_bucket", le="1.0") == 1
    assert scrape("request_queue_time_seconds_sum") == scrape("request_prefill_time_seconds_sum") == 0.5
    assert scrape("request_decode_time_seconds_sum") == 0.8125 and scrape("request_inference_time_seconds_sum") == 1.3125
    assert scrape("e2e_request_latency_seconds_sum") == 1.8125


def test_tokens_that_come_together_are_evenly_spaced():
    metrics = make_metrics(Counters())
    step(metrics, params(output_kind=FINAL, n=2, temperature=1.0), told("a", {0: 5, 1: 3}, 1.0, 2.0, finished=True))
    scrape = Scrape(metrics)
    assert scrape("inter_token_latency_seconds_count") == 4 + 2
    assert scrape("inter_token_latency_seconds_sum") == 2.0
    assert scrape("inter_token_latency_seconds_bucket", le="0.3") == 4  # 0.25 s each; the others took 0.5 s
    assert scrape("request_time_per_output_token_seconds_sum") == pytest.approx(2 / 6)
    assert scrape("step_host_seconds_sum") == 0.125 and scrape("step_device_wait_seconds_sum") == 0.125


def test_live_percentiles_and_throughput():
    async def run() -> Metrics:
        async with serving() as (engine, metrics):
            assert metrics.latencies()["ttft"] == metrics.latencies()["itl"] == {"p50": None, "p90": None, "p99": None}
            assert metrics.throughput() == {"prompt": 0.0, "generation": 0.0}
            await answer(engine, "a", list(range(12)), params(max_tokens=20))
            return metrics

    metrics = asyncio.run(run())
    for latency in metrics.latencies().values():
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] < 5
    assert metrics.latencies(0) == {"ttft": dict.fromkeys(("p50", "p90", "p99")), "itl": dict.fromkeys(("p50", "p90", "p99"))}
    assert metrics.throughput() == {"prompt": 12 / 5, "generation": 20 / 5}  # within the last 5 s


def test_recent_values_forget_the_oldest():
    recent = Recent(4)
    recent.add(1.0, np.array([1.0, 1.0, 1.0]))
    recent.add(2.0, np.array([2.0, 2.0, 4.0]))
    assert percentiles([recent], 0)["p50"] == 2.0 and percentiles([recent], 1.5)["p99"] > 3.9
    recent.add(3.0, np.arange(100.0))
    assert percentiles([recent], 0)["p50"] == 97.5
    assert percentiles([recent], 3.0)["p50"] is None


def test_percentiles_are_of_all_engines_together():
    slow, fast, idle = Recent(4), Recent(4), Recent(4)
    fast.add(2.0, np.array([1.0, 1.0, 1.0]))
    slow.add(1.0, np.array([9.0, 9.0]))
    assert percentiles([slow, fast, idle], 0)["p50"] == 1.0 and percentiles([slow, fast, idle], 0)["p99"] == 9.0
    assert percentiles([slow, fast, idle], 1.5)["p99"] == 1.0 and percentiles([slow, idle], 1.5)["p50"] is None


def test_speed_is_the_growth_over_the_window():
    speed = Speed(window=5.0)
    for i in range(400):  # 20 tokens a second, noted every 25 ms, for 10 s
        speed.note(i / 40, (i / 2,))
    assert speed.read(10.0) == [pytest.approx(20, rel=0.03)]
    assert speed.read(14.0) == [pytest.approx(20 / 5, rel=0.1)] and speed.read(16.0) == [0]


# -- the line in the log ---------------------------------------------------------------------------------------------------

LINE = re.compile(
    r"Engine 000: Avg prompt throughput: (.+) tokens/s, Avg generation throughput: (.+) tokens/s, Running: (.+) reqs, "
    r"Waiting: (.+) reqs, KV cache usage: (.+)%, Prefix cache hit rate: (.+)%"
)


def test_the_summary_comes_while_there_is_work_and_once_after(caplog):
    async def run() -> None:
        async with serving(make_engine(max_num_seqs=1, max_model_len=4096, num_pages=2000)) as (engine, metrics):
            engine.observers.append(Summary(metrics.engines[0], interval=0.05))
            await asyncio.sleep(0.12)
            assert not caplog.records, "nothing to tell yet"
            with engine.submit("a", [1] * 9, params(max_tokens=4000)) as a, engine.submit("b", [1] * 9, params()):
                while len(caplog.records) < 2:
                    await anext(a)
            assert await engine.drain(10)
            await asyncio.sleep(0.2)

    caplog.set_level(logging.INFO, "jaxpaged_server.summary")
    asyncio.run(run())
    lines = [[float(number) for number in LINE.fullmatch(message).groups()] for message in caplog.messages]
    *during, after = lines
    assert len(during) >= 2 and during[0][0] > 0 == during[1][0]
    for _, generation, running, waiting, usage, _ in during:
        assert generation > 0 and (running, waiting) == (1, 1) and 0 < usage <= 100
    assert after[2:5] == [0, 0, 0]


# -- HTTP ------------------------------------------------------------------------------------------------------------------


async def chunks():
    for _ in range(3):
        yield b"12345"


async def echo(request):
    return JSONResponse({"size": len(await request.body()), "load": request.app.state.metrics.server_load})


async def broken(request):
    raise ValueError("a bug")


def bare_app(metrics: Metrics) -> Starlette:
    app = Starlette(routes=[
        Route("/v1/models/{model}", lambda request: JSONResponse({})),
        Route("/v1/echo", echo, methods=["POST"]),
        Route("/v1/stream", lambda request: StreamingResponse(chunks())),
        Route("/broken", broken),
        Route("/health", lambda request: JSONResponse({})),
        Mount("/static", JSONResponse({})),
    ])  # fmt: skip
    app.state.metrics = metrics
    return app


def make_app(metrics: Metrics) -> Starlette:
    app = bare_app(metrics)
    app.add_middleware(HttpMetrics, metrics=metrics)
    return app


async def call(app, path: str, method: str = "GET", body: bytes = b"") -> bytes:
    """Sends a request as a server would; the response's body."""
    received, leave = [], asyncio.Event()

    async def receive():
        if received:
            await leave.wait()
        received.append(True)
        return {"type": "http.request", "body": body, "more_body": False}

    sent = []

    async def send(message):
        sent.append(message.get("body", b""))

    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": [], "query_string": b"",
             "root_path": "", "scheme": "http", "server": ("test", 80), "http_version": "1.1"}  # fmt: skip
    await app(scope, receive, send)
    return b"".join(sent)


@pytest.mark.parametrize("inside", [True, False], ids=["as middleware of the app", "around the app"])
def test_http_requests_are_counted_by_route(inside):
    async def run() -> Scrape:
        metrics = make_metrics(Counters())
        app = make_app(metrics) if inside else HttpMetrics(bare_app(metrics), metrics)
        for i in range(3):
            await call(app, f"/v1/models/{i}")
        assert json.loads(await call(app, "/v1/echo", "POST", b"x" * 100)) == {"size": 100, "load": 1}
        assert metrics.server_load == 0
        await call(app, "/v1/echo")  # 405
        await call(app, "/v1/stream")
        await call(app, "/health")
        await call(app, "/static/a.js")
        for path in ("/a", "/b", "/v1/models"):
            await call(app, path)
        await call(app, "/c", "BREW")
        with pytest.raises(ValueError, match="a bug"):
            await call(app, "/broken")
        return Scrape(metrics)

    scrape = asyncio.run(run())
    requests = {tuple(dict(labels)[k] for k in ("method", "status", "handler")): value
                for (name, labels), value in scrape.values.items() if name == "http_requests_total"}  # fmt: skip
    assert requests == {
        ("GET", "2xx", "/v1/models/{model}"): 3, ("POST", "2xx", "/v1/echo"): 1, ("GET", "4xx", "/v1/echo"): 1,
        ("GET", "2xx", "/v1/stream"): 1, ("GET", "2xx", "/static"): 1, ("GET", "4xx", "none"): 3, ("other", "4xx", "none"): 1,
        ("GET", "5xx", "/broken"): 1,
    }  # fmt: skip
    assert scrape.bare("http_request_size_bytes_sum", handler="/v1/echo") == 100
    assert scrape.bare("http_response_size_bytes_sum", handler="/v1/stream") == 15
    assert scrape.bare("http_request_duration_seconds_count", method="GET", handler="/v1/models/{model}") == 3
    assert scrape.bare("http_request_duration_highr_seconds_count") == sum(requests.values()) == 12
    assert scrape.bare("http_requests_inprogress") == 0


def test_a_client_that_leaves_is_no_error_of_the_server():
    async def endless(request):
        await asyncio.Event().wait()

    async def run() -> Scrape:
        metrics = make_metrics(Counters())
        app = Starlette(routes=[Route("/slow", endless, methods=["POST"])])
        app.add_middleware(HttpMetrics, metrics=metrics)
        task = asyncio.create_task(call(app, "/slow", "POST"))
        while metrics.server_load == 0:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert metrics.server_load == 0
        return Scrape(metrics)

    assert asyncio.run(run()).bare("http_requests_total", method="POST", status="4xx", handler="/slow") == 1


# -- the dashboard ---------------------------------------------------------------------------------------------------------


def dashboard() -> dict:
    return json.loads((OBSERVABILITY / "grafana.json").read_text())


def queries() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]


def test_every_metric_of_the_dashboard_is_exposed():
    async def run() -> Scrape:
        async with serving() as (engine, metrics):
            await answer(engine, "a", [1, 2, 3], params())
            await call(make_app(metrics), "/v1/models/a")
            return Scrape(metrics)

    exposed = {name for name, _ in asyncio.run(run()).values}
    asked = {name.replace("${prefix}", "jaxpaged") for query in queries()
             for name in re.findall(r"(?:\$\{prefix\}:|http_)[a-z0-9_]+", query)}  # fmt: skip
    assert len(asked) >= 20 and not asked - exposed


def test_the_dashboard_is_one_that_grafana_takes():
    board = dashboard()
    names = {variable["name"] for variable in board["templating"]["list"]}
    assert {"datasource", "prefix", "model_name"} <= names
    assert [option["value"] for v in board["templating"]["list"] if v["name"] == "prefix" for option in v["options"]] == [
        "jaxpaged", "vllm",
    ]  # fmt: skip
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids)) and board["uid"] and board["title"] and board["schemaVersion"] >= 38
    cells = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        taken = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24 and not taken & cells, f"{panel['title']} lies over another panel"
        cells |= taken
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"} and panel["targets"]
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for query in queries():
        assert set(re.findall(r"\$\{(\w+)\}", query)) <= names, query
