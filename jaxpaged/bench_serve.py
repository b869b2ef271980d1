"""`jaxpaged bench serve`: sends requests to a running server, at a rate and with a limit, and times their streams.

Any OpenAI-compatible server will do. Token counts are the server's own (the usage block of the stream).
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from jaxpaged import bench_datasets, bench_report
from jaxpaged.bench_datasets import Sample
from jaxpaged.bench_options import DatasetOptions, ReportOptions, TargetOptions, TrafficOptions
from jaxpaged.bench_report import Record
from jaxpaged.remote import CONNECT_SECONDS, Server, auth_headers, error_text
from jaxpaged.request import RequestError

if TYPE_CHECKING:
    import aiohttp

POLL_SECONDS = 0.5  # between two looks whether the server is ready
KEEP_SECONDS = 2.0  # an idle connection is kept: less than servers do (uvicorn: 5 s), so none is closed under a request


class Run(NamedTuple):
    """records: of the requests that ended, in the order they were sent. seconds: of the whole run."""

    records: list[Record]
    seconds: float
    interrupted: bool


Send = Callable[[bytes], Awaitable[Record]]


def run(target: TargetOptions, data: DatasetOptions, traffic: TrafficOptions, report: ReportOptions) -> Run:
    """Measures, prints the table and writes the files that are asked for. RuntimeError if no request succeeds."""
    _load_aiohttp()
    if report.plot is not None:
        bench_report.load_matplotlib()
    metrics, percentiles, limits, labels = report.metrics, report.percentiles, report.limits, report.labels
    url, headers, extra = target.url, {**auth_headers(target.api_key), **target.headers}, _fields(target, data)
    samples = bench_datasets.load(data, data.num_prompts + 1, target.is_chat)
    model = _wait_until_ready(target, headers, traffic.ready_check_timeout_sec)
    bodies = [json.dumps(request_body(sample, model, target.is_chat, extra)).encode() for sample in samples]
    done = asyncio.run(_measure(url, headers, bodies, traffic, data.seed))
    result = {**_about(target, data, traffic, model), **labels,
              **bench_report.summarize(done.records, done.seconds, limits, percentiles)}  # fmt: skip
    print(bench_report.table(result, metrics, percentiles), flush=True)
    _write_files(done.records, result, report)
    _say_what_went_wrong(done, data.num_prompts)
    return done


def _load_aiohttp() -> Any:
    try:
        import aiohttp
    except ImportError:
        raise RuntimeError('bench serve needs aiohttp: pip install "jaxpaged[bench]"') from None
    return aiohttp


def _fields(target: TargetOptions, data: DatasetOptions) -> dict[str, Any]:
    """Of each request, beside its prompt and length. As in vLLM, answers to random prompts have the length asked for."""
    ignore_eos = data.dataset_name == "random" if target.ignore_eos is None else target.ignore_eos
    temperature = {} if target.temperature is None else {"temperature": target.temperature}
    return {**temperature, **({"ignore_eos": True} if ignore_eos else {}), **target.extra}


def _wait_until_ready(target: TargetOptions, headers: Mapping[str, str], seconds: float) -> str:
    """The name of the model, once the server answers. ConnectionError or RequestError if it does not in time."""
    deadline = time.monotonic() + seconds
    with Server(f"{target.root}/v1", headers=headers) as server:
        while True:
            try:
                found = server.models()
                return target.model or found[0]
            except (ConnectionError, RequestError) as error:
                status = error.status if isinstance(error, RequestError) else 503
                if status == 404 and target.model:
                    return target.model  # a server without the list
                if status != 503 or time.monotonic() >= deadline:
                    raise
            time.sleep(POLL_SECONDS)


def request_body(sample: Sample, model: str, is_chat: bool, extra: Mapping[str, Any]) -> dict[str, Any]:
    body = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    if is_chat:
        message = {"role": "user", "content": sample.prompt}
        return {**body, "messages": [message], "max_completion_tokens": sample.output_len, **extra}
    return {**body, "prompt": sample.prompt, "max_tokens": sample.output_len, **extra}


async def _measure(url: str, headers: Mapping[str, str], bodies: list[bytes], traffic: TrafficOptions, seed: int) -> Run:
    """The first body tests the server and warms it up; the others are the run."""
    aiohttp = _load_aiohttp()
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_SECONDS)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
    headers = {"Content-Type": "application/json", **headers}
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        send = lambda body: timed_request(session, url, body)
        trial, *bodies = bodies
        if (record := await send(trial)).error:
            raise RuntimeError(f"the test request to {url} failed: {record.error}")
        now = lambda count: np.zeros(count)
        warm_ups = [trial] * traffic.num_warmups
        await generate_load(send, warm_ups, now(len(warm_ups)), traffic.max_concurrency)
        times = arrival_times(len(bodies), traffic.request_rate, traffic.burstiness, np.random.default_rng(seed))
        with tqdm(total=len(bodies), disable=traffic.disable_tqdm, unit="req") as bar:
            return await generate_load(send, bodies, times, traffic.max_concurrency, bar.update)


def arrival_times(count: int, rate: float, burstiness: float, rng: np.random.Generator) -> np.ndarray:
    """Seconds from the start, [count]. Gaps have a gamma distribution; they are scaled so that the rate is met exactly."""
    if math.isinf(rate):
        return np.zeros(count)
    times = np.cumsum(rng.gamma(burstiness, 1.0, count))
    return times * (count / rate / times[-1])


async def generate_load(send: Send, bodies: Sequence[bytes], times: Sequence[float] | np.ndarray,
                        max_concurrency: int | None, on_end: Callable[[], Any] = lambda: None) -> Run:  # fmt: skip
    """Sends each body at its time, or later where max_concurrency are under way. Ctrl-C (cancellation) ends the run: what
    has ended by then is returned."""
    gate = nullcontext() if max_concurrency is None else asyncio.Semaphore(max_concurrency)

    async def one(body: bytes) -> Record:
        async with gate:
            record = await send(body)
        on_end()
        return record

    tasks, start, interrupted = list[asyncio.Task[Record]](), time.perf_counter(), False
    try:
        for body, at in zip(bodies, times):
            await asyncio.sleep(start + at - time.perf_counter())
            tasks.append(asyncio.create_task(one(body)))
        await asyncio.gather(*tasks)
    except asyncio.CancelledError:
        interrupted = True
        asyncio.current_task().uncancel()  # type: ignore[union-attr]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    ended = [task.result() for task in tasks if not task.cancelled()]
    return Run(ended, time.perf_counter() - start, interrupted)


async def timed_request(session: aiohttp.ClientSession, url: str, body: bytes) -> Record:
    """Sends one request and reads its stream. Whatever goes wrong is the record's error: the run goes on."""
    record = Record(time.perf_counter())
    try:
        async with session.post(url, data=body) as response:
            if response.status == 200:
                await _read_stream(response.content.iter_any(), record)
            else:
                record.error = error_text(response.status, await response.read())
    except Exception as error:
        record.error = f"{type(error).__name__}: {error}"
    record.end = time.perf_counter()
    return record


async def _read_stream(content: AsyncIterator[bytes], record: Record) -> None:
    """Reads to the end of the response, so that its connection can be used again."""
    parts, done = [], False
    async for data in _events(content):
        now = time.perf_counter()
        if data == b"[DONE]":
            done = True
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            raise RuntimeError(error_text(200, data))
        if usage := chunk.get("usage"):
            record.prompt_tokens, record.output_tokens = usage["prompt_tokens"], usage.get("completion_tokens", 0)
        for choice in chunk.get("choices", ()):
            if (text := _new_text(choice)) is not None:
                record.chunk_times.append(now)
                parts.append(text)
    if not done:
        raise RuntimeError("the stream ended before [DONE]")
    record.text = "".join(parts)
    record.chunk_times = record.chunk_times or [time.perf_counter()]  # an answer without text
    record.output_tokens = record.output_tokens or len(parts)  # a server without usage


async def _events(content: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events; here each has one line of it."""
    rest = b""
    async for part in content:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _new_text(choice: dict[str, Any]) -> str | None:
    """The text of a chunk. It may be empty (a token of half a character); None if the chunk only opens or ends a stream."""
    delta = choice.get("delta") or choice
    text = delta.get("content") or delta.get("reasoning") or delta.get("reasoning_content") or delta.get("text") or ""
    has_token = text or delta.get("tool_calls") or not (delta.get("role") or choice.get("finish_reason"))
    return text if has_token else None


def _about(target: TargetOptions, data: DatasetOptions, traffic: TrafficOptions, model: str) -> dict[str, Any]:
    """What was measured, under the keys of vLLM's JSON."""
    rate = traffic.request_rate
    return {"date": f"{datetime.now():%Y%m%d-%H%M%S}", "endpoint_type": target.backend, "backend": target.backend,
            "model_id": model, "tokenizer_id": data.tokenizer, "dataset_name": data.dataset_name,
            "num_prompts": data.num_prompts, "request_rate": "inf" if math.isinf(rate) else rate,
            "burstiness": traffic.burstiness, "max_concurrency": traffic.max_concurrency}  # fmt: skip


def _write_files(records: list[Record], result: dict[str, Any], report: ReportOptions) -> None:
    if report.save_result or report.save_detailed:
        more = bench_report.details(records) if report.save_detailed else {}
        _say(f"Saved {bench_report.save({**result, **more}, report)}.")
    if report.plot is not None:
        title = f"{result['model_id']}: {result['completed']} requests, {result['output_throughput']:,.0f} tok/s"
        bench_report.plot(records, title, report.plot)
        _say(f"Saved {report.plot}.")


def _say_what_went_wrong(done: Run, num_prompts: int) -> None:
    """RuntimeError if no request succeeded."""
    errors = [record.error for record in done.records if record.error]
    if done.interrupted:
        _say(f"Interrupted: {len(done.records)} of {num_prompts} requests had ended.")
    elif len(errors) == len(done.records):
        raise RuntimeError(f"no request succeeded; the first error: {errors[0]}")
    if errors:
        _say(f"{len(errors)} requests failed; the first error: {errors[0]}")
    if any(not record.error and not record.prompt_tokens for record in done.records):
        _say("The server sends no usage: input tokens are missing, and output tokens are counted as chunks.")


def _say(line: str) -> None:
    print(line, file=sys.stderr)
