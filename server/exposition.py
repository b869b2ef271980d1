"""Metrics as text, in the format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from jaxpaged_server.instruments import Family, Histogram, Summary

KINDS = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily,
         "summary": SummaryMetricFamily}  # fmt: skip


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render(families: Sequence[Family]) -> tuple[bytes, str]:
    """(text, its content type), with the metrics of this process. The text format only: in OpenMetrics prometheus_client
    writes vllm_x for vllm:x, which no dashboard would find."""
    registry = CollectorRegistry()
    registry.register(_Given(families))
    ProcessCollector(registry=registry)
    return generate_latest(registry), CONTENT_TYPE


class _Given(Collector):
    def __init__(self, families: Iterable[Family]):
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return map(_metric, self._families)


def _metric(family: Family) -> Metric:
    names = list(family.samples[0].labels) if family.samples else []
    metric = KINDS[family.kind](family.name, family.help, labels=names)
    for labels, value in family.samples:
        metric.add_metric(list(labels.values()), *_arguments(value))
    return metric


def _arguments(value: float | Histogram | Summary) -> tuple:
    match value:
        case Histogram():
            return [(floatToGoString(bound), count) for bound, count in value.cumulative()], value.sum
        case Summary():
            return value.count, value.sum
        case _:
            return (value,)
