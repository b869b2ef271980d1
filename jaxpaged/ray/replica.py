"""One engine with its HTTP application, in an actor of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Callable

from starlette.types import ASGIApp, Message

from jaxpaged.config import EngineConfig
from jaxpaged.ray.calls import Answer, Call
from jaxpaged.ray.needed import need
from jaxpaged_server.app import create_app
from jaxpaged_server.options import ServerOptions
from jaxpaged_server.service import Service, open_service

log = logging.getLogger(__name__)


def build_service(config: EngineConfig, options: ServerOptions) -> Service:
    """Loads and compiles: minutes for a large model."""
    from jaxpaged.build_replicas import build_replicas

    return open_service(build_replicas(config, progress=False), options)


class Replica:
    """Answers calls with an engine. open: makes the service, in a thread. name: of this replica, for metrics.

    Its life is its actor's: when the engine dies the process ends, so that no more requests come and Ray starts another one;
    when the actor is asked to end, running requests get the server's shutdown_timeout.
    """

    def __init__(self, open: Callable[[], Service], name: str = ""):
        self.open, self.name = open, name
        self.service: Service
        self.app: ASGIApp
        self._life = contextlib.AsyncExitStack()

    async def start(self) -> None:
        self.service = await asyncio.to_thread(self.open)
        for engine in self.service.engine.engines:
            engine.on_death = _die
        self.app = create_app(self.service)
        await self._life.enter_async_context(self.service.running())

    async def stop(self) -> None:
        await self._life.aclose()

    def check_health(self) -> None:
        """Ray asks; an exception means that this replica is to be replaced."""
        if (cause := self.service.trouble()) is not None:
            raise RuntimeError(cause)

    async def stream(self, key: str, call: Call) -> AsyncGenerator[list[Message], None]:
        """The answer's ASGI messages, those that are there together. Closing it aborts the request. key: for the router."""
        pipe = Pipe(call.body)
        work = asyncio.ensure_future(self._answer(call, pipe))
        try:
            while messages := await pipe.take():
                yield messages
        finally:
            pipe.leave()
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work

    async def ask(self, call: Call) -> Answer:
        """The whole answer."""
        status, headers, parts = 500, list[tuple[bytes, bytes]](), list[bytes]()
        async for messages in self.stream("", call):
            for message in messages:
                status, headers = message.get("status", status), message.get("headers", headers)
                parts.append(message.get("body", b""))
        return Answer(self.name, status, headers, b"".join(parts))

    async def _answer(self, call: Call, pipe: Pipe) -> None:
        try:
            await self.app({**call.scope, "extensions": {}, "state": {}}, pipe.receive, pipe.send)
        except Exception:  # it has been answered with 500
            log.exception("an endpoint failed")
        finally:
            pipe.end()


class Pipe:
    """The two ends of an ASGI call: the application's `receive` and `send`, and `take` for what it has sent."""

    def __init__(self, body: bytes):
        self._body: bytes | None = body
        self._sent: list[Message] = []
        self._something, self._gone = asyncio.Event(), asyncio.Event()
        self._ended = False

    async def receive(self) -> Message:
        body, self._body = self._body, None
        if body is not None:
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self._sent.append(dict(message))
        self._something.set()

    async def take(self) -> list[Message]:
        """What has been sent since; empty at the end."""
        if not self._sent and not self._ended:
            self._something.clear()
            await self._something.wait()
        sent, self._sent = self._sent, []
        return sent

    def end(self) -> None:
        self._ended = True
        self._something.set()

    def leave(self) -> None:
        """The client has gone."""
        self._gone.set()


def _die(error: BaseException) -> None:
    log.critical("the engine has stopped, and so does this replica: %r", error)
    os._exit(1)


def deployed_class() -> type:
    """`Replica` as Ray Serve wants it: a constructor that returns when the engine is ready, a destructor that drains."""
    serve = need("ray.serve")

    class Engine(Replica):
        async def __init__(self, open: Callable[[], Service]):
            super().__init__(open, serve.get_replica_context().replica_id.unique_id)
            await self.start()

        async def __del__(self) -> None:
            await self.stop()

    return Engine
