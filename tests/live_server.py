"""The real server, on a loopback port of its own, in a thread:

    with serve(service) as live:
        httpx.get(f"{live.base_url}/health")

Leaving the block fails if a request still runs in the engine, or a task in the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn

from jaxpaged_server.app import create_app
from jaxpaged_server.run import Protocol, Server
from jaxpaged_server.service import Service

PATIENCE = 5.0  # seconds: for what is there within milliseconds, or never


class LiveServer:
    """base_url: without a path. service: to look at the engine."""

    def __init__(self, service: Service):
        self.service = service
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.base_url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(create_app(service), http=Protocol, ws="none", log_config=None, timeout_graceful_shutdown=5)
        self._server = Server(config, service)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="live-server")
        self._left: list[str] = []

    async def _serve(self) -> None:
        await self._server.serve([self._socket])
        await asyncio.sleep(0)  # what has been cancelled ends now
        self._left = [repr(task) for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    def start(self) -> None:
        self._thread.start()
        wait_until(lambda: self._server.started or not self._thread.is_alive(), "the server starts")
        assert self._thread.is_alive(), "the server did not start; the log says why"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=4 * PATIENCE)
        self._socket.close()
        assert not self._thread.is_alive(), "the server does not stop"

    def check(self) -> None:
        """Waits until the engine has ended every request."""
        streams = self.service.engine.streams
        wait_until(lambda: not streams, lambda: f"no request is left behind in the engine: {sorted(streams)}")

    def check_tasks(self) -> None:
        assert not self._left, f"tasks were left behind: {self._left}"


@contextlib.contextmanager
def serve(service: Service) -> Iterator[LiveServer]:
    live = LiveServer(service)
    live.start()
    try:
        yield live
        live.check()
    finally:
        live.stop()
    live.check_tasks()


def wait_until(condition: Callable[[], bool], what: str | Callable[[], str], seconds: float = PATIENCE) -> None:
    """AssertionError, which says what was expected, if the condition does not come true in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what if isinstance(what, str) else what()}"
        time.sleep(0.005)
