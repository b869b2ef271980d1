"""OpenAI's endpoints for text: /v1/models, /v1/completions, /v1/chat/completions."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jaxpaged.async_engine import Stream
from jaxpaged_server.chat import Chat
from jaxpaged_server.completions import Completions, split_prompts
from jaxpaged_server.embeddings import EmbeddingRequest, embedding_response, fitted, pooling_params, split_inputs
from jaxpaged_server.exchange import asked_by, finals, openai_events, read, submit_all
from jaxpaged_server.logprobs import TokenNames
from jaxpaged_server.params import chat_params, completion_params, truncated, usage_options
from jaxpaged_server.parsers import ChatParser, needs_special_tokens
from jaxpaged_server.prompting import Prompt, render
from jaxpaged_server.replies import json_reply
from jaxpaged_server.schemas import ChatRequest, CompletionRequest, Sampled
from jaxpaged_server.service import Service
from jaxpaged_server.sse import EventStream, until_gone
from jaxpaged_server.usage import Usage

PROMPT_END = 200  # characters of the prompt that a reasoning parser looks at


async def models(service: Service, request: Request) -> Response:
    """GET /v1/models, and /v1/models/{name}."""
    own = service.names[0]
    cards = [_card(service, name, own, None) for name in service.names]
    cards += [_card(service, adapter.name, adapter.source, own) for adapter in service.loras.loaded]
    if "name" not in request.path_params:
        return json_reply({"object": "list", "data": cards})
    asked = service.model(request.path_params["name"])
    return json_reply(next(card for card in cards if card["id"] == asked))


def _card(service: Service, name: str, root: str, parent: str | None) -> dict[str, Any]:
    """parent: of a LoRA adapter, the model it changes."""
    return {"id": name, "object": "model", "created": service.created, "owned_by": "jaxpaged", "root": root,
            "parent": parent, "max_model_len": service.max_model_len, "permission": []}  # fmt: skip


# -- completions -----------------------------------------------------------------------------------------------------------


async def completions(service: Service, request: Request) -> Response:
    """POST /v1/completions."""
    body = await read(service, request, CompletionRequest)
    model = service.model(body.model)
    asked = asked_by(request, body.request_id, "cmpl")
    params = completion_params(body, service.defaults)
    prompts = [await prompt_ids(service, body, one) for one in split_prompts(body.prompt, service.options.max_num_prompts)]
    submits = [partial(service.submit, asked, ids, params, text=text, priority=body.priority, cache_salt=body.cache_salt,
                       model=model)
               for text, ids in prompts]  # fmt: skip
    usage = Usage(service.options.enable_prompt_tokens_details, prompt_only=body.echo and body.max_tokens == 0)
    answer = Completions(asked.request_id, model, body, _names(service, body), usage)
    return await _answer(service, request, body, answer, submit_all(submits))


async def prompt_ids(service: Service, body: CompletionRequest, prompt: str | list[int]) -> tuple[str | None, list[int]]:
    """(text, ids) of one prompt; the text of token ids is worked out only where it is echoed."""
    if isinstance(prompt, str):
        text, ids = prompt, await service.encode(prompt, body.add_special_tokens)
    else:
        text, ids = None, prompt
    ids = truncated(ids, body.truncate_prompt_tokens, body.truncation_side, service.max_model_len)
    if body.echo and text is None:
        decode = partial(service.need_tokenizer("echo").decode, skip_special_tokens=body.skip_special_tokens is not False)
        text = await asyncio.to_thread(decode, ids)
    return text, ids


# -- chat ------------------------------------------------------------------------------------------------------------------


async def chat_completions(service: Service, request: Request) -> Response:
    """POST /v1/chat/completions."""
    body = await read(service, request, ChatRequest)
    model = service.model(body.model)
    asked = asked_by(request, body.request_id, "chatcmpl")
    stream, prompt = await start_chat(service, body, asked)
    usage = Usage(service.options.enable_prompt_tokens_details)
    answer = Chat(asked.request_id, model, body, prompt, _names(service, body), usage, service.options.response_role,
                  parser_maker(service, body, prompt))  # fmt: skip
    return await _answer(service, request, body, answer, [stream])


async def start_chat(service: Service, body: ChatRequest, asked: Any, clamp: bool = False) -> tuple[Stream, Prompt]:
    """Renders a conversation and hands it to the engine: for every API that talks. clamp: a limit of tokens that does not fit
    beside the prompt means as many as fit."""
    params = chat_params(body, service.defaults)
    prompt = await render(service, body)
    if shows_special(service, body, prompt):
        params = params.clone(skip_special_tokens=False)
    ids = truncated(prompt.ids, body.truncate_prompt_tokens, body.truncation_side, service.max_model_len)
    if clamp and len(ids) + (params.max_tokens or 0) > service.max_model_len:
        params = params.clone(max_tokens=None)
    stream = service.submit(asked, ids, params, text=prompt.text, priority=body.priority, cache_salt=body.cache_salt,
                            model=body.model)  # fmt: skip
    return stream, prompt


def shows_special(service: Service, body: ChatRequest, prompt: Prompt) -> bool:
    """Whether a parser must see special tokens to find its markers. What the user says about them wins."""
    if body.skip_special_tokens is not None:
        return not body.skip_special_tokens
    return needs_special_tokens(_tool_parser(service, prompt), service.options.reasoning_parser, service.special_texts)


def _tool_parser(service: Service, prompt: Prompt) -> str | None:
    return service.options.tool_call_parser if prompt.tools else None


def parser_maker(service: Service, body: ChatRequest, prompt: Prompt) -> Any:
    """Makes the parser of a sample; None where the text needs none."""
    tool_parser, reasoning_parser = _tool_parser(service, prompt), service.options.reasoning_parser
    if tool_parser is None and reasoning_parser is None:
        return None
    text = prompt.text.removesuffix(prompt.forced) if prompt.forced else prompt.text
    special = service.special_texts if shows_special(service, body, prompt) else ()
    return partial(ChatParser, tool_parser, reasoning_parser, tools=prompt.tools, prompt_end=text[-PROMPT_END:],
                   parallel_tool_calls=body.parallel_tool_calls, special=special)  # fmt: skip


# -- embeddings -----------------------------------------------------------------------------------------------------------


async def embeddings(service: Service, request: Request) -> Response:
    """POST /v1/embeddings."""
    body = await read(service, request, EmbeddingRequest)
    model, params = service.model(body.model), pooling_params(body)
    asked = asked_by(request, body.request_id, "embd")
    submits = []
    for index, one in enumerate(split_inputs(body)):
        ids = await service.encode(one, body.add_special_tokens) if isinstance(one, str) else one
        ids = fitted(ids, body, index, service.max_model_len)
        submits.append(partial(service.submit, asked, ids, params, priority=body.priority, cache_salt=body.cache_salt,
                               model=model))  # fmt: skip
    outputs = await until_gone(request, finals(submit_all(submits)))
    return json_reply(embedding_response(body, model, outputs))


# -- both ------------------------------------------------------------------------------------------------------------------


async def _answer(service: Service, request: Request, body: Sampled, answer: Any, streams: list[Stream]) -> Response:
    if body.stream:
        usage = usage_options(body.stream_options, service.options.enable_force_include_usage)
        interval = body.stream_interval or service.options.stream_interval
        return EventStream(openai_events(streams, answer, usage, interval), service.watch, streams)
    outputs = await until_gone(request, finals(streams))
    return json_reply(answer.whole(outputs))


def _names(service: Service, body: Sampled) -> TokenNames:
    asked = body.return_tokens_as_token_ids
    return TokenNames(service.tokenizer, service.options.return_tokens_as_token_ids if asked is None else asked)
