"""What numbers are gathered in: cheap enough for every step of the engine in the event loop's thread. numpy only."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

QUANTILES = {"p50": 50, "p90": 90, "p99": 99}


class Histogram:
    """Counts by bucket. bounds: rising upper bounds, each belongs to its bucket; what is above them all is counted too."""

    def __init__(self, bounds: Sequence[float]):
        self.bounds = tuple(map(float, bounds))
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def observe_many(self, values: np.ndarray, times: np.ndarray) -> None:
        """values[i], times[i] times."""
        where = np.searchsorted(self.bounds, values)
        more = np.bincount(where, times, len(self.counts)).astype(int).tolist()
        self.counts = [old + new for old, new in zip(self.counts, more)]
        self.sum += float(values @ times)

    def cumulative(self) -> list[tuple[float, int]]:
        """(upper bound, values up to it) for every bound and for infinity."""
        return list(zip((*self.bounds, float("inf")), accumulate(self.counts)))


class Summary:
    """How many, and how much together."""

    def __init__(self) -> None:
        self.count, self.sum = 0, 0.0

    def observe(self, value: float) -> None:
        self.count += 1
        self.sum += value


class Sample(NamedTuple):
    """The value of a metric for one combination of labels."""

    labels: dict[str, str]
    value: float | Histogram | Summary


class Family(NamedTuple):
    """A metric as it is exposed. kind: "counter", "gauge", "histogram" or "summary". All samples have the same labels, in
    the same order."""

    kind: str
    name: str
    help: str
    samples: list[Sample]


class Recent:
    """The latest values, at most `size` of them, and when they came."""

    def __init__(self, size: int):
        self._values, self._at = np.zeros(size), np.full(size, -np.inf)
        self._next = 0

    def add(self, at: float, values: np.ndarray) -> None:
        """Values that came at time `at`."""
        size = len(self._values)
        values = values[-size:]
        where = (self._next + np.arange(len(values))) % size
        self._values[where], self._at[where] = values, at
        self._next = (self._next + len(values)) % size

    def later_than(self, since: float) -> np.ndarray:
        """The values that came later, in no order."""
        return self._values[self._at > since]


def percentiles(recent: Sequence[Recent], since: float) -> dict[str, float | None]:
    """By the names of QUANTILES, of all values that came later than `since`; None if none did."""
    values = np.concatenate([one.later_than(since) for one in recent])
    if not len(values):
        return dict.fromkeys(QUANTILES)
    return dict(zip(QUANTILES, np.percentile(values, list(QUANTILES.values())).tolist()))


class Speed:
    """How fast totals grow: remembers them for `window` seconds."""

    def __init__(self, window: float, spacing: float = 0.1):
        self._window, self._spacing = window, spacing
        self._marks: deque[tuple[float, Sequence[float]]] = deque(maxlen=4 + int(2 * window / spacing))

    def note(self, at: float, totals: Sequence[float]) -> None:
        """The totals from time `at` on. Notes closer than `spacing` replace each other: the latest is always kept."""
        if len(self._marks) > 1 and at - self._marks[-2][0] < self._spacing:
            self._marks.pop()
        self._marks.append((at, totals))

    def read(self, now: float) -> list[float]:
        """Growth of each total over the window before `now`, a second."""
        before = [totals for at, totals in self._marks if at <= now - self._window]
        first = before[-1] if before else self._marks[0][1]
        return [(new - old) / self._window for old, new in zip(first, self._marks[-1][1])]
