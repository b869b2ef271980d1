"""`jaxpaged bench`: latency, throughput and start-up time of a model, on random prompts. Floor: above `llm`."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from jaxpaged.llm import LLM
from jaxpaged.request import RequestError, RequestOutputKind, SamplingParams
from jaxpaged.stepping import outputs_of


def _prompts(llm: LLM, lengths: list[int], run: int) -> list[list[int]]:
    """Fresh random words in each run: the prefix cache cannot help from one run to the next."""
    rng = np.random.default_rng(run)
    return [rng.integers(0, llm.engine.limits.vocab_size, n).tolist() for n in lengths]


def _check(llm: LLM, input_len: int, output_len: int) -> None:
    longest = llm.engine.limits.max_model_len
    if min(input_len, output_len) < 1 or input_len + output_len > longest:
        raise RequestError(f"input_len={input_len} and output_len={output_len} must be at least 1 and together at most "
                           f"max_model_len={longest}.", "input_len")  # fmt: skip


def latency(llm: LLM, batch_size: int, input_len: int, output_len: int, num_iters: int) -> dict[str, Any]:
    """Seconds of a batch of equal requests: medians over `num_iters` runs after one that warms up. In each run, TTFT and
    TPOT are means over the requests."""
    _check(llm, input_len, output_len)
    runs = [_timed_batch(llm, batch_size, input_len, output_len, run) for run in range(num_iters + 1)][1:]
    middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    worst = max(run["total_s"] for run in runs)
    return {"batch_size": batch_size, "input_len": input_len, "output_len": output_len, "runs": num_iters, **middle,
            "slowest_total_s": worst}  # fmt: skip


def _timed_batch(llm: LLM, batch_size: int, input_len: int, output_len: int, run: int) -> dict[str, float]:
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False,
                            output_kind=RequestOutputKind.DELTA)  # fmt: skip
    first, last = dict[str, float](), dict[str, float]()
    start = time.perf_counter()
    for i, prompt in enumerate(_prompts(llm, [input_len] * batch_size, run)):
        llm.engines[i % len(llm.engines)].submit(f"bench-{run}-{i}", prompt, params)
    for output in outputs_of(llm.engines):
        last[output.request_id] = time.perf_counter()
        first.setdefault(output.request_id, last[output.request_id])
    total, steps = max(last.values()) - start, max(output_len - 1, 1)
    return {"ttft_s": statistics.mean(first.values()) - start,
            "tpot_s": statistics.mean((last[i] - first[i]) / steps for i in first), "total_s": total,
            "output_tokens_per_s": batch_size * output_len / total}  # fmt: skip


def throughput(llm: LLM, num_prompts: int, input_len: int, output_len: int) -> dict[str, Any]:
    """Tokens a second of `num_prompts` requests whose lengths are log-uniform from an eighth of the longest up."""
    _check(llm, input_len, output_len)
    rng = np.random.default_rng(0)
    lengths = lambda longest: np.exp(rng.uniform(np.log(max(1, longest / 8)), np.log(longest), num_prompts)).round().astype(int)
    inputs, outputs = lengths(input_len).tolist(), lengths(output_len).tolist()
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in outputs]
    llm.generate(_prompts(llm, inputs[:4], 0), params[:4], use_tqdm=False)  # warms up
    start = time.perf_counter()
    llm.generate(_prompts(llm, inputs, 1), params)
    seconds = time.perf_counter() - start
    return {"num_prompts": num_prompts, "input_tokens": sum(inputs), "output_tokens": sum(outputs), "seconds": seconds,
            "requests_per_s": num_prompts / seconds, "output_tokens_per_s": sum(outputs) / seconds,
            "total_tokens_per_s": (sum(inputs) + sum(outputs)) / seconds}  # fmt: skip


_START = """
import json, sys, time
began = time.perf_counter()
import jaxpaged
engine = json.loads(sys.argv[1])
with jaxpaged.LLM(use_tqdm=False, **engine) as llm:
    built = time.perf_counter()
    llm.generate([[1, 2, 3]], jaxpaged.SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    print(json.dumps({**llm._built.seconds, "first token": time.perf_counter() - built, "ready": built - began}))
"""


def startup(engine: dict[str, Any], num_iters: int) -> dict[str, Any]:
    """Seconds of each stage of a start in a process of its own: once with an empty cache of compiled programs ("cold"),
    then the median of `num_iters` starts with a full one ("warm")."""
    with tempfile.TemporaryDirectory() as cache:
        engine = {**engine, "compilation_cache_dir": cache}
        cold = _start(engine)
        warm = [_start(engine) for _ in range(num_iters)]
    medians = {stage: statistics.median(run[stage] for run in warm) for stage in cold}
    return {f"cold: {k} (s)": v for k, v in cold.items()} | {f"warm: {k} (s)": v for k, v in medians.items()}


def _start(engine: dict[str, Any]) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", _START, json.dumps(engine)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the engine did not start:\n{done.stderr.strip().splitlines()[-1] if done.stderr else ''}")
    return json.loads(done.stdout.splitlines()[-1])
