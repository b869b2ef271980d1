"""From a chat request to an answer made of parts: what the Responses and the Messages API have in common."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from starlette.requests import Request
from starlette.responses import Response

from jaxpaged.async_engine import EngineDeadError, Stream
from jaxpaged.request import RequestError, RequestOutput, SamplingParams
from jaxpaged_server.errors import failed_request
from jaxpaged_server.exchange import asked_by, closing, finals, outputs_of
from jaxpaged_server.openai_api import parser_maker, start_chat
from jaxpaged_server.parts import Parts, widths
from jaxpaged_server.replies import json_reply
from jaxpaged_server.schemas import ChatRequest
from jaxpaged_server.service import Service
from jaxpaged_server.sse import EventStream, event, until_gone


class Answer(Protocol):
    """An API's answer in the making. Events are objects with a `type`."""

    id: str

    def begin(self) -> list[dict[str, Any]]: ...

    def push(self, output: RequestOutput) -> list[dict[str, Any]]: ...

    def fail(self, error: RequestError) -> list[dict[str, Any]]: ...

    def body(self) -> dict[str, Any]: ...


class Started(NamedTuple):
    """A request that the engine has: its id for the client, what is sampled how, and what finds the parts of its answer."""

    id: str
    stream: Stream[RequestOutput]
    params: SamplingParams
    parts: Parts


async def start(service: Service, request: Request, chat: ChatRequest, prefix: str, clamp: bool = False) -> Started:
    """Hands the request to the engine. RequestError if it cannot be served. prefix: of its id. clamp: `start_chat`'s."""
    asked = asked_by(request, chat.request_id, prefix)
    asked = replace(asked, request_id=asked.request_id.replace("-", "_", 1))  # both APIs' ids have an underscore there
    stream, prompt = await start_chat(service, chat, asked, clamp)
    new_parser = parser_maker(service, chat, prompt)
    params = stream.params
    assert isinstance(params, SamplingParams), "chats are completed"
    width = widths(service.tokenizer, params.skip_special_tokens)
    return Started(asked.request_id, stream, params, Parts(new_parser and new_parser(), prompt.forced, width))


async def reply(service: Service, request: Request, stream: Stream, answer: Answer, streamed: bool) -> Response:
    """The answer to a request: its events as they come, or its body."""
    if streamed:
        return EventStream(events(stream, answer, service.options.stream_interval), service.watch, [stream])
    (output,) = await until_gone(request, finals([stream]))
    answer.begin()
    answer.push(whole(output))
    return json_reply(answer.body())


async def events(stream: Stream, answer: Answer, interval: int) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events, each with its type as its name. An error is an event too."""
    with closing([stream]):
        yield encoded(answer.begin())
        try:
            async for output in outputs_of([stream], interval):
                if made := answer.push(whole(output)):
                    yield encoded(made)
        except RequestError as error:
            yield encoded(answer.fail(error))
        except EngineDeadError as error:
            yield encoded(answer.fail(RequestError(str(error), status=500)))


def encoded(events: Sequence[dict[str, Any]]) -> bytes:
    return b"".join([event(one, one["type"]) for one in events])


def whole(output: RequestOutput) -> RequestOutput:
    """The output, if its request has not failed. Neither API has a word for an answer that the server broke off."""
    if output.error is not None:
        raise failed_request(output.error)
    if any(completion.finish_reason == "abort" for completion in output.outputs):
        raise RequestError("the request was aborted by the server, which shuts down, or by its operator.", status=503)
    return output
