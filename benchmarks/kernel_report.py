"""What was measured, in words: verdicts on the bars, a Markdown table, a roofline plot.

A row is a dictionary: case, implementation, status ("ok", "wrong", "refused", "failed", "hung"), reason, and of those that
are ok the times and what follows from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.kernel_cases import Case, Target

Row = dict[str, Any]
OURS = ("triton", "mosaic_gpu")  # bars are for these


# -- verdicts --------------------------------------------------------------------------------------------------------------


def judge(rows: Sequence[Row], cases: Sequence[Case]) -> None:
    """Adds bar, aim, reached and verdict to the rows of our kernels whose case has a target."""
    times = {(row["case"], row["implementation"]): row["device_ms"] for row in rows if "device_ms" in row}
    targets = {case.name: case.target for case in cases}
    for row in rows:
        target = targets.get(row["case"])
        if target is None or row["implementation"] not in OURS:
            continue
        bar = target.bar.get(row["implementation"]) if isinstance(target.bar, dict) else target.bar
        reached, why = _reached(row, target, times)
        row |= {"bar": bar, "aim": target.aim, "reached": reached, "verdict": why or _verdict(reached, bar, target)}


def _reached(row: Row, target: Target, times: dict[tuple[str, str], float]) -> tuple[float | None, str]:
    """The number to hold against the bar, or why there is none."""
    if "device_ms" not in row:
        return None, f"not judged: {'interpreted' if row['status'] == 'ok' else row['status']}"
    if target.kind in ("copy", "flops"):
        return row["of_copy" if target.kind == "copy" else "flops_per_s"], ""
    others = [(row["case"], name) if target.kind == "rival" else (name, row["implementation"]) for name in target.of]
    missing = [name for name, other in zip(target.of, others) if other not in times]
    if missing:
        return None, f"not judged: {', '.join(missing)} not measured"
    return row["device_ms"] / sum(times[other] for other in others), ""


def _verdict(reached: float | None, bar: float | None, target: Target) -> str:
    assert reached is not None
    more_is_better = target.kind in ("copy", "flops")
    beats = lambda goal: goal is not None and (reached >= goal if more_is_better else reached <= goal)
    return "aim reached" if beats(target.aim) else "bar reached" if bar is None or beats(bar) else "missed"


def goal(row: Row, target: Target) -> str:
    """Bar and aim in words."""
    bar = [_amount(row["bar"], target)] if row["bar"] is not None else []
    return ", ".join(bar + ([f"aim {_amount(row['aim'], target)}"] if row["aim"] is not None else []))


def _amount(x: float, target: Target) -> str:
    if target.kind == "copy":
        return f"{100 * x:.0f} % of copy"
    if target.kind == "flops":
        return f"{x / 1e12:.0f} TFLOP/s"
    return f"{x:.2f} x {'its parts' if target.kind == 'parts' else ' + '.join(target.of)}"


# -- text ------------------------------------------------------------------------------------------------------------------


def line(row: Row) -> str:
    """Progress."""
    head = f"{row['case']} | {row['implementation']}: "
    if row["status"] != "ok":
        return head + f"{row['status']}: {row['reason']}"
    if "max_error" not in row:
        return head + f"{_time(row)}, {_rates(row)}"
    error = f"error {row['max_error']:.1e}"
    return head + (f"{_time(row)}, {_rates(row)}, {error}" if _milliseconds(row) else f"right, {error}")


def _milliseconds(row: Row) -> float | None:
    return row["device_ms"] if "device_ms" in row else row.get("interpreter_ms")


def _time(row: Row) -> str:
    return f"{_milliseconds(row):.4g} ms" + (" (interpreter on a CPU)" if "interpreter_ms" in row else "")


def _rates(row: Row) -> str:
    if "device_ms" not in row:
        return "no rates"
    rates = f"{row['bytes_per_s'] / 1e9:.0f} GB/s ({100 * row['of_copy']:.0f} %)"
    return rates + (f", {row['flops_per_s'] / 1e12:.1f} TFLOP/s ({100 * row['of_matmul']:.0f} %)" if row["flops"] else "")


def markdown(result: dict[str, Any], cases: Iterable[Case]) -> str:
    """A document: where and how, then one table, then what was not measured."""
    targets = {case.name: case.target for case in cases}
    interpreted = result["interpreted"]
    about = [f"- {name}: {value}" for name, value in result["machine"].items()]
    about += [f"- command: `{result['command']}`", f"- times: {result['method']}; medians of {result['rounds']} rounds"]
    if result["ceilings"] and not interpreted:
        copy, matmul = result["ceilings"]
        about += [f"- measured ceilings: copy {copy / 1e12:.2f} TB/s (read and written), bf16 product of 8192 x 8192 "
                  f"{matmul / 1e12:.0f} TFLOP/s"]  # fmt: skip
    title = "# Kernels in interpreters on a CPU: no figures of a GPU" if interpreted else "# Kernels, measured"
    time = "ms in the interpreter" if interpreted else "ms on the device"
    header = ["case", "implementation", time, "spread", "GB/s", "of copy", "TFLOP/s", "of matmul", "largest error", "relative",
              "bar", "verdict"]  # fmt: skip
    body = [_cells(row, targets[row["case"]]) for row in result["rows"]]
    table = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *body)]
    return "\n".join([title, "", *about, "", *table, "", *_notes(result)]) + "\n"


def _cells(row: Row, target: Target | None) -> list[str]:
    verdict = row.get("verdict", "") if row["status"] == "ok" else f"{row['status']}: {row['reason']}".replace("|", "/")
    if target and row.get("reached") is not None:
        verdict += f" ({_amount(row['reached'], target)})"
    measured = "device_ms" in row
    show = lambda key, form, scale=1.0: form.format(row[key] * scale) if row.get(key) is not None else ""
    flops = measured and row["flops"]
    milliseconds = _milliseconds(row)
    return [
        row["case"],
        row["implementation"],
        "" if milliseconds is None else f"{milliseconds:.4g}",
        show("spread", "{:.0f} %", 100),
        show("bytes_per_s", "{:.0f}", 1e-9),
        show("of_copy", "{:.0f} %", 100),
        show("flops_per_s", "{:.1f}", 1e-12) if flops else "",
        show("of_matmul", "{:.0f} %", 100) if flops else "",
        show("max_error", "{:.1e}"),
        show("relative_error", "{:.1e}"),
        goal(row, target) if target and "bar" in row else "",
        " ".join(verdict.split()),
    ]


def _notes(result: dict[str, Any]) -> list[str]:
    notes = ["Bytes: each input read once, each output written once, keys and values as far as queries see them. Spread: "
             "slowest less fastest round, of the median. Rates count the case's bytes and operations, also where a "
             "rival moves or computes others. Errors: against float32; of `sample`, 1 where a row got another id "
             "than the reference's. Times add up the kernels of a call without the gaps between them."]  # fmt: skip
    if result["interpreted"]:
        notes = ["These times say nothing of any GPU."]
    notes += [f"Not measured: {name} ({why})." for name, why in result["absent"].items()]
    if result["not_reached"]:
        notes.append(f"Not reached in the time given: {'; '.join(result['not_reached'])}.")
    return [x for note in notes for x in (note, "")][:-1]


# -- plot ------------------------------------------------------------------------------------------------------------------

_MARKS = "osD^vP*X<>hp"


def plot(result: dict[str, Any], path: str) -> None:
    """Roofline: operations a byte (of memory traffic that is needed) against operations a second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    interpreted = result["interpreted"]
    copy, matmul = result["ceilings"]
    timed = ((row, _milliseconds(row)) for row in result["rows"])
    rows = [row | {"rate": row["flops"] / (1e-3 * time)} for row, time in timed if time and row["flops"]]
    figure, (axes, key) = plt.subplots(1, 2, figsize=(13, 7), width_ratios=(3, 2), layout="constrained")
    intensity = lambda row: row["flops"] / row["bytes"]
    cases = {row["case"]: intensity(row) for row in rows}
    roof = lambda x: min(x * copy, matmul)
    low = min(cases.values(), default=1.0) / 2
    high = max([4 * matmul / copy, *cases.values()])
    corners = [low, matmul / copy, high]
    axes.plot(corners, [roof(x) for x in corners], color="black", linewidth=1.5, label="measured ceilings")
    axes.plot(
        corners[:2], [0.5 * x * copy for x in corners[:2]], color="grey", linewidth=0.7, linestyle=":", label="half of copy"
    )
    for i, implementation in enumerate(dict.fromkeys(row["implementation"] for row in rows)):
        its = [row for row in rows if row["implementation"] == implementation]
        ours = implementation in OURS
        axes.scatter([intensity(row) for row in its], [row["rate"] for row in its], s=64 if ours else 32, color=f"C{i % 10}",
                     marker=_MARKS[i % len(_MARKS)], label=implementation, alpha=0.9 if ours else 0.6,
                     edgecolors="black" if ours else "none", linewidths=0.6)  # fmt: skip
    _number(axes, cases, roof)
    axes.set(
        xscale="log",
        yscale="log",
        ylim=(None, 10 * matmul),
        xlabel="operations a byte that must move",
        ylabel="operations a second",
    )
    device = result["machine"]["device"]
    axes.set_title(f"Interpreters on a CPU ({device}): no figures of a GPU" if interpreted else
                   f"{device}: copy {copy / 1e12:.2f} TB/s, bf16 {matmul / 1e12:.0f} TFLOP/s")  # fmt: skip
    axes.grid(True, which="major", linewidth=0.3)
    axes.legend(fontsize=8, loc="lower right")
    key.axis("off")
    columns = math.ceil(len(cases) / 45) or 1
    for column in range(columns):
        lines = [f"{i + 1:>2}  {name}" for i, name in enumerate(cases)][column::columns]
        key.text(column / columns, 1, "\n".join(lines), va="top", fontsize=8, family="monospace", transform=key.transAxes)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _number(axes: Any, cases: dict[str, float], roof: Callable[[float], float]) -> None:
    """The numbers of the cases on the roof above their points; those of about one intensity (`cases`) share a label."""
    places: dict[int, list[int]] = {}
    for i, intensity in enumerate(cases.values()):
        places.setdefault(round(16 * math.log10(intensity)), []).append(i + 1)
    for place, numbers in places.items():
        x = 10 ** (place / 16)
        axes.annotate(", ".join(map(str, numbers)), (x, roof(x)), xytext=(0, 6), textcoords="offset points", ha="center",
                      va="bottom", rotation=90, fontsize=7)  # fmt: skip
