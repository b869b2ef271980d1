"""Draws what a simulation found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxpaged.request import RequestError
from jaxpaged.simulate import Result


def load_matplotlib() -> Any:
    """matplotlib's Figure. RuntimeError says how to install it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError('drawing a simulation needs matplotlib: pip install "jaxpaged[plan]"') from None
    return Figure


def check_format(path: Path) -> str:
    """What is drawn into `path`: its ending, "png" without one. RequestError if matplotlib does not draw that."""
    from matplotlib.backend_bases import FigureCanvasBase

    found, known = path.suffix[1:].lower() or "png", FigureCanvasBase.get_supported_filetypes()
    if found not in known:
        raise RequestError(f"plot must end in one of {', '.join(sorted(known))}, got {str(path)!r}.", "plot")
    return found


def plot(results: Sequence[Result], title: str, path: Path) -> None:
    """TTFT, ITL and throughput against the rate at which requests come; median and 99th percentile."""
    figure = load_matplotlib()(figsize=(13, 4), layout="constrained")
    figure.suptitle(title)
    rates = [result.rate for result in results]
    ttft, itl, throughput = figure.subplots(1, 3)
    _latency(ttft, "Time to first token", rates, [result.ttft for result in results])
    _latency(itl, "Time between tokens", rates, [result.itl for result in results])
    throughput.plot(rates, [result.output_tokens_per_s for result in results], marker="o", color="tab:green")
    throughput.set(title="Output", xlabel="requests/s", ylabel="tokens/s")
    throughput.set_ylim(bottom=0)
    for axes in (ttft, itl, throughput):
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, format=check_format(path))


def _latency(axes: Any, title: str, rates: Sequence[float], summaries: Sequence[dict[str, float]]) -> None:
    for name, style in (("p50", "-"), ("p99", "--")):
        values = [summary[name] * 1e3 for summary in summaries]
        axes.plot(rates, values, style, marker="o", color="tab:blue", label=name.upper())
    axes.set(title=title, xlabel="requests/s", ylabel="ms")
    if max(summary["p99"] for summary in summaries) > 20 * min(summary["p50"] for summary in summaries):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.legend()
