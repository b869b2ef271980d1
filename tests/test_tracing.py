"""Spans as a collector receives them: a real AsyncEngine on the paper cache, a small OTLP/HTTP collector on a port of this
machine."""

import asyncio
import gzip
import http.server
import importlib.abc
import socket
import sys
import threading
import time

import pytest
from fakes import FakeRunner

from jaxpaged.async_engine import AsyncEngine
from jaxpaged.batch import ladder
from jaxpaged.engine import Engine
from jaxpaged.request import PoolingParams, RequestError, RequestOutputKind, SamplingParams
from jaxpaged.state import Limits
from jaxpaged_server.tracing import Tracing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(http.server.ThreadingHTTPServer):
    """Keeps what is posted to it."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), CollectorHandler)
        self.requests = []
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def spans(self) -> list:
        return [span for r in self.requests for of in r.resource_spans for scope in of.scope_spans for span in scope.spans]

    def stop(self) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


class CollectorHandler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        body = self.rfile.read(int(self.headers["Content-Length"]))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        assert self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf"
        self.server.requests.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def collector():
    collector = Collector()
    yield collector
    collector.stop()


def make_engine(fail_at=frozenset()) -> Engine:
    limits = Limits(max_num_seqs=4, max_num_batched_tokens=16, page_size=4, num_pages=40, max_model_len=64, vocab_size=50)
    return Engine(limits, FakeRunner(limits, fail_at), ladder(16, 4))


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 8, "ignore_eos": True, "output_kind": RequestOutputKind.DELTA, **changes})


def attributes(span) -> dict:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def trace(endpoint: str, scenario, fail_at=frozenset()) -> None:
    """Runs a coroutine function on an engine that is traced; every span has been sent when this returns."""

    async def run() -> None:
        tracing = Tracing(endpoint)
        engine = AsyncEngine(make_engine(fail_at), [tracing])
        engine.start()
        try:
            await scenario(engine)
            assert await engine.drain(10)
        finally:
            await engine.close()
            await asyncio.to_thread(tracing.close)

    asyncio.run(run())


def test_a_span_tells_all_about_its_request(collector):
    async def scenario(engine):
        headers = {"Traceparent": f"00-{TRACE}-{PARENT}-01"}
        with engine.submit("a", [1, 2, 3], params(n=2, temperature=0.5, top_p=0.9), trace_headers=headers) as stream:
            await stream.last()

    before = time.time_ns()
    trace(collector.url, scenario)
    (span,) = collector.spans()
    assert span.name == "llm_request" and span.kind == span.SPAN_KIND_SERVER
    assert span.trace_id.hex() == TRACE and span.parent_span_id.hex() == PARENT
    assert before < span.start_time_unix_nano < span.end_time_unix_nano < time.time_ns()
    found = attributes(span)
    latency = {name.removeprefix("gen_ai.latency."): found.pop(name) for name in list(found) if "latency" in name}
    assert found == {
        "gen_ai.request.id": "a", "gen_ai.request.max_tokens": 8, "gen_ai.request.n": 2, "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9, "gen_ai.usage.prompt_tokens": 3, "gen_ai.usage.completion_tokens": 16,
    }  # fmt: skip
    parts = {"time_in_queue", "time_in_model_prefill", "time_in_model_decode", "time_in_model_inference", "time_to_first_token"}
    assert set(latency) == parts | {"e2e"} and all(seconds > 0 for seconds in latency.values())
    assert latency["e2e"] == pytest.approx((span.end_time_unix_nano - span.start_time_unix_nano) / 1e9, abs=1e-3)
    prefill, decode = latency["time_in_model_prefill"], latency["time_in_model_decode"]
    assert latency["time_in_queue"] + prefill == pytest.approx(latency["time_to_first_token"])
    assert prefill + decode == pytest.approx(latency["time_in_model_inference"])
    (resource,) = [of.resource for r in collector.requests for of in r.resource_spans]
    assert attributes(resource)["service.name"] == "jaxpaged"


def test_every_request_has_a_span_however_it_ends(collector):
    async def scenario(engine):
        with engine.submit("vector", [1, 2, 3], PoolingParams()) as stream:  # the first step
            await stream.last()
        with engine.submit("left", [1, 2, 3], params(max_tokens=60)) as stream:
            await anext(stream)
        assert await engine.drain(10)
        engine.draining = False
        with engine.submit("not sampled", [1], params(), trace_headers={"traceparent": f"00-{TRACE}-{PARENT}-00"}) as stream:
            await stream.last()

    trace(collector.url, scenario)
    spans = {attributes(span)["gen_ai.request.id"]: span for span in collector.spans()}
    assert set(spans) == {"vector", "left"}
    assert len({span.trace_id for span in spans.values()}) == 2 and not any(span.parent_span_id for span in spans.values())
    assert "gen_ai.request.max_tokens" not in attributes(spans["vector"])
    assert 1 <= attributes(spans["left"])["gen_ai.usage.completion_tokens"] < 60


def test_a_failed_request_is_marked(collector):
    async def scenario(engine):
        with engine.submit("a", [1, 2, 3], params()) as stream:
            await stream.last()

    trace(collector.url + "/v1/traces", scenario, fail_at=frozenset({2}))
    (span,) = collector.spans()
    assert span.status.code == span.status.STATUS_CODE_ERROR and "out of paper" in span.status.message


def test_without_a_collector_serving_goes_on(caplog):
    with socket.socket() as nobody:  # bound, and nobody listens
        nobody.bind(("127.0.0.1", 0))
        began = time.monotonic()

        async def run() -> list[int]:
            tracing = Tracing(f"http://127.0.0.1:{nobody.getsockname()[1]}")
            engine = AsyncEngine(make_engine(), [tracing])
            engine.start()
            lengths = []
            for i in range(20):
                with engine.submit(str(i), [1, 2, 3], params(output_kind=RequestOutputKind.FINAL_ONLY)) as stream:
                    lengths.append(len((await stream.last()).outputs[0].token_ids))
            await engine.close()
            await asyncio.to_thread(tracing.close, 0.2)
            return lengths

        assert asyncio.run(run()) == [8] * 20
        assert time.monotonic() - began < 5
    assert "the last spans could not be sent" in caplog.text


class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def test_without_opentelemetry_the_error_names_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "opentelemetry"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(RequestError, match=r"pip install 'jaxpaged\[otel\]'"):
        Tracing("http://127.0.0.1:4318")


@pytest.mark.parametrize("endpoint", ["localhost:4318", "grpc://localhost:4317", "http://", ""])
def test_an_endpoint_that_is_no_url_is_refused(endpoint):
    with pytest.raises(RequestError, match="otlp_traces_endpoint must be a URL like"):
        Tracing(endpoint)


def test_the_grpc_port_is_warned_of(caplog):
    Tracing("http://127.0.0.1:4317").close()
    assert "port 4317 is OTLP's for gRPC" in caplog.text
