"""A Ray cluster of two nodes on this machine, whose processes all end with it.

with two_nodes() as cluster:
    ray.init(address=cluster.address, ...)

Every process of it inherits a variable of the environment; what is left of them at the end is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # what Ray will do some day; it warns until then

import ray
from ray import serve
from ray.cluster_utils import Cluster  # it reads the environment when it is imported

MARK = "JAXPAGED_TEST_CLUSTER"
with socket.create_server(("127.0.0.1", 0)) as free:
    PORT = free.getsockname()[1]
URL = f"http://127.0.0.1:{PORT}"
OBJECT_STORE = 150 * 2**20
ROOT = Path(__file__).parent.parent
# of workers: one device, the same code
WORKER = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}


@contextlib.contextmanager
def two_nodes(cpus_each: int = 1) -> Iterator[Cluster]:
    """The cluster; the caller connects to its `address`, and ends what it has started there."""
    mark = os.environ[MARK] = uuid.uuid4().hex
    node = {"num_cpus": cpus_each, "object_store_memory": OBJECT_STORE, "include_dashboard": False}
    cluster = None
    try:
        cluster = Cluster(initialize_head=True, head_node_args=node)
        cluster.add_node(**node)
        yield cluster
    finally:
        try:
            if cluster is not None:
                cluster.shutdown()
        finally:
            del os.environ[MARK]
            for pid in marked(mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def serving() -> Iterator[Cluster]:
    """Two nodes that applications can be run on."""
    with two_nodes() as cluster:
        ray.init(address=cluster.address, logging_level="warning", log_to_driver=False, runtime_env={"env_vars": WORKER})
        try:
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": PORT})
            yield cluster
        finally:
            with contextlib.suppress(Exception):
                serve.shutdown()
            ray.shutdown()


def marked(mark: str) -> list[int]:
    """Processes of a cluster, this one not counted."""
    return [pid for pid in _pids() if pid != os.getpid() and f"{MARK}={mark}".encode() in _read(pid, "environ").split(b"\0")]


def replicas() -> list[int]:
    """Processes that are replicas of an engine, in the cluster that is up."""
    return [pid for pid in marked(os.environ[MARK]) if b":Engine" in _read(pid, "cmdline")]


def num_running() -> tuple[int, int]:
    """Replicas of the application "demo" that run, and all."""
    states = serve.status().applications["demo"].deployments["Engine"].replica_states
    return states.get("RUNNING", 0), sum(states.values())


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _read(pid: int, what: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:  # it has ended, or is another user's
        return b""


# -- requests --------------------------------------------------------------------------------------------------------------


class Load:
    """Clients that ask one request after another, every other one for a stream."""

    def __init__(self, number: int, model: str = "demo"):
        self.done, self.failed, self.ending = [], [], threading.Event()  # (began, ended, is a stream, what went wrong)
        self.model = model
        self.threads = [threading.Thread(target=self._run, args=(i,)) for i in range(number)]
        for thread in self.threads:
            thread.start()

    def _run(self, client):
        for i in range(10_000):
            if self.ending.is_set():
                return
            stream, began = (client + i) % 2 == 0, time.monotonic()
            question = {"role": "user", "content": f"Client {client} wants to know: what is {i} + {client}?"}
            wrong = self._ask({"model": self.model, "messages": [question], "max_tokens": 8, "seed": i, "stream": stream})
            (self.failed if wrong else self.done).append((began, time.monotonic(), stream, wrong))

    def _ask(self, body):
        try:
            answer = httpx.post(f"{URL}/v1/chat/completions", json=body, timeout=120)
        except httpx.HTTPError as error:
            return repr(error)
        whole = answer.text.endswith("data: [DONE]\n\n") if body["stream"] else answer.status_code == 200
        return None if whole else f"{answer.status_code} {answer.text[-200:]}"

    def end(self):
        self.ending.set()
        for thread in self.threads:
            thread.join()
