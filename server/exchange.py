"""Around every endpoint: reading the body, the request's id, engine streams as one answer or as events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any, Protocol, TypeVar

from starlette.requests import Request

from jaxpaged.async_engine import EngineDeadError, Stream
from jaxpaged.outputs import Output, merged
from jaxpaged.request import RequestError, RequestOutput
from jaxpaged_server.errors import body_of, error_body, failed_request
from jaxpaged_server.fields import Body
from jaxpaged_server.service import Asked, Service, new_id
from jaxpaged_server.sse import DONE, event

TRACE_HEADERS = ("traceparent", "tracestate")
MAX_ID = 128  # characters of an id that a client chooses
LARGE = 2**18  # bytes; larger bodies are decoded in a thread: the loop stands still for a part of the time only
B = TypeVar("B", bound=Body)


async def read(service: Service, request: Request, kind: type[B]) -> B:
    """The body, decoded and checked. RequestError says what is wrong with it."""
    data = await read_body(request, service.options.max_body_size)
    return service.decode(data, kind) if len(data) <= LARGE else await asyncio.to_thread(service.decode, data, kind)


async def read_body(request: Request, limit: int) -> bytes:
    """The body; RequestError if it is not JSON by its header (400), or has more than `limit` bytes (413)."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise RequestError(f"Unsupported Media Type: Only 'application/json' is allowed, got {kind[:80]!r}.")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise _too_large(int(length), limit)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _too_large(size, limit)
        parts.append(part)
    return b"".join(parts)


def _too_large(size: int, limit: int) -> RequestError:
    return RequestError(f"the body has {size:,} bytes or more, the server takes {limit:,} (--max-body-size).", status=413)


def asked_by(request: Request, given: str | None, prefix: str) -> Asked:
    """The request's id: the body's, the header X-Request-Id's, or a new one; always with the API's prefix."""
    own = given or request.headers.get("x-request-id")
    if own is not None and (not own.isprintable() or len(own) > MAX_ID):
        raise RequestError(f"a request id has at most {MAX_ID} printable characters.", "request_id")
    trace = {name: value for name in TRACE_HEADERS if (value := request.headers.get(name))}
    return Asked(f"{prefix}-{own}" if own else new_id(prefix), trace)


@contextlib.contextmanager
def closing(streams: Sequence[Stream]):
    """Aborts what has not ended when the block is left."""
    try:
        yield streams
    finally:
        for stream in streams:
            stream.close()


def submit_all(submits: Sequence[Callable[[], Stream[Output]]]) -> list[Stream[Output]]:
    """All of them, or none: if one is refused, those before it are aborted."""
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(submit()) for submit in submits]
        stack.pop_all()
        return streams


async def finals(streams: Sequence[Stream[Output]]) -> list[Output]:
    """The last output of each stream, in their order."""
    with closing(streams):
        return [await stream.last() for stream in streams]


def outputs_of(streams: Sequence[Stream[RequestOutput]], interval: int) -> AsyncIterator[RequestOutput]:
    """The outputs of several streams as they come. interval: tokens that an output has at least, but for the first and the
    last one of a stream. One stream is handed on as it is: this runs for every token."""
    if len(streams) > 1:
        return _interleaved(streams, interval)
    return streams[0] if interval == 1 else _spaced(streams[0], interval)


async def _interleaved(streams: Sequence[Stream[RequestOutput]], interval: int) -> AsyncIterator[RequestOutput]:
    queue: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()

    async def pump(stream: Stream[RequestOutput]) -> None:
        try:
            async for output in _spaced(stream, interval):
                queue.put_nowait(output)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    open_streams = len(streams)
    try:
        while open_streams:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            open_streams -= item.finished
            yield item
    finally:
        for task in tasks:
            task.cancel()


async def _spaced(stream: Stream[RequestOutput], interval: int) -> AsyncIterator[RequestOutput]:
    held: RequestOutput | None = None
    wanted = 1  # the first token is not held back: the time to it is what a user waits for
    async for output in stream:
        held = output if held is None else merged(held, output, stream.params.output_kind)
        if output.finished or sum(len(c.token_ids) for c in held.outputs) >= wanted:
            yield held
            held, wanted = None, interval


class Answer(Protocol):
    """What makes chunks of outputs: `Chat`, `Completions`."""

    def chunk(self, prompt: int, output: RequestOutput, usage: bool) -> list[dict[str, Any]]: ...

    def usage_chunk(self) -> dict[str, Any]: ...


async def openai_events(streams: Sequence[Stream], answer: Answer, usage: tuple[bool, bool],
                        interval: int) -> AsyncGenerator[bytes, None]:  # fmt: skip
    """OpenAI's stream: chunks, perhaps one with usage, [DONE]. An error is an event too: the headers are long gone.
    usage: (a last chunk with it, it in every chunk)."""
    numbers = {stream.request_id: number for number, stream in enumerate(streams)}
    with closing(streams):
        try:
            async for output in outputs_of(streams, interval):
                if output.error is not None:
                    raise failed_request(output.error)
                chunks = answer.chunk(numbers[output.request_id], output, usage[1])
                if chunks:
                    yield event(chunks[0]) if len(chunks) == 1 else b"".join(map(event, chunks))
            if usage[0]:
                yield event(answer.usage_chunk())
        except RequestError as error:
            yield event(body_of(error))
        except EngineDeadError as error:
            yield event(error_body(str(error), 500))
        yield DONE
