"""What the benchmarks share: workloads, machine ceilings, medians, results as JSON.

Workloads are token-id prompts, seeded, with the same lengths in every run and fresh words (a prefix cache cannot carry
over from one run to the next). Lengths: A one request of 128 + 128 tokens; B 64 requests, prompts and outputs 32..256
log-uniform, at most 32 at once; C 48 requests with 512 common and 32 own tokens, 32 out, at most 16 at once.
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxpaged import env

SEED = 20261123


@dataclass(frozen=True)
class Item:
    prompt: list[int]
    output: int  # tokens to generate, whatever they are


@dataclass(frozen=True)
class Workload:
    name: str
    items: list[Item]
    max_running: int

    @property
    def output_tokens(self) -> int:
        return sum(item.output for item in self.items)


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def workload(name: str, vocab_size: int, run: int) -> Workload:
    """Workload A, B or C of run number `run`. The first 1,000 ids are left out: special tokens live there or nowhere."""
    lengths, words = random.Random(f"{SEED}/{name}"), random.Random(f"{SEED}/{name}/{run}")
    draw = lambda n: [words.randrange(1000, vocab_size - 1000) for _ in range(n)]
    if name == "A":
        return Workload(name, [Item(draw(128), 128)], 1)
    if name == "B":
        sizes = [(_log_uniform(lengths, 32, 256), _log_uniform(lengths, 32, 256)) for _ in range(64)]
        return Workload(name, [Item(draw(p), o) for p, o in sizes], 32)
    if name == "C":
        common = draw(512)
        return Workload(name, [Item(common + draw(32), 32) for _ in range(48)], 16)
    raise ValueError(f"workload {name!r} is unknown; known: A, B, C.")


def read_bandwidth(mib: int = 512, threads: int | None = None, repeats: int = 7) -> float:
    """Bytes a second that all cores together read from memory: dot products over arrays far larger than the caches."""
    threads = threads or os.cpu_count() or 1
    arrays = [np.ones(mib * 2**20 // 4 // threads, np.float32) for _ in range(threads)]
    return max(_timed_reads(arrays) for _ in range(repeats))


def _timed_reads(arrays: list[np.ndarray]) -> float:
    """One pass over all arrays at once. Blocks of a megabyte: BLAS must not start threads of its own for them."""

    def read(array: np.ndarray) -> None:
        for block in array.reshape(-1, 2**15):
            np.add.reduce(block)

    workers = [threading.Thread(target=read, args=(array,)) for array in arrays]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(array.nbytes for array in arrays) / (time.perf_counter() - start)


def median_of(runs: int, measure: Callable[[int], dict[str, float]]) -> dict[str, float]:
    """Medians of `runs` measurements; run 0 warms up and is not counted."""
    measure(0)
    results = [measure(run) for run in range(1, runs + 1)]
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def machine() -> dict[str, str]:
    """Where this ran."""
    try:
        import jax

        device, version = jax.devices()[0].device_kind, jax.__version__
    except ModuleNotFoundError:  # the control plane's benchmarks need none
        device, version = "none", "none"
    return {
        "cpu": env.cpu(),
        "cores": str(os.cpu_count()),
        "device": device,
        "python": platform.python_version(),
        "jax": version,
        "date": time.strftime("%Y-%m-%d"),
    }


def write_json(path: str | None, result: dict) -> None:
    if path:
        Path(path).write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
        print(f"written: {path}")
