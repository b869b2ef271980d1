"""Anthropic's Messages API: POST /v1/messages, POST /v1/messages/count_tokens."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from jaxpaged_server.answering import reply, start
from jaxpaged_server.exchange import read
from jaxpaged_server.messages_input import CountTokensRequest, MessagesRequest, to_chat
from jaxpaged_server.messages_output import MessageAnswer
from jaxpaged_server.prompting import render
from jaxpaged_server.replies import json_reply
from jaxpaged_server.service import Service


async def messages(service: Service, request: Request) -> Response:
    """POST /v1/messages."""
    body = await read(service, request, MessagesRequest)
    chat, model = to_chat(body), service.model(body.model)
    # Clients must say a number of tokens, and some say 32,000 to every model: clamped.
    id, stream, _, parts = await start(service, request, chat, "msg", clamp=True)
    shows_thinking = body.thinking is None or body.thinking.display != "omitted"
    answer = MessageAnswer(id, model, parts, stream.num_prompt_tokens, shows_thinking)
    return await reply(service, request, stream, answer, body.stream)


async def count_tokens(service: Service, request: Request) -> Response:
    """POST /v1/messages/count_tokens: the prompt's length, as /v1/messages would have it."""
    body = await read(service, request, CountTokensRequest)
    service.model(body.model)
    prompt = await render(service, to_chat(body))
    return json_reply({"input_tokens": len(prompt.ids)})
