"""Time of the sampler's functions, in milliseconds a call (the median).

python -m benchmarks.sampler [--rows 1 8 32] [--vocab 49152 128256] [--runs 20] [--json results/sampler.json]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from benchmarks import common
from jaxpaged import sampler
from jaxpaged.batch import Edits, Sampling

HISTORY, BIAS = 2048, 1024  # ids of history and bias entries a row


def median_ms(function: Callable, arguments: tuple, runs: int) -> float:
    compiled, times = jax.jit(function).lower(*arguments).compile(), []
    arguments = jax.device_put(arguments)
    for _ in range(runs + 1):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:])


def sampling(R: int, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Sampling:
    seeds = np.arange(2 * R, dtype=np.uint32).reshape(R, 2)
    full = lambda value, dtype: np.full(R, value, dtype)
    return Sampling(full(0.8, np.float32), full(top_k, np.int32), full(top_p, np.float32), full(min_p, np.float32), seeds)


def edits(rng: np.random.Generator, R: int, V: int) -> Edits:
    full = lambda value: np.full(R, value, np.float32)
    history = rng.integers(0, V, (R, HISTORY), dtype=np.int32)
    allowed = np.full((R, -(-V // 32)), 0xFFFFFFFF, np.uint32)
    bias_ids = np.stack([rng.permutation(V)[:BIAS].astype(np.int32) for _ in range(R)])
    num_prompt, num_history = np.full(R, HISTORY // 2, np.int32), np.full(R, HISTORY, np.int32)
    return Edits(full(0.5), full(0.5), full(1.1), history, num_prompt, num_history, allowed, bias_ids,
                 np.ones((R, BIAS), np.float32))  # fmt: skip


def logits(rng: np.random.Generator, R: int, V: int) -> np.ndarray:
    """Rows as language models give them: a few words stand out of a broad tail."""
    tail = rng.normal(0, 2, (R, V))
    tail[:, :200] += rng.exponential(4, (R, 200))
    return rng.permuted(tail, axis=1).astype(np.float32)


def measure(R: int, V: int, runs: int) -> dict[str, float]:
    rng = np.random.default_rng(common.SEED)
    x, places, tokens = logits(rng, R, V), np.arange(R, dtype=np.int32), np.zeros(R, np.int32)
    draws = {
        "sample": sampling(R),
        "sample min_p 0.05": sampling(R, min_p=0.05),
        "sample top_k 50": sampling(R, top_k=50),
        "sample top_p 0.95": sampling(R, top_p=0.95),
        "sample top_k 50 top_p 0.95": sampling(R, top_k=50, top_p=0.95),
    }
    result = {"greedy": median_ms(sampler.greedy, (x,), runs), "finite": median_ms(sampler.finite, (x,), runs)}
    result |= {name: median_ms(sampler.sample, (x, s, places), runs) for name, s in draws.items()}
    result["edit"] = median_ms(sampler.edit, (x, edits(rng, R, V), tokens, tokens == 0), runs)
    for k in (0, 20):
        result[f"logprobs {k}"] = median_ms(lambda x, t, k=k: sampler.logprobs(x, t, k), (x, tokens), runs)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 128256])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json")
    args = parser.parse_args()
    results = {f"{R} x {V}": measure(R, V, args.runs) for V in args.vocab for R in args.rows}
    print(f"{'ms a call':28}" + "".join(f"{shape:>13}" for shape in results))
    for name in next(iter(results.values())):
        print(f"{name:28}" + "".join(f"{result[name]:13.2f}" for result in results.values()))
    common.write_json(args.json, results)


if __name__ == "__main__":
    main()
