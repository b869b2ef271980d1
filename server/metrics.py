"""What the server tells Prometheus about itself: the metrics of each engine, with its number as a label, and those of HTTP."""

from __future__ import annotations

import time
from collections.abc import Sequence

from jaxpaged_server.engine_metrics import EngineMetrics, Totals
from jaxpaged_server.http_metrics import HttpTotals
from jaxpaged_server.instruments import Family, percentiles


class Metrics:
    """engines: of each one, in the order of their numbers."""

    def __init__(self, engines: Sequence[EngineMetrics]):
        self.engines, self.http = tuple(engines), HttpTotals()

    @property
    def server_load(self) -> int:
        """Requests that are being answered."""
        return self.http.in_flight

    def latencies(self, window_seconds: float = 60) -> dict[str, dict[str, float | None]]:
        """{"ttft": {"p50", "p90", "p99"}, "itl": the same} in seconds, of the last `window_seconds`; None: nothing to tell.
        Under a heavy load of each engine's last NUM_RECENT tokens only."""
        since = time.monotonic() - window_seconds
        return {"ttft": percentiles([one.recent_ttft for one in self.engines], since),
                "itl": percentiles([one.recent_gaps for one in self.engines], since)}  # fmt: skip

    def throughput(self) -> dict[str, float]:
        """Tokens a second, of `Totals`, over the last few seconds."""
        return dict(zip(Totals._fields, map(sum, zip(*(one.throughput() for one in self.engines)))))

    def exposition(self) -> tuple[bytes, str]:
        """(text, content type) for Prometheus."""
        from jaxpaged_server.exposition import render

        return render([*self.families(), *self.http.families()])

    def families(self) -> list[Family]:
        """The metrics of the engines: each family once, with the samples of all."""
        same = zip(*(one.families() for one in self.engines))
        return [of_each[0]._replace(samples=[sample for one in of_each for sample in one.samples]) for of_each in same]
