"""Everything worth running on a machine with a GPU, of a bare checkout, in under nine minutes.

    python -m benchmarks.gpu_check --out results/gpu
    python -m benchmarks.gpu_check --out results/gpu --stages check,kernels --seconds 300

Stages, each in a process of its own with a limit; what one leaves of its time goes to the next:
    machine    what this is: GPU, driver, versions
    check      every backend and operation on many small shapes against float32 (needs jax and numpy, no pytest)
    tests      the tests that run on a GPU, where pytest and what it needs are installed
    kernels    benchmarks/kernels.py, with backends that failed every check left out
    engine     the engine with random weights, where there is a script for it

Into the folder: log.txt (all that was printed), summary.md, and JSON, Markdown and PNG of the stages. Exit status 1 if a
stage failed or ran out of time.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/test_paged_attention.py", "tests/test_fused_kernels.py", "tests/test_sampler.py")
NEEDED_BY_TESTS = ("pytest", "hypothesis", "jaxtyping")
ENGINE = "benchmarks/engine_dummy.py"
BACKENDS = ("triton", "mosaic_gpu", "reference")


class Outcome(NamedTuple):
    stage: str
    status: str  # "passed", "failed", "out of time", "absent"
    seconds: float
    note: str


class Run:
    """One run into a folder. limits: seconds that a stage may take; all together end at `deadline`."""

    def __init__(self, folder: Path, seconds: float, interpret: bool):
        self.folder, self.interpret = folder, interpret
        self.deadline = time.monotonic() + seconds
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log.txt"
        self.log.write_text("")

    def say(self, text: str) -> None:
        print(text, flush=True)
        with self.log.open("a") as log:
            print(text, file=log)

    def left(self, limit: float) -> float:
        return max(0.0, min(limit, self.deadline - time.monotonic()))

    def command(self, stage: str, command: Sequence[str], limit: float, note: Callable[[], str] = str) -> Outcome:
        """Runs it, its output line by line on the terminal and in the log. Its children die with it."""
        start, seconds = time.monotonic(), self.left(limit)
        if seconds < 2:
            return Outcome(stage, "out of time", 0, "not started")
        self.say(f"\n== {stage}: {' '.join(command)} (at most {seconds:.0f} s)")
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   errors="replace", env=self._environment(), start_new_session=True)  # fmt: skip
        assert process.stdout is not None
        printer = threading.Thread(target=self._print, args=(process.stdout,), daemon=True)
        printer.start()
        try:
            status = "failed" if process.wait(seconds) else "passed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what it may have left behind
            with contextlib.suppress(subprocess.TimeoutExpired):  # as a process that hangs in the driver
                process.wait(10)
        printer.join(5)
        return Outcome(stage, status, time.monotonic() - start, note())

    def _print(self, output: IO[str]) -> None:
        with output:
            for line in output:
                self.say(line.rstrip("\n"))

    def _environment(self) -> dict[str, str]:
        """A GPU or nothing: JAX must not fall back to the CPU in silence."""
        platforms = "cpu" if self.interpret else "cuda,cpu"
        cache = str(self.folder.resolve() / "cache")  # a machine with little installed has no idea of the user's own
        return {"JAXPAGED_CACHE": cache, **os.environ, "JAX_PLATFORMS": platforms, "PYTHONUNBUFFERED": "1"}

    # -- stages ------------------------------------------------------------------------------------------------------------

    def machine(self) -> Outcome:
        code = "import json; from benchmarks import kernels; print(json.dumps(kernels.machine(), indent=1))"
        try:
            self.say(subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20).stdout)
        except (OSError, subprocess.TimeoutExpired) as error:
            self.say(f"nvidia-smi: {error}")
        return self.command("machine", [sys.executable, "-c", code], 60)

    def check(self) -> Outcome:
        """A kernel that hangs costs its row and the time until that is noticed; a backend that does so twice is left out."""
        results, limit = self.folder / "check.json", self.left(150)
        options = ["--check", "--json", str(results), "--seconds", f"{max(5, limit - 15):.0f}", "--stall", "45"]
        if self.interpret:
            options += ["--only", "one token|small sample$"]
        return self.command("check", [*_kernels(), *options, *self._interpreted()], limit, lambda: _counts(results))

    def tests(self) -> Outcome:
        missing = [name for name in NEEDED_BY_TESTS if importlib.util.find_spec(name) is None]
        if missing:
            return Outcome("tests", "absent", 0, f"not installed: {', '.join(missing)}; see the stage check")
        options = ["-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings=default", "-q", "--maxfail=5"]
        return self.command("tests", [sys.executable, "-m", "pytest", *options, "-m", "not slow", *TESTS], 120)

    def kernels(self) -> Outcome:
        results = self.folder / "kernels.json"
        able = [] if self.interpret else ["--backend", ",".join(_able(self.folder / "check.json"))]
        files = [
            "--json",
            str(results),
            "--plot",
            str(results.with_suffix(".png")),
            "--markdown",
            str(results.with_suffix(".md")),
        ]
        limit = self.left(300)
        options = [*able, "--seconds", f"{max(5, limit - 15):.0f}", "--stall", "60", *self._interpreted()]
        return self.command("kernels", [*_kernels(), *files, *options], limit, lambda: _counts(results))

    def engine(self) -> Outcome:
        if not (ROOT / ENGINE).exists():
            return Outcome("engine", "absent", 0, f"there is no {ENGINE}")
        module = ENGINE.removesuffix(".py").replace("/", ".")
        options = ["--json", str(self.folder / "engine.json"), *(["--tiny", "--runs", "1"] if self.interpret else [])]
        return self.command("engine", [sys.executable, "-m", module, *options], 240)

    def _interpreted(self) -> list[str]:
        return ["--interpret"] if self.interpret else []


STAGES = ("machine", "check", "tests", "kernels", "engine")


def _kernels() -> list[str]:
    return [sys.executable, "-m", "benchmarks.kernels"]


def _counts(results: Path) -> str:
    """How many rows of each status."""
    if not results.exists():
        return "no results"
    result = json.loads(results.read_text())
    counts = collections.Counter(row["status"] for row in result["rows"])
    text = [f"{count} {status}" for status, count in counts.items()]
    return ", ".join(text + ([f"{len(result['not_reached'])} cases not reached"] if result["not_reached"] else []))


def _able(results: Path) -> list[str]:
    """Backends that could run and were right at least once; all of them where nothing was checked."""
    if not results.exists():
        return list(BACKENDS)
    result = json.loads(results.read_text())
    right = {row["implementation"] for row in result["rows"] if row["status"] == "ok"} - set(result["absent"])
    return [name for name in BACKENDS if name in right] or list(BACKENDS)


def summary(outcomes: Sequence[Outcome]) -> str:
    lines = [f"| {o.stage} | {o.status} | {o.seconds:.0f} | {o.note} |" for o in outcomes]
    return "\n".join(["| stage | status | seconds | |", "| --- | --- | --- | --- |", *lines])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--seconds", type=float, default=520, help="of all stages together")
    parser.add_argument("--interpret", action="store_true", help="tiny cases on a CPU: to try this script")
    options = parser.parse_args(arguments)
    stages = options.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"stage {', '.join(sorted(unknown))} is unknown; known: {', '.join(STAGES)}.")
    run = Run(options.out.resolve(), options.seconds, options.interpret)
    outcomes = [getattr(run, stage)() for stage in STAGES if stage in stages]
    text = summary(outcomes)
    (run.folder / "summary.md").write_text(text + "\n")
    run.say("\n" + text)
    if any(o.status in ("failed", "out of time") for o in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
