"""Device time of calls, our own calls, the ceilings of a device, and errors of results.

Device time is what CUPTI, NVIDIA's profiling interface, says that a call's kernels took, added up: launch gaps do not
count. JAX has a binding to it (of its Mosaic GPU profiler; private, the same from 0.10 to 0.12) that sees every kernel of
the process, torch's too. Where it is not to be had, calls are queued one behind the other and timed by the wall, which can
only be more.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import pallas_kernels
from benchmarks.kernel_cases import Arguments, Case, Limits

CACHE = 64e6  # bytes of L2 of a large GPU, rounded up: inputs must not stay in it from one call to the next
CUPTI, WALL, INTERPRETER = "CUPTI", "wall clock, calls back to back", "wall clock of interpreters on a CPU"


@dataclass(frozen=True)
class Contender:
    """Somebody who computes a case. run: starts a call on input set i (modulo their number). read: its result -> what
    `Case.results` takes, or None if there is nothing to compare."""

    name: str
    run: Callable[[int], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready
    read: Callable[[Any], Any] | None = lambda result: result


class Time(NamedTuple):
    """Of one call."""

    seconds: float
    kernels: float | None  # launched; None: not known


class Timer:
    """method: CUPTI or WALL (None: CUPTI, if it works)."""

    def __init__(self, method: str | None = None):
        why = None if method else self._fault()
        self.method = method or (CUPTI if why is None else WALL)
        self.note = self.method if why is None else f"{self.method}; no CUPTI: {why}"

    def __call__(self, contender: Contender, first: int, calls: int) -> Time:
        if self.method != CUPTI:
            return Time(_queued(contender, first, calls) / calls, None)
        binding = _cupti()
        binding._cupti_init()
        try:
            _queued(contender, first, calls)
        finally:
            kernels = binding._cupti_get_timings(False)
        if not kernels:
            raise RuntimeError("CUPTI saw no kernels")
        return Time(1e-3 * sum(milliseconds for _, milliseconds in kernels) / calls, len(kernels) / calls)

    @staticmethod
    def _fault() -> str | None:
        """Tried on a call: the binding may be there and CUPTI forbidden, or taken by another profiler."""
        try:
            x = jnp.ones(1024)
            Timer(CUPTI)(Contender("", jax_call(lambda y: y + 1.0, [((x,), {})])), 0, 2)
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return None


def _cupti() -> Any:
    from jax._src.lib import mosaic_gpu

    return mosaic_gpu._mosaic_gpu_ext


def _queued(contender: Contender, first: int, calls: int) -> float:
    start = time.perf_counter()
    result = None
    for i in range(first, first + calls):
        result = contender.run(i)  # the one before is freed once the device is done with it
    contender.wait(result)
    return time.perf_counter() - start


def jax_call(function: Callable[..., Any], sets: Sequence[Arguments]) -> Callable[[int], Any]:
    """`Contender.run` of a function of arrays."""
    compiled = jax.jit(function)

    def run(i: int) -> Any:
        positional, named = sets[i % len(sets)]
        return compiled(*positional, **named)

    return run


def num_sets(case: Case) -> int:
    """How many input sets in turn push each other out of the cache."""
    return min(128, max(2, math.ceil(4 * CACHE / max(1, case.work.bytes))))


def make_sets(case: Case, seed: int, count: int) -> list[Arguments]:
    """Input sets of fresh numbers. Caches, which calls hand on, only in the first."""
    rng = np.random.default_rng(seed)
    sets = [case.make(rng)]
    for _ in range(count - 1):
        positional, named = case.make(rng)
        sets.append(((None,) * case.num_caches + positional[case.num_caches :], {} if case.num_caches else named))
    return jax.block_until_ready(sets)


def ours(case: Case, sets: Sequence[Arguments], name: str, ops: Any) -> Contender:
    operation = getattr(pallas_kernels, case.operation)
    call = lambda *positional, **named: operation(*positional, **named, **case.options, implementation=ops)
    return Contender(name, _handing_on(case, sets, call) if case.num_caches else jax_call(call, sets))


def _handing_on(case: Case, sets: Sequence[Arguments], call: Callable[..., Any]) -> Callable[[int], Any]:
    """Calls that get the caches of the one before, donated, as an engine's steps do."""
    n, (first, named) = case.num_caches, sets[0]
    step = jax.jit(lambda caches, scales, new: call(*caches, *new, **scales), donate_argnums=(0, 1))
    caches, scales = jax.tree.map(jnp.copy, (first[:n], named))

    def run(i: int) -> Any:
        nonlocal caches, scales
        result = step(caches, scales, sets[i % len(sets)][0][n:])
        caches, scales = result[:n], dict(zip(named, result[n:]))
        return result

    return run


def measure(
    contenders: Sequence[Contender], timer: Timer, rounds: int, doing: Callable[[Contender], None]
) -> dict[int, list[Time]]:
    """Times of each contender by its place, `rounds` of them, in turns, so that clocks and temperatures are alike for all."""
    calls = [_calls_a_round(contender) for contender in contenders]
    times: dict[int, list[Time]] = {i: [] for i in range(len(contenders))}
    for turn in range(rounds + 1):  # the first one warms up
        for i, contender in enumerate(contenders):
            slow = calls[i] == 1
            if slow and turn > 3:
                continue
            doing(contender)
            measured = timer(contender, turn * calls[i], calls[i])
            if turn:
                times[i].append(measured)
    return times


def _calls_a_round(contender: Contender) -> int:
    """About 10 ms of calls; 1 of those that take longer than 50."""
    seconds = min(_queued(contender, i, 1) for i in range(2))
    return 1 if seconds > 0.05 else min(32, max(4, round(0.01 / seconds)))


# -- ceilings --------------------------------------------------------------------------------------------------------------


class Ceilings(NamedTuple):
    copy: float  # bytes read and written a second, device to device
    matmul: float  # FLOP/s of a bf16 product of random numbers


def ceilings(timer: Timer, is_gpu: bool) -> Ceilings:
    n, size = (8192, 2**31) if is_gpu else (256, 2**20)
    keys = jax.random.split(jax.random.key(0), 4)
    squares = [(tuple(jax.random.normal(k, (n, n), jnp.bfloat16) for k in pair), {}) for pair in (keys[:2], keys[2:])]
    product = _best(Contender("product", jax_call(jnp.matmul, squares)), timer)
    del squares
    buffers = [((jax.random.bits(key, (size // 4,), jnp.uint32),), {}) for key in keys[:2]]
    # By a kernel: XLA makes of a plain copy a memcpy, which is not among CUPTI's kernels.
    by_kernel = _best(Contender("copy", jax_call(lambda x: x ^ jnp.uint32(1), buffers)), timer)
    by_memcpy = _best(Contender("memcpy", jax_call(jnp.copy, buffers)), Timer(WALL))
    return Ceilings(2 * size / min(by_kernel, by_memcpy), 2 * n**3 / product)


def _best(contender: Contender, timer: Timer) -> float:
    return statistics.median(t.seconds for t in measure([contender], timer, 7, lambda c: None)[0])


# -- errors ----------------------------------------------------------------------------------------------------------------


class Error(NamedTuple):
    largest: float
    relative: float  # ‖found - right‖ / ‖right‖
    is_wrong: bool


def errors(found: dict[str, Array], right: dict[str, Array], limits: dict[str, Limits]) -> dict[str, Error]:
    """Of each part of a result; a part that is not `found` is not looked at."""
    return {name: _error(found[name], right[name], limits[name]) for name in right if name in found}


def _error(found: Array, right: Array, limits: Limits) -> Error:
    if found.shape != right.shape:
        return Error(math.nan, math.nan, True)
    difference = jnp.abs(found - right)
    largest = jnp.max(jnp.abs(right), axis=-1, keepdims=True)
    allowed = jnp.all(difference <= limits.absolute + limits.of_vector * largest)  # not so for NaN
    size = jnp.linalg.norm(right.ravel())
    relative = float(jnp.linalg.norm(difference.ravel()) / jnp.maximum(size, jnp.finfo(jnp.float32).tiny))
    return Error(float(jnp.max(difference)), relative, not (bool(allowed) and relative <= limits.relative))
