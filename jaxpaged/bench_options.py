"""What `jaxpaged bench serve` can be told: flags of `vllm bench serve` by its names, in groups, with their checks.

A group is a dataclass whose docstring is its title and whose fields are annotated with their help (cli_clients.py makes
flags of them). Standard library only: it is read for every `--help`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from jaxpaged.request import RequestError

BACKENDS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}
DATASETS = ("random", "sharegpt", "prefix_repetition")
METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
GOODPUT_METRICS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class TargetOptions:
    """Server and requests"""

    base_url: Annotated[str | None, "The server. (default: of --host and --port)"] = None
    host: Annotated[str, "Its host."] = "127.0.0.1"
    port: Annotated[int, "Its port."] = 8000
    endpoint: Annotated[str | None, "Path of the requests. (default: the backend's)"] = None
    backend: Annotated[str, "openai or vllm: completions; openai-chat: chat completions."] = "openai"
    model: Annotated[str | None, "Name of the model. (default: the first of /v1/models)"] = None
    api_key: Annotated[str | None, "Bearer token (or set OPENAI_API_KEY)."] = None
    header: Annotated[list[str] | None, "KEY=VALUE of each request; may be given several times."] = None
    extra_body: Annotated[str | None, 'JSON object of further fields: {"top_p": 0.9}.'] = None
    temperature: Annotated[float | None, "0 is greedy. (default: the server's)"] = None
    ignore_eos: Annotated[bool | None, "Generate all output tokens. (default: with random prompts)"] = None

    @property
    def root(self) -> str:
        return (self.base_url or f"http://{self.host}:{self.port}").rstrip("/")

    @property
    def url(self) -> str:
        if self.backend not in BACKENDS:
            raise RequestError(f"--backend must be {', '.join(BACKENDS)}, got {self.backend!r}.", "backend")
        return self.root + (self.endpoint or BACKENDS[self.backend])

    @property
    def is_chat(self) -> bool:
        return self.backend == "openai-chat"

    @property
    def headers(self) -> dict[str, str]:
        return _key_values("header", self.header)

    @property
    def extra(self) -> dict[str, Any]:
        try:
            found = json.loads(self.extra_body or "{}")
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise RequestError(f"--extra-body must be a JSON object, got {self.extra_body!r}.", "extra_body")
        return found


@dataclass(frozen=True)
class TrafficOptions:
    """Traffic"""

    request_rate: Annotated[float, "Requests a second; inf: all at once."] = math.inf
    burstiness: Annotated[float, "1: a Poisson process; less: in bursts; more: evenly (gamma distribution)."] = 1.0
    max_concurrency: Annotated[int | None, "Most requests under way. (default: no limit)"] = None
    num_warmups: Annotated[int, "Requests that do not count, after the one that tests the server."] = 0
    ready_check_timeout_sec: Annotated[float, "Wait so long for the server to be ready."] = 0.0
    disable_tqdm: Annotated[bool, "No progress bar."] = False

    def __post_init__(self) -> None:
        _check_least(self, max_concurrency=1, num_warmups=0)
        for name in ("request_rate", "burstiness"):
            if not (value := getattr(self, name)) > 0:
                raise RequestError(f"--{name.replace('_', '-')} must be more than 0, got {value}.", name)


@dataclass(frozen=True)
class DatasetOptions:
    """Data"""

    dataset_name: Annotated[str, f"One of {', '.join(DATASETS)}."] = "random"
    dataset_path: Annotated[Path | None, "The JSON file of sharegpt."] = None
    num_prompts: Annotated[int, "Requests that count."] = 1000
    seed: Annotated[int, "Of prompts, lengths and arrival times."] = 0
    tokenizer: Annotated[str | None, "A model's name or folder: exact lengths of texts, random text for a chat."] = None
    vocab_size: Annotated[int, "Random token ids are below this, and not in its first tenth (special tokens)."] = 10_000
    random_input_len: Annotated[int, "Tokens a prompt."] = 1024
    random_output_len: Annotated[int, "Tokens an answer."] = 128
    random_range_ratio: Annotated[float, "Lengths are uniform in [len * (1 - r), len * (1 + r)]."] = 0.0
    random_prefix_len: Annotated[int, "Tokens that all prompts begin with, before random-input-len others."] = 0
    prefix_repetition_prefix_len: Annotated[int, "Tokens of a prefix."] = 256
    prefix_repetition_suffix_len: Annotated[int, "Tokens after it."] = 256
    prefix_repetition_num_prefixes: Annotated[int, "Prefixes; prompts are shared out among them."] = 10
    prefix_repetition_output_len: Annotated[int, "Tokens an answer."] = 128
    sharegpt_output_len: Annotated[int | None, "Tokens an answer. (default: as long as the one in the file)"] = None

    def __post_init__(self) -> None:
        if self.dataset_name not in DATASETS:
            raise RequestError(f"--dataset-name must be {', '.join(DATASETS)}, got {self.dataset_name!r}.", "dataset_name")
        if (self.dataset_name == "sharegpt") != (self.dataset_path is not None):
            raise RequestError(
                "--dataset-name sharegpt needs --dataset-path FILE.json, and the others take none.", "dataset_path"
            )
        if not 0 <= self.random_range_ratio < 1:
            raise RequestError(f"--random-range-ratio must be in [0, 1), got {self.random_range_ratio}.", "random_range_ratio")
        _check_least(
            self, num_prompts=1, vocab_size=2, seed=0, random_input_len=1, random_output_len=1, random_prefix_len=0,
            prefix_repetition_prefix_len=0, prefix_repetition_suffix_len=1, prefix_repetition_num_prefixes=1,
            prefix_repetition_output_len=1, sharegpt_output_len=1,
        )  # fmt: skip


@dataclass(frozen=True)
class ReportOptions:
    """Report"""

    percentile_metrics: Annotated[str, f"Which of {','.join(METRICS)} to show."] = ",".join(METRICS)
    metric_percentiles: Annotated[str, "Percentiles of them: 25,50,99."] = "99"
    goodput: Annotated[list[str] | None, 'Limits in ms that a good request keeps: "ttft:200 tpot:50 e2el:3000".'] = None
    save_result: Annotated[bool, "Write the figures to a JSON file."] = False
    save_detailed: Annotated[bool, "The same with each request's times, text and error."] = False
    result_dir: Annotated[Path, "Where the JSON file goes."] = Path(".")
    result_filename: Annotated[str | None, "Its name. (default: backend, rate, model and date)"] = None
    metadata: Annotated[list[str] | None, "KEY=VALUE to keep in the JSON file; may be given several times."] = None
    plot: Annotated[Path | None, "Draw the distributions of TTFT and ITL as a .png or .svg file."] = None

    @property
    def labels(self) -> dict[str, str]:
        return _key_values("metadata", self.metadata)

    @property
    def metrics(self) -> list[str]:
        names = _split(self.percentile_metrics)
        for name in names:
            if name not in METRICS:
                raise RequestError(f"--percentile-metrics takes {', '.join(METRICS)}, got {name!r}.", "percentile_metrics")
        return names

    @property
    def percentiles(self) -> list[float]:
        try:
            found = [float(text) for text in _split(self.metric_percentiles)]
        except ValueError:
            found = [-1.0]
        if not all(0 <= p <= 100 for p in found):
            raise RequestError(f"--metric-percentiles takes numbers in [0, 100] with commas between them, got "
                               f"{self.metric_percentiles!r}.", "metric_percentiles")  # fmt: skip
        return found

    @property
    def limits(self) -> dict[str, float]:
        """Metric -> most milliseconds."""
        found = {}
        for pair in _split(" ".join(self.goodput or [])):
            name, _, value = pair.partition(":")
            if name not in GOODPUT_METRICS or not value.replace(".", "", 1).isdigit():
                raise RequestError(f"--goodput takes METRIC:MILLISECONDS with a metric of {', '.join(GOODPUT_METRICS)}, got "
                                   f"{pair!r}.", "goodput")  # fmt: skip
            found[name] = float(value)
        return found


def _split(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _key_values(flag: str, pairs: Sequence[str] | None) -> dict[str, str]:
    for pair in pairs or []:
        if "=" not in pair:
            raise RequestError(f"--{flag} takes KEY=VALUE, got {pair!r}.", flag)
    return {key.strip(): value.strip() for key, _, value in (pair.partition("=") for pair in pairs or [])}


def _check_least(options: Any, **least: int) -> None:
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise RequestError(f"--{name.replace('_', '-')} must be at least {bound}, got {value}.", name)
