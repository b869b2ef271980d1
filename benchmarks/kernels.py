"""Kernels on a GPU: device time, bytes and operations a second against measured ceilings, beside other people's kernels.

    python -m benchmarks.kernels --json results/kernels.json --plot results/kernels.png --markdown results/kernels.md
    python -m benchmarks.kernels --quick --only decode        cases whose names have "decode" in them (a regular expression)
    python -m benchmarks.kernels --check                      right or wrong, on many small shapes; nothing is timed
    python -m benchmarks.kernels --interpret                  tiny cases in interpreters on a CPU: to try this script

A kernel is compared with float32 first; a wrong one is reported and not timed. Cases run in a child process, which is
started anew without a kernel that hangs or takes the device down; `--seconds` ends the run with what is there.
Exit status: 1 if there is no GPU, or if one of our kernels is wrong, fails or hangs.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import math
import os
import re
import select
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from benchmarks import common, kernel_cases, kernel_report, kernel_rivals
from benchmarks.kernel_cases import Arguments, Case
from benchmarks.kernel_report import Row
from benchmarks.kernel_timing import INTERPRETER, WALL, Contender, Timer, ceilings, errors, make_sets, measure, num_sets, ours
from jaxpaged.memory import POOL_VARIABLES
from pallas_kernels.ops import BACKENDS

Tell = Callable[[dict[str, Any]], None]
INEXACT = 0.05  # a rival's relative error above which it computes something else


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases whose name matches")
    parser.add_argument("--backend", help="of ours, with commas (triton,mosaic_gpu,reference; interpreted: triton,reference)")
    parser.add_argument("--no-rivals", action="store_true")
    parser.add_argument("--rounds", type=int, help="timed rounds (9; quick or interpreted: 5)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end the run after so long")
    parser.add_argument("--stall", type=float, help="seconds without progress until a kernel counts as hung (120)")
    parser.add_argument("--check", action="store_true", help="compare with float32 on small shapes, time nothing")
    parser.add_argument("--interpret", action="store_true", help="tiny shapes on a CPU: no figures of a GPU")
    parser.add_argument("--json")
    parser.add_argument("--plot")
    parser.add_argument("--markdown")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (5 if options.quick or options.interpret else 9)
    options.stall = options.stall or (300 if options.interpret else 120)
    options.backend = (options.backend or ("triton,reference" if options.interpret else "triton,mosaic_gpu,reference")).split(
        ","
    )
    if unknown := set(options.backend) - set(BACKENDS):
        parser.error(f"backend {', '.join(sorted(unknown))} is unknown; known: {', '.join(BACKENDS)}.")
    return options


def chosen(options: argparse.Namespace) -> list[Case]:
    if options.check:
        cases = kernel_cases.check_cases()
    elif options.interpret:
        cases = kernel_cases.tiny_cases()
    else:
        cases = kernel_cases.quick_cases() if options.quick else kernel_cases.full_cases()
    return [case for case in cases if re.search(options.only, case.name)]


def grouped(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """Cases that are measured side by side, by the group's name or the case's own."""
    return {key: list(cases) for key, cases in itertools.groupby(cases, lambda case: case.group or case.name)}


# -- the child: one process that measures ----------------------------------------------------------------------------------


class Child:
    """Measures group by group and tells what it does. job: "skip": (case, implementation) pairs, "dropped":
    implementations, "done": groups, "ceilings": those measured by a child before."""

    def __init__(self, options: argparse.Namespace, job: dict[str, Any], tell: Tell):
        self.options, self.tell, self.job = options, tell, job
        self.on_gpu = not options.interpret
        self.skip = {tuple(pair) for pair in job["skip"]}
        self.backends, absent = self._backends()
        self.rivals = not (options.check or options.no_rivals)
        absent |= kernel_rivals.absent(self.on_gpu) if self.rivals else {}
        self.timer = Timer(None if self.on_gpu and not options.check else WALL)
        method = INTERPRETER if options.interpret else self.timer.note
        absent |= dict.fromkeys(job["dropped"], "hung or died twice")
        self.tell({"machine": machine(), "absent": absent, "method": method})

    def _backends(self) -> tuple[dict[str, Any], dict[str, str]]:
        found, absent = {}, {}
        for name in self.options.backend:
            try:
                found[name] = pallas_kernels.backend(name, interpret=self.options.interpret)
            except (NotImplementedError, ImportError) as error:
                absent[name] = str(error)
        return found, absent

    def work(self, groups: dict[str, list[Case]]) -> None:
        if not self.job["ceilings"] and not self.options.check:
            self.tell({"doing": ["", "", "ceilings"]})
            self.tell({"ceilings": ceilings(self.timer, self.on_gpu)})
        for name, cases in groups.items():
            if name not in self.job["done"]:
                self.tell({"rows": self.group(cases), "group": name})

    def group(self, cases: Sequence[Case]) -> list[Row]:
        rows: list[Row] = []
        able: list[tuple[Row, Contender, Callable[[], Row]]] = []
        for case in cases:
            self.tell({"doing": [case.name, "", "inputs"]})
            sets = make_sets(case, common.SEED, 1 if self.options.check else num_sets(case) if self.on_gpu else 2)
            with jax.default_matmul_precision("highest"):  # tf32 would be no oracle
                right = jax.block_until_ready(case.oracle(sets[0]))
            for name, build in self.contenders(case, sets):
                if (case.name, name) in self.skip or name in self.job["dropped"]:
                    continue
                self.tell({"doing": [case.name, name, "first call"]})
                row = {"case": case.name, "implementation": name, "operation": case.operation, **case.work._asdict()}
                contender = self.guarded(row, build)
                check = lambda row=row, c=contender, case=case, sets=sets, right=right: checked(row, c, case, sets, right)
                if contender is not None and self.guarded(row, check) is not None and row["status"] == "ok":
                    able.append((row, contender, check if not case.num_caches else lambda row=row: row))
                rows.append(row)
        if not self.options.check:
            self.time(able)
        return rows

    def contenders(self, case: Case, sets: Sequence[Arguments]) -> Iterator[tuple[str, Callable[[], Contender]]]:
        for name, ops in self.backends.items():
            if name in case.without:
                continue
            yield name, lambda name=name, ops=ops: ours(case, sets, name, ops)
        if self.rivals:
            for rival in kernel_rivals.of(case, self.on_gpu):
                yield rival.name, lambda rival=rival: rival.build(case, sets, self.on_gpu)

    def guarded(self, row: Row, action: Callable[[], Any]) -> Any:
        """What the action gives, or None and the reason in the row. Ends this process if the device is gone."""
        try:
            return action()
        except NotImplementedError as error:
            row |= {"status": "refused", "reason": _words(error)}
        except Exception as error:
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {_words(error)}"}
            try:
                jax.block_until_ready(jnp.zeros(8) + 1.0)
            except Exception:
                raise SystemExit(row["reason"]) from error  # after a fault in a kernel nothing runs any more
        return None

    def time(self, able: list[tuple[Row, Contender, Callable[[], Row]]]) -> None:
        """Adds times to the rows; one that fails now is left out, and the others are measured again."""
        current: list[Row] = []

        def doing(contender: Contender) -> None:
            current[:] = [next(row for row, c, _ in able if c is contender)]
            self.tell({"doing": [current[0]["case"], current[0]["implementation"], "timing"]})

        while able:
            times: dict[int, list] = {}
            attempt = lambda: measure([contender for _, contender, _ in able], self.timer, self.options.rounds, doing)
            failure: Row = {}
            times = self.guarded(failure, attempt)
            if times is not None:
                break
            current[0] |= failure
            able[:] = [entry for entry in able if entry[0] is not current[0]]
        for i, (row, _, check) in enumerate(able):
            self.guarded(row, check)
            if row["status"] == "wrong":
                row["reason"] += " after timing, right before: a race"
            elif row["status"] == "ok":
                row |= timed(row, times[i], self.job["ceilings"], self.options.interpret)


def machine() -> dict[str, str]:
    """Where this ran, with the versions that matter."""
    import importlib.metadata

    found = common.machine()
    for package in ("jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "torch", "flashinfer-python", "vllm"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        found["driver, memory"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip() or "none"
    except (OSError, subprocess.TimeoutExpired):
        pass
    return found


def checked(row: Row, contender: Contender, case: Case, sets: Sequence[Arguments], right: dict[str, Any]) -> Row:
    """Runs set 0 and adds status and errors to the row."""
    result = contender.run(0)
    contender.wait(result)
    row |= {"implementation": contender.name, "status": "ok", "reason": ""}
    if contender.read is None:
        return row
    found = errors(case.results(contender.read(result), sets[0]), right, case.limits)
    finite = lambda x: x if math.isfinite(x) else None
    of = lambda what: finite(max((getattr(e, what) for name, e in found.items() if name != "lse"), key=lambda x: (x != x, x)))
    row |= {"max_error": of("largest"), "relative_error": of("relative")}
    if "lse" in found:
        row["lse_error"] = finite(found["lse"].largest)
    is_ours = contender.name in BACKENDS
    limits = " or ".join(name for name, error in found.items() if error.is_wrong)
    if limits and (is_ours or row["relative_error"] is None or row["relative_error"] > INEXACT):
        numbers = ", ".join(f"{name} {error.largest:.1e} (relative {error.relative:.1e})" for name, error in found.items())
        row |= {"status": "wrong", "reason": f"error of {numbers}"}
        if row["max_error"] is None:
            row["max_error"] = row["relative_error"] = None
    return row


def timed(row: Row, times: Sequence[Any], limits: Any, interpreted: bool) -> Row:
    seconds = [t.seconds for t in times]
    middle = statistics.median(seconds)
    spread = (max(seconds) - min(seconds)) / middle
    if interpreted:
        return {"interpreter_ms": 1e3 * middle, "spread": spread}
    rates = {"bytes_per_s": row["bytes"] / middle, "flops_per_s": row["flops"] / middle}
    copy, matmul = limits
    return {"device_ms": 1e3 * middle, "spread": spread, "kernels": times[0].kernels, **rates,
            "of_copy": rates["bytes_per_s"] / copy, "of_matmul": rates["flops_per_s"] / matmul}  # fmt: skip


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def child(options: argparse.Namespace) -> None:
    job = json.loads(options.child)
    with os.fdopen(job["pipe"], "w", buffering=1) as pipe:

        def tell(message: dict[str, Any]) -> None:
            if message.get("ceilings"):
                job["ceilings"] = message["ceilings"]
            print(json.dumps(message), file=pipe)

        if reason := _no_gpu(options):
            tell({"stop": reason})
            return
        Child(options, job, tell).work(grouped(chosen(options)))
        tell({"end": True})


def _no_gpu(options: argparse.Namespace) -> str | None:
    if options.interpret:
        return None
    advice = "; --interpret tries the script on a CPU."
    try:
        device = jax.devices()[0]
    except RuntimeError as error:
        return f"This benchmark needs a GPU, and JAX finds none ({_words(error)[:120]}){advice}"
    if device.platform == "gpu":
        return None
    return f"This benchmark needs a GPU, and JAX finds only {device.device_kind}{advice}"


# -- the parent: starts children, keeps rows -------------------------------------------------------------------------------


class Parent:
    program = (sys.executable, "-m", "benchmarks.kernels")  # what measures

    def __init__(self, options: argparse.Namespace, arguments: Sequence[str]):
        self.options, self.arguments, self.start = options, list(arguments), time.monotonic()
        self.cases = chosen(options)
        self.groups = grouped(self.cases)
        self.done: list[str] = []
        self.skip: list[tuple[str, str]] = []
        self.rows: list[Row] = []
        self.told: dict[str, Any] = {"machine": {}, "absent": {}, "method": "", "ceilings": None}

    def run(self) -> dict[str, Any]:
        while len(self.done) < len(self.groups) and self._time_left() > 0:
            self._one_child()
        self._say(f"{len(self.done)} of {len(self.groups)} groups of cases")
        return self.result()

    def result(self) -> dict[str, Any]:
        kernel_report.judge(self.rows, self.cases)
        order = {case.name: i for i, case in enumerate(self.cases)}
        not_reached = [case.name for name, cases in self.groups.items() if name not in self.done for case in cases]
        command = shlex.join(["python", "-m", "benchmarks.kernels", *self.arguments])
        return {"command": command, "interpreted": self.options.interpret, "rounds": self.options.rounds, **self.told,
                "rows": sorted(self.rows, key=lambda row: order[row["case"]]), "not_reached": not_reached}  # fmt: skip

    def _time_left(self) -> float:
        return self.start + self.options.seconds - time.monotonic()

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:4.0f} s] {text}", flush=True)

    def _one_child(self) -> None:
        """Until it ends, hangs or dies; in the two latter cases what it was doing becomes a row, and is skipped next time."""
        reader, writer = os.pipe()
        lost = collections.Counter(name for _, name in self.skip if name)
        dropped = [name for name, count in lost.items() if count > 1]
        job = {"pipe": writer, "skip": self.skip, "dropped": dropped, "done": self.done, "ceilings": self.told["ceilings"]}
        command = [*self.program, *self.arguments, "--child", json.dumps(job)]
        doing, status = ["", "", "start"], "failed"
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, pass_fds=[writer], env=_environment(self.options))
            os.close(writer)
            try:
                for message in self._messages(reader):
                    doing = message.get("doing", doing)
                    if self._heard(message):
                        return
                    if "silence" in message:
                        status = "hung"
                        break
            finally:
                process.kill()
                process.wait()
                os.close(reader)
            log.seek(0)
            last = " ".join(log.read()[-2000:].split()[-60:])
        if self._time_left() > 0:
            self._lost(doing, status, f"no progress for {self.options.stall:.0f} s" if status == "hung" else last or "it died")

    def _messages(self, reader: int) -> Iterator[dict[str, Any]]:
        """What the child tells, until it ends; {"silence": True} where it stalls or the time is up."""
        text = b""
        while True:
            ready, _, _ = select.select([reader], [], [], max(0.0, min(self.options.stall, self._time_left())))
            if not ready:
                yield {"silence": True}
                return
            new = os.read(reader, 2**16)
            if not new:
                return
            *lines, text = (text + new).split(b"\n")
            yield from map(json.loads, lines)

    def _heard(self, message: dict[str, Any]) -> bool:
        """Keeps it. Whether the child has finished."""
        if "stop" in message:
            raise SystemExit(message["stop"])
        self.told |= {key: message[key] for key in self.told if key in message}
        if "group" in message:
            self.done.append(message["group"])
            self.rows += message["rows"]
            for row in message["rows"]:
                self._say(kernel_report.line(row))
            write_json(self.options.json, self.result())  # what is there survives whatever comes
        return "end" in message

    def _lost(self, doing: list[str], status: str, why: str) -> None:
        case, implementation, what = doing
        row = {"case": case, "implementation": implementation or "(inputs)", "status": status, "reason": f"{what}: {why}"}
        if not case:
            raise SystemExit(f"The measuring process {status} ({what}): {why}")
        self._say(kernel_report.line(row))
        self.rows.append(row)
        self.skip.append((case, implementation))
        if not implementation:  # no kernel's fault: leave the case out
            self.done.append(next(name for name, cases in self.groups.items() if case in [c.name for c in cases]))


def _environment(options: argparse.Namespace) -> dict[str, str]:
    """Of the child. Command buffers would hide kernels from the profiler; torch needs some of the memory."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    memory = {} if any(map(os.environ.get, POOL_VARIABLES)) else {POOL_VARIABLES[0]: "0.7"}
    return {**os.environ, **memory, "XLA_FLAGS": flags,
            **({"JAX_PLATFORMS": "cpu"} if options.interpret else {})}  # fmt: skip


def write_json(path: str | None, result: dict[str, Any]) -> None:
    if path:
        Path(path).write_text(json.dumps(result, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = options_of(arguments)
    if options.child:
        return child(options)
    parent = Parent(options, arguments)
    if not parent.cases:
        raise SystemExit(f"No case matches {options.only!r}.")
    result = parent.run()
    write_json(options.json, result)
    if options.markdown:
        Path(options.markdown).write_text(kernel_report.markdown(result, parent.cases))
    if options.plot and result["ceilings"]:
        kernel_report.plot(result, options.plot)
    for path in filter(None, (options.json, options.markdown, options.plot)):
        print(f"written: {path}")
    fatal = {"reference": ("wrong",)} | dict.fromkeys(kernel_report.OURS, ("wrong", "failed", "hung"))
    bad = [row for row in result["rows"] if row["status"] in fatal.get(row["implementation"], ())]
    if bad:
        raise SystemExit(f"{len(bad)} of our kernels' rows are wrong, failed or hung.")


if __name__ == "__main__":
    main()
