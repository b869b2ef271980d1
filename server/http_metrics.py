"""HTTP requests counted: an ASGI middleware. Names, labels and buckets are those of prometheus-fastapi-instrumentator, which
vLLM uses."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Protocol

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxpaged_server.instruments import Family, Histogram, Sample, Summary

FINE_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60)
COARSE_BUCKETS = (0.1, 0.5, 1)
QUIET = frozenset({"/metrics", "/health", "/load", "/ping", "/version"})  # asked all the time by machines: not counted
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
# Of scope["extensions"]: sends a piece of a body past the layers between here and the endpoint, which look at the start of a
# response only. A stream sends thousands of pieces.
DIRECT = "jaxpaged.send"
NO_HANDLER, OTHER_METHOD = "none", "other"  # whatever clients invent, the number of series has a bound
CLIENT_LEFT, FAILED = 499, 500  # the status of a request that was not answered


class HttpTotals:
    """What the middleware counts. in_flight: requests for work (POST) that have not been answered completely."""

    def __init__(self) -> None:
        self.in_flight = 0
        self._requests: defaultdict[tuple[str, str, str], int] = defaultdict(int)  # (method, status, handler)
        self._durations: defaultdict[tuple[str, str], Histogram] = defaultdict(lambda: Histogram(COARSE_BUCKETS))
        self._all_durations = Histogram(FINE_BUCKETS)
        self._received: defaultdict[str, Summary] = defaultdict(Summary)
        self._sent: defaultdict[str, Summary] = defaultdict(Summary)

    def count(self, method: str, handler: str, exchange: Exchange, seconds: float) -> None:
        self._requests[method, f"{exchange.status // 100}xx", handler] += 1
        self._durations[method, handler].observe(seconds)
        self._all_durations.observe(seconds)
        self._received[handler].observe(exchange.received)
        self._sent[handler].observe(exchange.sent)

    def families(self) -> list[Family]:
        requests = [Sample(dict(zip(("method", "status", "handler"), key)), n) for key, n in self._requests.items()]
        durations = [Sample(dict(zip(("method", "handler"), key)), h) for key, h in self._durations.items()]
        sizes = lambda by_handler: [Sample({"handler": handler}, size) for handler, size in by_handler.items()]
        return [
            Family("gauge", "http_requests_inprogress", "Number of POST requests in progress.", [Sample({}, self.in_flight)]),
            Family("counter", "http_requests", "Total number of requests by method, status and handler.", requests),
            Family("histogram", "http_request_duration_seconds", "Latency with few buckets, by handler.", durations),
            Family("histogram", "http_request_duration_highr_seconds", "Latency with many buckets, of all handlers.",
                   [Sample({}, self._all_durations)]),
            Family("summary", "http_request_size_bytes", "Size of the bodies of requests by handler.", sizes(self._received)),
            Family("summary", "http_response_size_bytes", "Size of the bodies of responses by handler.", sizes(self._sent)),
        ]  # fmt: skip


class HasHttpTotals(Protocol):
    http: HttpTotals


class Exchange:
    """One request and its response, as far as they have come. Sizes in bytes."""

    def __init__(self, receive: Receive, send: Send):
        self.status, self.received, self.sent = CLIENT_LEFT, 0, 0
        self._receive, self._send = receive, send

    async def receive(self) -> Message:
        message = await self._receive()
        self.received += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        self.sent += len(message.get("body", b""))
        await self._send(message)


class HttpMetrics:
    """Counts what passes through to a Starlette application. A response lasts until its last byte
    is sent; one that never began counts as 499 (the client left) or 500 (the application raised)."""

    def __init__(self, app: ASGIApp, metrics: HasHttpTotals):
        self.app, self.totals = app, metrics.http

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        exchange, arrived, began = Exchange(receive, send), dict(scope), time.perf_counter()
        load = int(scope["method"] == "POST")
        self.totals.in_flight += load
        scope.setdefault("extensions", {})[DIRECT] = exchange.send
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except Exception:
            if exchange.status == CLIENT_LEFT:
                exchange.status = FAILED
            raise
        finally:
            del scope["extensions"][DIRECT]  # it leads back to the scope
            self.totals.in_flight -= load
            handler = template(scope["app"].routes if "app" in scope else (), arrived)
            if handler not in QUIET:
                method = scope["method"] if scope["method"] in METHODS else OTHER_METHOD
                self.totals.count(method, handler, exchange, time.perf_counter() - began)


def template(routes: Iterable[BaseRoute], scope: Scope) -> str:
    """The path of the route that a request is for, as it was declared: /v1/models/{model}."""
    best = NO_HANDLER
    for route in routes:
        match, _ = route.matches(scope)
        if match is Match.FULL:
            return getattr(route, "path", NO_HANDLER)
        if match is Match.PARTIAL and best == NO_HANDLER:
            best = getattr(route, "path", NO_HANDLER)
    return best
