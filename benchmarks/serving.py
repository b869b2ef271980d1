"""The server under load, four measurements:

python -m benchmarks.serving null      200 streams of a model that takes no time: tokens/s; and how long a token is under way
                                       from one that makes 200 tokens in 9 ms
python -m benchmarks.serving soak      100,000 requests: memory, pages, tasks
python -m benchmarks.serving leave     1,000 clients that connect and leave at random moments
python -m benchmarks.serving model     a real model, 32 clients, beside the offline engine on the same prompts

The load comes from this process, over loopback; the server is a process of its own, on the same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import uvloop

from benchmarks import common
from benchmarks.null_server import CLOCK

HOST = "127.0.0.1"
STAMPS = re.compile(rb'"text":"((?:\d{7} )+)"')
LOOK, LOOKS = 0.001, 10  # seconds between looks for new tokens; looks of the probes to one of the others
TAIL = 600  # bytes at the end of a stream that have its last events
BUFFER = memoryview(bytearray(2**18))  # one for all streams: an answer that is not measured is not worth memory of its own
REQUEST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
TICK = os.sysconf("SC_CLK_TCK")


class Server:
    """A server process at a free port."""

    def __init__(self, command: list[str]):
        with socket.create_server((HOST, 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://{HOST}:{self.port}"
        self.process = subprocess.Popen([sys.executable, "-m", *command, "--port", str(self.port)])

    def wait_ready(self, seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(httpx2.HTTPError):
                if httpx2.get(f"{self.url}/health").status_code == 200:
                    return
            time.sleep(0.2)
        raise RuntimeError("the server did not start")

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def memory_mib(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def metric(self, name: str, **labels: str) -> float:
        text = httpx2.get(f"{self.url}/metrics").text
        wanted = "".join(f'(?=.*{label}="{value}")' for label, value in labels.items())
        found = re.search(rf"^jaxpaged:{name}{wanted}[^ ]* ([0-9.e+]+)$", text, re.MULTILINE)
        assert found, f"/metrics has no {name} {labels}"
        return float(found[1])

    def tasks(self) -> int:
        return httpx2.get(f"{self.url}/debug/tasks").json()["tasks"]


@contextlib.contextmanager
def serving(command: list[str]) -> Iterator[Server]:
    server = Server(command)
    try:
        server.wait_ready()
        yield server
    finally:
        server.process.terminate()
        server.process.wait(60)


class Client(asyncio.Protocol):
    """One request, as cheap as can be: the load must not cost more than what is measured. `took`: called with each piece of
    the answer. until: what its last piece has in it."""

    def __init__(self, body: dict[str, Any], took: Callable[[bytes], None], until: bytes = b"data: [DONE]"):
        self.body, self.took, self.until = json.dumps(body).encode(), took, until
        self.transport: Any = None
        self.ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()  # True: with its last event

    def leave(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(REQUEST % (len(self.body), self.body))

    def data_received(self, data: bytes) -> None:
        self.took(data)
        if self.until in data:
            self.transport.close()
            self._end(True)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(False)

    def _end(self, whole: bool) -> None:
        if not self.ended.done():
            self.ended.set_result(whole)


async def ask(port: int, client: Client) -> bool:
    await asyncio.get_running_loop().create_connection(lambda: client, HOST, port)
    return await client.ended


# -- null: the path of a token --------------------------------------------------------------------------------------------


class Reader:
    """One stream, read from a plain socket. `late`: microseconds that tokens were under way, with the time they were read; only
    of streams that are probes, for reading the stamps is most of what a client costs."""

    def __init__(self, port: int, tokens: int, probe: bool):
        self.probe, self.late, self.tail = probe, list[tuple[float, int]](), b""
        self.socket = socket.create_connection((HOST, port))
        body = json.dumps({"prompt": "hello", "max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}})
        self.socket.sendall(REQUEST % (len(body), body.encode()))
        self.socket.setblocking(False)

    def read(self) -> bool:
        """Takes what is there. True at the end of the stream."""
        size = self.socket.recv_into(BUFFER)
        data = bytes(BUFFER[:size] if self.probe else BUFFER[max(0, size - TAIL) : size])
        if self.probe:
            now = time.monotonic()
            clock = int(now * 1e6) % CLOCK
            for match in STAMPS.finditer(data):
                self.late.extend((now, (clock - int(stamp)) % CLOCK) for stamp in match[1].split())
        self.tail = (self.tail + data)[-TAIL:]
        if data and b"data: [DONE]" not in self.tail:
            return False
        self.socket.close()
        return True

    @property
    def num_tokens(self) -> int:
        found = re.search(rb'"completion_tokens":([0-9]+)', self.tail)
        return int(found[1]) if found else 0


class Readers:
    """Streams that are looked at together."""

    def __init__(self, readers: Iterable[Reader]):
        self.open = {reader.socket.fileno(): reader for reader in readers}
        self._poll = select.epoll()
        for number in self.open:
            self._poll.register(number, select.EPOLLIN)

    def read(self) -> None:
        for number, _ in self._poll.poll(0):
            if self.open[number].read():
                del self.open[number]


def stream_all(port: int, clients: int, tokens: int) -> dict[str, float]:
    """Every client streams `tokens` tokens at once. Latency: from sampling to this process, of every tenth client, without the
    first tenth of the time, in which the requests arrive. These look for new tokens every LOOK seconds, the others now and
    then: 200 clients that are woken for each token would cost more than the server, on the same cores."""
    start = time.monotonic()
    readers = [Reader(port, tokens, i % 10 == 0) for i in range(clients)]
    probes, others = (Readers(reader for reader in readers if reader.probe is probe) for probe in (True, False))
    while probes.open or others.open:
        for _ in range(LOOKS):
            probes.read()
            time.sleep(LOOK)
        others.read()
    seconds = time.monotonic() - start
    assert all(reader.num_tokens == tokens for reader in readers), "a stream was cut short"
    late = sorted(micros for reader in readers for at, micros in reader.late if at > start + 0.1 * seconds)
    at = lambda share: late[int(share * (len(late) - 1))] / 1000
    return {"tokens_per_s": clients * tokens / seconds, "p50_ms": at(0.5), "p99_ms": at(0.99), "max_ms": at(1)}


def null(args: argparse.Namespace) -> dict[str, Any]:
    """Twice: as fast as it goes, where a token waits because everything is busy; and at the pace of a device that takes
    step_ms for a step, where what a token waits is what the server adds."""
    found = dict[str, Any]()
    for pace, step_ms in (("full", 0.0), ("paced", args.step_ms)):
        with serving(["benchmarks.null_server", "--max-num-seqs", "256", "--step-ms", str(step_ms)]) as server:
            print(f"  {pace}:", flush=True)
            median = common.median_of(args.runs, partial(_measure, server, args))
        found |= {f"{pace}_{name}": value for name, value in median.items()}
    return found


def _measure(server: Server, args: argparse.Namespace, run: int) -> dict[str, float]:
    before = server.cpu_seconds()
    found = stream_all(server.port, args.clients, args.tokens)
    found["server_cpu_us_per_token"] = (server.cpu_seconds() - before) * 1e6 / (args.clients * args.tokens)
    print(f"  run {run}: " + ", ".join(f"{k} {v:,.1f}" for k, v in found.items()), flush=True)
    return found


# -- soak and leave: nothing is left behind -------------------------------------------------------------------------------


async def many(port: int, count: int, at_once: int, one: Callable[[int], Client]) -> None:
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await ask(port, one(number))

    await asyncio.gather(*(worker() for _ in range(at_once)))


def soak(args: argparse.Namespace) -> dict[str, Any]:
    """Memory after each tenth; requests differ in prompt and length, half of them stream."""
    memory, rng = [], random.Random(0)

    def one(number: int) -> Client:
        stream = number % 2 == 0
        prompt = "".join(rng.choices("abcdefgh ", k=rng.randint(1, 60)))
        body = {"prompt": prompt, "max_tokens": rng.randint(1, 16), "stream": stream}
        return Client(body, lambda data: None, until=b"data: [DONE]" if stream else b'"usage"')

    with serving(["benchmarks.null_server", "--max-num-seqs", "128"]) as server:
        uvloop.run(many(server.port, 2000, 100, one))
        tasks = server.tasks()
        start = time.monotonic()
        for _ in range(10):
            uvloop.run(many(server.port, args.requests // 10, 100, one))
            memory.append(server.memory_mib())
            print(f"  memory {memory[-1]:.1f} MiB", flush=True)
        return {"requests_per_s": args.requests / (time.monotonic() - start), "memory_mib": memory, **left(server, tasks)}


def leave(args: argparse.Namespace) -> dict[str, Any]:
    """Clients drop the connection up to half a second after they have connected, streaming or not, with one or two samples."""
    rng = random.Random(1)

    def one(number: int) -> Client:
        body = {"prompt": "hello", "max_tokens": 2000, "stream": number % 3 != 0, "n": 1 + number % 2, "seed": number}
        client = Client(body, lambda data: None)
        asyncio.get_running_loop().call_later(rng.uniform(0, 0.5), client.leave)
        return client

    with serving(["benchmarks.null_server", "--max-num-seqs", "128", "--step-ms", "5"]) as server:
        tasks = server.tasks()
        uvloop.run(many(server.port, args.clients, 100, one))
        steps = server.metric("engine_steps_total")
        start = time.monotonic()
        while server.metric("num_requests_running") and time.monotonic() < start + 30:
            time.sleep(0.002)
        return {"steps_until_idle": server.metric("engine_steps_total") - steps, **left(server, tasks)}


def left(server: Server, tasks: int) -> dict[str, float]:
    """What is still there when nobody asks for anything."""
    time.sleep(0.5)
    return {"pages_held": server.metric("kv_cache_pages", state="held"), "running": server.metric("num_requests_running"),
            "waiting": server.metric("num_requests_waiting"), "tasks_left": server.tasks() - tasks}  # fmt: skip


# -- model: beside the offline engine -------------------------------------------------------------------------------------


def model(args: argparse.Namespace) -> dict[str, Any]:
    """Workload B (64 requests, 32 at once): the engine alone in this process, and behind the server; alternately."""
    from benchmarks.throughput import run_jaxpaged
    from jaxpaged import LLM

    flags = {"max_num_seqs": 32, "max_model_len": 2048}
    command = ["jaxpaged.cli", "serve", args.model, "--disable-uvicorn-access-log", "--log-level", "warning"]
    command += [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    with LLM(args.model, **flags) as llm, serving(command) as server:
        vocab = llm.engine.limits.vocab_size

        def measure(run: int) -> dict[str, float]:
            work = common.workload("B", vocab, run)
            offline = work.output_tokens / run_jaxpaged(llm, work)
            bodies = [{"prompt": i.prompt, "max_tokens": i.output, "ignore_eos": True, "temperature": 0, "stream": True}
                      for i in work.items]  # fmt: skip
            start = time.perf_counter()
            uvloop.run(many(server.port, len(bodies), 32, lambda number: Client(bodies[number], lambda data: None)))
            served = work.output_tokens / (time.perf_counter() - start)
            print(f"  run {run}: offline {offline:.1f} tokens/s, server {served:.1f}: {served / offline:.3f}", flush=True)
            return {"offline_tokens_per_s": offline, "server_tokens_per_s": served, "ratio": served / offline}

        return common.median_of(args.runs, measure)


PARTS = {"null": null, "soak": soak, "leave": leave, "model": model}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--clients", type=int)
    parser.add_argument("--tokens", type=int, default=500, help="null: of each stream")
    parser.add_argument("--step-ms", type=float, default=9.0, help="null: how long the pretended device takes for a step")
    parser.add_argument("--requests", type=int, default=100_000, help="soak")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json")
    args = parser.parse_args()
    args.clients = args.clients or {"leave": 1000}.get(args.part, 200)
    result = PARTS[args.part](args)
    for name, value in result.items():
        print(f"{name}: {value:,.3f}" if isinstance(value, float) else f"{name}: {value}")
    common.write_json(args.json, {args.part: result})


if __name__ == "__main__":
    main()
