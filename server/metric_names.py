"""The histograms that are exposed: names, meanings and buckets. They are vLLM's (0.33) where vLLM has them: dashboards
depend on each. The two of a step are ours."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, takewhile
from typing import NamedTuple

TIME_TO_FIRST_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
                               80, 160, 640, 2560)  # fmt: skip
INTER_TOKEN_LATENCY_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_LATENCY_BUCKETS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
ITERATION_TOKENS_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
REQUEST_PARAMS_N_BUCKETS = (1, 2, 5, 10, 20)
REQUEST_NUM_PREEMPTIONS_BUCKETS = (1, 2, 3, 4, 5, 10, 20)
STEP_TIME_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Shape(NamedTuple):
    """What a histogram means, and its buckets."""

    help: str
    buckets: Sequence[float]


def histograms(max_model_len: int) -> dict[str, Shape]:
    """Those of the engine, by name."""
    tokens = token_buckets(max_model_len)
    latency = REQUEST_LATENCY_BUCKETS
    return {
        "iteration_tokens_total": Shape("Histogram of number of tokens per engine_step.", ITERATION_TOKENS_BUCKETS),
        "time_to_first_token_seconds": Shape("Histogram of time to first token in seconds.", TIME_TO_FIRST_TOKEN_BUCKETS),
        "inter_token_latency_seconds": Shape("Histogram of inter-token latency in seconds.", INTER_TOKEN_LATENCY_BUCKETS),
        "request_time_per_output_token_seconds": Shape(
            "Histogram of time_per_output_token_seconds per request.", INTER_TOKEN_LATENCY_BUCKETS
        ),
        "e2e_request_latency_seconds": Shape("Histogram of e2e request latency in seconds.", latency),
        "request_queue_time_seconds": Shape("Histogram of time spent in WAITING phase for request.", latency),
        "request_inference_time_seconds": Shape("Histogram of time spent in RUNNING phase for request.", latency),
        "request_prefill_time_seconds": Shape("Histogram of time spent in PREFILL phase for request.", latency),
        "request_decode_time_seconds": Shape("Histogram of time spent in DECODE phase for request.", latency),
        "request_prompt_tokens": Shape("Number of prefill tokens processed.", tokens),
        "request_generation_tokens": Shape("Number of generation tokens processed.", tokens),
        "request_max_num_generation_tokens": Shape("Histogram of maximum number of requested generation tokens.", tokens),
        "request_prefill_kv_computed_tokens": Shape(
            "Histogram of new KV tokens computed during prefill (excluding cached tokens).", tokens
        ),
        "request_params_n": Shape("Histogram of the n request parameter.", REQUEST_PARAMS_N_BUCKETS),
        "request_params_max_tokens": Shape("Histogram of the max_tokens request parameter.", tokens),
        "request_num_preemptions": Shape(
            "Histogram of the number of times a request was preempted.", REQUEST_NUM_PREEMPTIONS_BUCKETS
        ),
        "step_host_seconds": Shape("Histogram of the time a step kept the host busy in seconds.", STEP_TIME_BUCKETS),
        "step_device_wait_seconds": Shape(
            "Histogram of the time the host waited for the device in a step in seconds; the device also works while the "
            "host does.", STEP_TIME_BUCKETS
        ),
    }  # fmt: skip


def token_buckets(largest: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to `largest`."""
    series = (digit * 10**power for power in count() for digit in (1, 2, 5))
    return list(takewhile(lambda bucket: bucket <= largest, series))
