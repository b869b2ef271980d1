"""OpenAI's Responses API, without a memory: POST /v1/responses."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jaxpaged.request import RequestError, SamplingParams
from jaxpaged_server.answering import reply, start
from jaxpaged_server.exchange import read
from jaxpaged_server.logprobs import TokenNames
from jaxpaged_server.responses_input import STATELESS, ResponsesRequest, to_chat
from jaxpaged_server.responses_output import ResponseAnswer
from jaxpaged_server.service import Service


async def responses(service: Service, request: Request) -> Response:
    """POST /v1/responses."""
    body = await read(service, request, ResponsesRequest)
    chat, model = to_chat(body), service.model(body.model)
    id, stream, params, parts = await start(service, request, chat, "resp")
    names = TokenNames(service.tokenizer, service.options.return_tokens_as_token_ids)
    top = body.top_logprobs if body.wants_logprobs else None
    answer = ResponseAnswer(id, echo(body, model, params), parts, names, top)
    return await reply(service, request, stream, answer, body.stream)


async def stored_response(service: Service, request: Request) -> Response:
    """GET and DELETE /v1/responses/{response_id}: there is none, ever."""
    raise RequestError(f"there is no response {request.path_params['response_id']!r:.80}: {STATELESS}", "response_id", 404)


def echo(body: ResponsesRequest, model: str, params: SamplingParams) -> dict[str, Any]:
    """The fields of a response that say what it is the answer to."""
    return {
        "model": model, "instructions": body.instructions, "metadata": body.metadata, "user": body.user,
        "temperature": params.temperature if body.temperature is None else body.temperature,
        "top_p": params.top_p if body.top_p is None else body.top_p, "top_logprobs": body.top_logprobs,
        "max_output_tokens": body.max_output_tokens, "max_tool_calls": None, "parallel_tool_calls": body.parallel_tool_calls,
        "tools": [{"parameters": None, "strict": False, **tool} for tool in body.tools],
        "tool_choice": body.tool_choice or "auto", "reasoning": {"effort": body.reasoning.effort, "summary": None},
        "text": {"format": {"type": "text"}, "verbosity": "medium"}, "truncation": body.truncation, "store": False,
        "background": False, "previous_response_id": None, "conversation": None, "prompt": None, "service_tier": "default",
    }  # fmt: skip
