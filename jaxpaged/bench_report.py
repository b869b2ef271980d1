"""What a load test found: the times of each request, the figures over all of them, a table, a JSON file and a picture.

Names, units and rows are those of `vllm bench serve`, so that results of both can stand side by side: TTFT (to the first
token), TPOT (of each further token of a request), ITL (between two chunks of a stream), E2EL (of a whole request).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from jaxpaged.bench_options import METRICS, ReportOptions

WIDTH = 50  # of the table, in characters


@dataclass
class Record:
    """One request. start, chunk_times, end: seconds of one clock; chunk_times has an entry for each chunk of text.
    prompt_tokens, output_tokens: as the server counted them. error: why it failed, empty if it did not."""

    start: float
    prompt_tokens: int = 0
    output_tokens: int = 0
    chunk_times: list[float] = field(default_factory=list)
    end: float = 0.0
    text: str = ""
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.chunk_times[0] - self.start

    @property
    def tpot(self) -> float | None:
        """None where there is no further token."""
        more = self.output_tokens - 1
        return (self.chunk_times[-1] - self.chunk_times[0]) / more if more > 0 else None

    @property
    def itls(self) -> list[float]:
        return np.diff(self.chunk_times).tolist()

    @property
    def e2el(self) -> float:
        return self.end - self.start

    def is_good(self, limits: Mapping[str, float]) -> bool:
        return all((getattr(self, name) or 0.0) * 1000 <= most for name, most in limits.items())


def summarize(records: Sequence[Record], seconds: float, limits: Mapping[str, float],
              percentiles: Sequence[float]) -> dict[str, Any]:  # fmt: skip
    """The figures under the keys of vLLM's JSON. Rates are a second, latencies are in milliseconds and 0 where there was
    nothing to measure; failed requests count in `failed` only."""
    done = [r for r in records if not r.error]
    inputs, outputs = sum(r.prompt_tokens for r in done), sum(r.output_tokens for r in done)
    result: dict[str, Any] = {
        "duration": seconds,
        "completed": len(done),
        "failed": len(records) - len(done),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / seconds,
        "request_goodput": sum(r.is_good(limits) for r in done) / seconds if limits else None,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
        "max_output_tokens_per_s": _peak_tokens(done),
        "max_concurrent_requests": _peak_requests(done),
    }
    values = {
        "ttft": [r.ttft for r in done],
        "tpot": [r.tpot for r in done if r.tpot is not None],
        "itl": [gap for r in done for gap in r.itls],
        "e2el": [r.e2el for r in done],
    }
    for name, found in values.items():
        result |= _statistics(name, found, percentiles)
    return result


def _statistics(name: str, seconds: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    ms = np.asarray(seconds or [0.0]) * 1000
    found = {"mean": ms.mean(), "median": np.median(ms), "std": ms.std()}
    found |= {f"p{p:g}": np.percentile(ms, p) for p in percentiles}
    return {f"{statistic}_{name}_ms": float(value) for statistic, value in found.items()}


def _peak_tokens(done: Sequence[Record]) -> float:
    """Most tokens in one of the seconds since the first start. A request's tokens are spread evenly over its chunks."""
    if not done:
        return 0.0
    times = np.concatenate([r.chunk_times for r in done])
    weights = np.concatenate([np.full(len(r.chunk_times), r.output_tokens / len(r.chunk_times)) for r in done])
    return float(np.bincount((times - min(r.start for r in done)).astype(int), weights).max())


def _peak_requests(done: Sequence[Record]) -> int:
    """Most requests that were under way at one moment. (vLLM counts those of a whole second, which is more.)"""
    starts, ends = np.sort([r.start for r in done]), np.sort([r.end for r in done])
    before = np.searchsorted(ends, starts, side="right")
    return int((np.arange(1, len(done) + 1) - before).max(initial=0))


def details(records: Sequence[Record]) -> dict[str, list]:
    """Each request's values, in the order of the requests; empty or 0 where one failed. Times are in seconds."""
    return {
        "input_lens": [r.prompt_tokens for r in records],
        "output_lens": [r.output_tokens for r in records],
        "ttfts": [r.ttft if r.chunk_times else 0.0 for r in records],
        "itls": [r.itls for r in records],
        "latencies": [r.e2el for r in records],
        "start_times": [r.start for r in records],
        "generated_texts": [r.text for r in records],
        "errors": [r.error for r in records],
    }


def table(result: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> str:
    """The result as `vllm bench serve` prints it."""
    rows = [
        ("Successful requests:", "completed"),
        ("Failed requests:", "failed"),
        ("Maximum request concurrency:", "max_concurrency"),
        ("Request rate configured (RPS):", "request_rate"),
        ("Benchmark duration (s):", "duration"),
        ("Total input tokens:", "total_input_tokens"),
        ("Total generated tokens:", "total_output_tokens"),
        ("Request throughput (req/s):", "request_throughput"),
        ("Request goodput (req/s):", "request_goodput"),
        ("Output token throughput (tok/s):", "output_throughput"),
        ("Peak output token throughput (tok/s):", "max_output_tokens_per_s"),
        ("Peak concurrent requests:", "max_concurrent_requests"),
        ("Total token throughput (tok/s):", "total_token_throughput"),
    ]
    lines = [" Serving Benchmark Result ".center(WIDTH, "=")]
    lines += [_row(label, result[key]) for label, key in rows if result[key] is not None]
    for name in metrics:
        lines.append(METRICS[name].center(WIDTH, "-"))
        for statistic in ("mean", "median", *(f"p{p:g}" for p in percentiles)):
            lines.append(_row(f"{statistic.capitalize()} {name.upper()} (ms):", result[f"{statistic}_{name}_ms"]))
    return "\n".join([*lines, "=" * WIDTH])


def _row(label: str, value: Any) -> str:
    return f"{label:<40} {value:<10.2f}" if isinstance(value, float) else f"{label:<40} {value!s:<10}"


def save(result: Mapping[str, Any], options: ReportOptions) -> Path:
    """Writes the JSON file; returns its path."""
    options.result_dir.mkdir(parents=True, exist_ok=True)
    path = options.result_dir / (options.result_filename or _filename(result))
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _filename(result: Mapping[str, Any]) -> str:
    most = "" if result["max_concurrency"] is None else f"-concurrency{result['max_concurrency']}"
    model = str(result["model_id"]).rpartition("/")[2]
    return f"{result['backend']}-{result['request_rate']}qps{most}-{model}-{datetime.now():%Y%m%d-%H%M%S}.json"


def load_matplotlib() -> Any:
    """matplotlib's Figure. RuntimeError says how to install it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError('--plot needs matplotlib: pip install "jaxpaged[bench]"') from None
    return Figure


def plot(records: Sequence[Record], title: str, path: Path) -> None:
    """Draws how TTFT and ITL are distributed, with the median and the 99th percentile."""
    done = [r for r in records if not r.error]
    figure = load_matplotlib()(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    drawn = {"ttft": [r.ttft for r in done], "itl": [gap for r in done for gap in r.itls]}
    for axes, (name, seconds) in zip(figure.subplots(1, 2), drawn.items()):
        _histogram(axes, METRICS[name], np.asarray(seconds) * 1000)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _histogram(axes: Any, title: str, ms: np.ndarray) -> None:
    axes.set(title=title, xlabel="ms", ylabel="count")
    if not len(ms):
        return
    axes.hist(ms, bins=60, color="tab:blue", alpha=0.8)
    for p, style in ((50, "-"), (99, "--")):
        value = np.percentile(ms, p)
        axes.axvline(value, color="black", linestyle=style, linewidth=1, label=f"P{p}: {value:.1f} ms")
    axes.set_xlim(left=0)  # now: before there was data it would have set the right end too
    axes.legend()
