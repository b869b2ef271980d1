"""The front end: reads a request, sends it to a replica, and passes the answer on. An ASGI application; no engine, no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from starlette.types import Message, Receive, Scope, Send

from jaxpaged.ray.calls import Call, Fleet, ReplicaGone, TooBusy
from jaxpaged.ray.gather import gathered
from jaxpaged.ray.routing import prompt_key
from jaxpaged.request import RequestError
from jaxpaged_server.errors import ANTHROPIC_PATH, body_of
from jaxpaged_server.middleware import own_path
from jaxpaged_server.replies import error_reply
from jaxpaged_server.sse import event

log = logging.getLogger(__name__)

FOR_ALL = {("GET", "/metrics"), ("GET", "/load"), ("POST", "/reset_prefix_cache"), ("POST", "/abort_requests"),
           ("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter")}  # fmt: skip  # every replica is asked
LARGE = 2**18  # bytes; larger bodies are looked at in a thread


class Front:
    """max_body_size: bytes; more are not read. prefix_length: characters of a prompt that decide where it goes. retries: how
    often a request is sent to another replica after one has gone, if nothing of its answer has been sent yet."""

    def __init__(self, fleet: Fleet, max_body_size: int, prefix_length: int = 1024, retries: int = 2):
        self.fleet, self.max_body_size = fleet, max_body_size
        self.prefix_length, self.retries = prefix_length, retries

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await _live(receive, send)
        if scope["type"] != "http":
            return
        body = await self._read(receive)
        if body is None:
            return
        work = asyncio.ensure_future(self._answer(Call.of(scope, body), send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for one in (work, gone):
                one.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await work

    async def _read(self, receive: Receive) -> bytes | None:
        """The body, or a little more of it than may be: the replica then refuses it. None: the client has left."""
        parts, size, more = list[bytes](), 0, True
        while more and size <= self.max_body_size:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            parts.append(part)
        return b"".join(parts)[: self.max_body_size + 1]

    async def _answer(self, call: Call, send: Send) -> None:
        path = own_path(call.scope)
        if (call.scope["method"], path) in FOR_ALL:
            answer = gathered(await self.fleet.ask_all(call))
            await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
            await send({"type": "http.response.body", "body": answer.body, "more_body": False})
            return
        key = await self._key(call)
        for attempt in range(self.retries + 1):
            passed = Passed(send)
            try:
                return await self._pass_on(key, call, passed)
            except ReplicaGone as error:
                log.warning("%s %s: %s", call.scope["method"], path, error)
                if passed.started or attempt == self.retries:
                    return await _break_off(passed, path)
            except TooBusy as error:
                refused = RequestError(f"{error}; try again later.", status=503)
                return await error_reply(refused, path)(call.scope, _never, send)

    async def _key(self, call: Call) -> str:
        if not call.body:
            return ""
        if len(call.body) <= LARGE:
            return prompt_key(call.body, self.prefix_length)
        return await asyncio.to_thread(prompt_key, call.body, self.prefix_length)

    async def _pass_on(self, key: str, call: Call, passed: Passed) -> None:
        async with contextlib.aclosing(self.fleet.stream(key, call)) as pieces:
            async for messages in pieces:
                for message in messages:
                    await passed(message)


class Passed:
    """Sends messages and knows what has been sent. The start waits for the first piece of the body: until then the request
    can be given to another replica."""

    def __init__(self, send: Send):
        self.send, self.started, self.is_stream = send, False, False
        self._start: Message | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        if not self.started and self._start is not None:
            self.started = True
            self.is_stream = (b"content-type", b"text/event-stream") in [
                (name.lower(), value.partition(b";")[0].strip()) for name, value in self._start["headers"]
            ]
            await self.send(self._start)
        await self.send(message)


async def _break_off(passed: Passed, path: str) -> None:
    """The end of an answer whose replica has gone: a stream says so in an event, another answer that has begun is cut."""
    error = RequestError("the replica that was answering has gone; send the request again.", status=503)
    if not passed.started:
        return await error_reply(error, path)({"type": "http"}, _never, passed.send)
    if not passed.is_stream:
        raise ReplicaGone(error.message)
    last = event(body_of(error, path), "error" if path.startswith(ANTHROPIC_PATH) else None)
    await passed.send({"type": "http.response.body", "body": last, "more_body": False})


async def _never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError("nobody sets it")


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _live(receive: Receive, send: Send) -> None:
    """Nothing is to be started or ended here."""
    for what in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{what}.complete"})
