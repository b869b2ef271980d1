"""A line in the log every ten seconds, while there is work."""

from __future__ import annotations

import asyncio
import logging

from jaxpaged.async_engine import StepReport, Stream
from jaxpaged_server.engine_metrics import EngineMetrics

log = logging.getLogger(__name__)


class Summary:
    """An observer that logs what `metrics` saw: every `interval` seconds from the first request on, and once more when
    nothing is left to do."""

    def __init__(self, metrics: EngineMetrics, interval: float = 10.0):
        self._metrics, self._interval = metrics, interval
        self._timer: asyncio.TimerHandle | None = None
        self._num_unfinished = 0
        self._hit_rate = 0.0  # of the last interval in which a request was looked up

    def submitted(self, stream: Stream) -> None:
        self._num_unfinished += 1
        if self._timer is None:
            self._start()

    def rejected(self, reason: str) -> None:
        """Not in this line."""

    def stepped(self, report: StepReport, streams: dict[str, Stream]) -> None:
        self._num_unfinished -= sum(output.finished for output in report.outputs)

    def _start(self) -> None:
        self._totals, self._stats = self._metrics.totals, self._metrics.stats
        loop = asyncio.get_running_loop()
        self._began = loop.time()
        self._timer = loop.call_later(self._interval, self._tell)

    def _tell(self) -> None:
        totals, stats = self._metrics.totals, self._metrics.stats
        seconds = asyncio.get_running_loop().time() - self._began
        prompt, generation = ((now - before) / seconds for now, before in zip(totals, self._totals))
        if queries := stats.prefix_queries - self._stats.prefix_queries:
            self._hit_rate = (stats.prefix_hits - self._stats.prefix_hits) / queries
        log.info(
            "Engine %03d: Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, Running: %d reqs, "
            "Waiting: %d reqs, KV cache usage: %.1f%%, Prefix cache hit rate: %.1f%%",
            self._metrics.engine, prompt, generation, stats.num_running, stats.num_waiting,
            100 * self._metrics.kv_cache_usage, 100 * self._hit_rate,
        )  # fmt: skip
        self._timer = None
        if self._num_unfinished:
            self._start()
