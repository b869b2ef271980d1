"""How long a request spent where, by vLLM's definitions. Seconds."""

from __future__ import annotations

from typing import NamedTuple

from jaxpaged.request import RequestMetrics


class RequestTimes(NamedTuple):
    """None: the request never got there. Preemptions count where they happen; `inference` is prefill and decode."""

    e2e: float
    first_token: float | None
    queue: float | None
    prefill: float | None
    decode: float | None
    inference: float | None


def request_times(metrics: RequestMetrics, ended_at: float) -> RequestTimes:
    """ended_at: on the monotonic clock, as the times of `metrics`."""
    arrival, scheduled = metrics.arrival_time, metrics.scheduled_time
    first, last = metrics.first_token_time, metrics.last_token_time
    return RequestTimes(
        e2e=ended_at - arrival,
        first_token=_between(arrival, first),
        queue=_between(arrival, scheduled),
        prefill=_between(scheduled, first),
        decode=_between(first, last),
        inference=_between(scheduled, last),
    )


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start
