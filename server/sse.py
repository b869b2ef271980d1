"""Server-sent events (WHATWG HTML, 9.2) with an eye on the client: one that leaves, and one that stops reading."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxpaged_server.http_metrics import DIRECT

log = logging.getLogger(__name__)
T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
ABORT = "jaxpaged.abort"  # of scope["extensions"]: a function that drops the connection, where the HTTP server has one
_encode = msgspec.json.Encoder().encode


def event(data: Any, name: str | None = None) -> bytes:
    """One event: `data` as JSON, and its name for APIs that have one."""
    prefix = b"data: " if name is None else b"event: " + name.encode() + b"\ndata: "
    return prefix + _encode(data) + b"\n\n"


class ClientGone(Exception):
    """The client has closed the connection."""


class Watch:
    """Drops clients that have not read for `timeout` seconds. 0: nobody is dropped."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self._streams: set[EventStream] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, stream: EventStream) -> None:
        self._streams.add(stream)
        if self._timer is None and self.timeout:
            self._later()

    def remove(self, stream: EventStream) -> None:
        self._streams.discard(stream)

    def _later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(min(1.0, self.timeout / 4), self._look)

    def _look(self) -> None:
        self._timer = None
        oldest = time.monotonic() - self.timeout
        for stream in [stream for stream in self._streams if stream.sending_since < oldest]:
            log.warning("dropping a client that has not read for %s s", self.timeout)
            stream.drop()
        if self._streams:
            self._later()


class Closes(Protocol):
    def close(self) -> None: ...


class EventStream(Response):
    """Sends the events of a generator. When the client leaves, or does not read, the generator is closed at once, and so is
    each of `closes`: a generator that has not begun runs no `finally`."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], watch: Watch, closes: Sequence[Closes] = ()):
        self.status_code = 200
        self.background = None
        self.events, self.watch, self.closes = events, watch, closes
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._writer: asyncio.Task[Any] | None = None
        self._abort = lambda: None
        self._gone = False
        self.sending_since = math.inf  # monotonic time at which a piece was given to the HTTP server that it has not taken

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._writer = asyncio.current_task()
        self._abort = scope.get("extensions", {}).get(ABORT, self._abort)
        watcher = asyncio.create_task(self._wait_for_end(receive))
        self.watch.add(self)
        try:
            await self._send_all(send, scope.get("extensions", {}).get(DIRECT, send))
        except asyncio.CancelledError:
            if not self._gone:  # it is the server that stops
                raise
        finally:
            watcher.cancel()
            self.watch.remove(self)
            await self.events.aclose()
            for one in self.closes:
                one.close()

    async def _send_all(self, send: Send, send_piece: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self.events:
            self.sending_since = time.monotonic()
            await send_piece({"type": "http.response.body", "body": data, "more_body": True})
            self.sending_since = math.inf
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _wait_for_end(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._leave()

    def _leave(self) -> None:
        if self._writer is not None and not self._gone:
            self._gone = True
            self._writer.cancel()

    def drop(self) -> None:
        """Ends the connection without waiting for what has not been read."""
        self._abort()  # first: then the HTTP server knows that nobody misses the rest
        self._leave()


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves before it is there (ClientGone)."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for one in (task, gone):
            one.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
