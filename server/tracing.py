"""A span for every request, sent to an OpenTelemetry collector with OTLP over HTTP. Attributes have vLLM's names.

HTTP, not gRPC: every collector takes both, and HTTP needs pure Python packages only.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from jaxpaged.async_engine import StepReport, Stream
from jaxpaged.request import EngineOutput, RequestError
from jaxpaged_server.request_times import request_times

if TYPE_CHECKING:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger(__name__)

TRACES_PATH = "/v1/traces"  # OTLP's; added to an endpoint that has no path
GRPC_PORT = 4317  # by convention; HTTP has 4318


class Tracing:
    """An observer of an AsyncEngine that makes spans. They are sent in batches by a thread of the OpenTelemetry SDK, which
    keeps the latest few thousand and drops older ones while nobody takes them; its own environment variables hold
    (OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS, ...).

    endpoint: http://host:4318, with a path or without. RequestError if it is not a URL, or if OpenTelemetry is missing.
    """

    def __init__(self, endpoint: str, service_name: str = "jaxpaged"):
        self._provider, self._exporter = _pipeline(_traces_url(endpoint), service_name)
        self._tracer = self._provider.get_tracer("jaxpaged")

    def submitted(self, stream: Stream) -> None:
        """A span is made when the request ends."""

    def rejected(self, reason: str) -> None:
        """No request, no span."""

    def stepped(self, report: StepReport, streams: dict[str, Stream]) -> None:
        for output in report.outputs:
            if output.finished and output.request_id in streams:
                self._trace(output, streams[output.request_id], report.at)

    def close(self, timeout: float = 5.0) -> None:
        """Sends what is left, and gives up after `timeout` seconds. It blocks: call it in a thread."""
        closing = threading.Thread(target=self._provider.shutdown, name="jaxpaged-tracing-close", daemon=True)
        closing.start()
        closing.join(timeout)
        if closing.is_alive():
            log.warning("the last spans could not be sent in %s s", timeout)
            self._exporter.shutdown()  # it tries no more, and so the threads end

    def _trace(self, output: EngineOutput, stream: Stream, ended_at: float) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers = {name.lower(): value for name, value in (stream.trace_headers or {}).items()}
        span = self._tracer.start_span(
            "llm_request",
            context=TraceContextTextMapPropagator().extract(headers),
            kind=SpanKind.SERVER,
            attributes=dict(_attributes(output, stream, ended_at)),
            start_time=_epoch_ns(output.metrics.arrival_time),
        )
        if output.error is not None:
            span.set_status(Status(StatusCode.ERROR, output.error))
        span.end(_epoch_ns(ended_at))


def _attributes(output: EngineOutput, stream: Stream, ended_at: float) -> Iterator[tuple[str, Any]]:
    """(name, value) of all that is known; times in seconds."""
    times = request_times(output.metrics, ended_at)
    values = {
        "request.id": output.request_id,
        **{f"request.{name}": getattr(stream.params, name, None) for name in ("max_tokens", "n", "temperature", "top_p")},
        "usage.prompt_tokens": stream.num_prompt_tokens,
        "usage.completion_tokens": output.metrics.num_generation_tokens,
        "latency.e2e": times.e2e,
        "latency.time_to_first_token": times.first_token,
        "latency.time_in_queue": times.queue,
        "latency.time_in_model_prefill": times.prefill,
        "latency.time_in_model_decode": times.decode,
        "latency.time_in_model_inference": times.inference,
    }
    return ((f"gen_ai.{name}", value) for name, value in values.items() if value is not None)


def _epoch_ns(monotonic: float) -> int:
    """Nanoseconds since 1970 of a time on the monotonic clock. The two clocks drift apart: compared anew each time."""
    return time.time_ns() - int((time.monotonic() - monotonic) * 1e9)


def _traces_url(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RequestError(
            f"otlp_traces_endpoint must be a URL like http://localhost:4318, got {endpoint!r}.", "otlp_traces_endpoint"
        )
    if parts.port == GRPC_PORT:
        log.warning("%s: port %d is OTLP's for gRPC, spans are sent with HTTP (port 4318)", endpoint, GRPC_PORT)
    return endpoint if parts.path.strip("/") else endpoint.rstrip("/") + TRACES_PATH


def _pipeline(url: str, service_name: str) -> tuple[TracerProvider, OTLPSpanExporter]:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise RequestError(
            f"otlp_traces_endpoint needs OpenTelemetry ({error}); install it: pip install 'jaxpaged[otel]'.",
            "otlp_traces_endpoint",
        ) from error
    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", service_name)})
    provider, exporter = TracerProvider(resource=resource, shutdown_on_exit=False), OTLPSpanExporter(endpoint=url)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider, exporter
