"""vLLM's endpoints about tokens: /tokenize, /detokenize, /render, and the token-in / token-out /inference/v1/generate."""

from __future__ import annotations

import asyncio
from dataclasses import fields
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jaxpaged.request import CompletionOutput, RequestError, RequestOutput, SamplingParams, refuse_unknown
from jaxpaged_server.completions import split_prompts
from jaxpaged_server.errors import failed_request
from jaxpaged_server.exchange import asked_by, finals, openai_events, read, read_body
from jaxpaged_server.fields import parse_json
from jaxpaged_server.logprobs import clamped, prompt_logprobs
from jaxpaged_server.openai_api import prompt_ids
from jaxpaged_server.params import chat_params, completion_params, output_kind, usage_options
from jaxpaged_server.prompting import render
from jaxpaged_server.replies import json_reply
from jaxpaged_server.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, GenerateRequest, TokenizeRequest
from jaxpaged_server.service import Service
from jaxpaged_server.sse import EventStream, until_gone
from jaxpaged_server.usage import Usage

OF_MESSAGES = ("tools", "tool_choice", "documents", "chat_template", "chat_template_kwargs", "reasoning_effort")


async def tokenize(service: Service, request: Request) -> Response:
    """POST /tokenize: a prompt's ids, or a conversation's."""
    body = await read(service, request, TokenizeRequest)
    service.model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give either prompt or messages.", "prompt")
    for name in OF_MESSAGES:
        if body.prompt is not None and getattr(body, name) is not None:
            raise RequestError(f"{name} goes with messages, not with a prompt.", name)
    if body.messages is not None:
        ids = (await render(service, body)).ids
    else:
        ids = await service.encode(body.prompt or "", body.add_special_tokens is not False)
    tokenizer = service.need_tokenizer("/tokenize")
    names = await asyncio.to_thread(lambda: list(map(tokenizer.token, ids))) if body.return_token_strs else None
    return json_reply({"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids, "token_strs": names})


async def detokenize(service: Service, request: Request) -> Response:
    """POST /detokenize: the text of token ids, special tokens included."""
    body = await read(service, request, DetokenizeRequest)
    service.model(body.model)
    tokenizer = service.need_tokenizer("/detokenize")
    return json_reply({"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False)})


async def render_prompt(service: Service, request: Request) -> Response:
    """POST /render: the exact prompt that a chat or completion request becomes. Its body is that request's."""
    raw = await asyncio.to_thread(parse_json, await read_body(request, service.options.max_body_size))
    if isinstance(raw, dict) and raw.get("messages") is not None:
        chat = service.decode.convert(raw, ChatRequest)
        service.model(chat.model)
        chat_params(chat, service.defaults)  # refuses what would be refused
        prompt = await render(service, chat)
        return json_reply(_rendered(prompt.text, prompt.ids))
    body = service.decode.convert(raw, CompletionRequest)
    service.model(body.model)
    completion_params(body, service.defaults)
    prompts = split_prompts(body.prompt, service.options.max_num_prompts)
    if len(prompts) != 1:
        raise RequestError(f"/render takes one prompt, got {len(prompts)}.", "prompt")
    text, ids = await prompt_ids(service, body, prompts[0])
    if text is None:
        text = await asyncio.to_thread(service.need_tokenizer("/render").decode, ids, skip_special_tokens=False)
    return json_reply(_rendered(text, ids))


def _rendered(text: str, ids: list[int]) -> dict[str, Any]:
    return {"prompt": text, "prompt_token_ids": ids, "count": len(ids)}


# -- token in, token out ---------------------------------------------------------------------------------------------------


async def generate(service: Service, request: Request) -> Response:
    """POST /inference/v1/generate."""
    body = await read(service, request, GenerateRequest)
    model = service.model(body.lora_name or body.model)
    if body.output_mode not in ("tokens", "text"):
        raise RequestError(f"output_mode must be tokens or text, got {body.output_mode!r:.80}.", "output_mode")
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream: true.", "stream_options")
    asked = asked_by(request, body.request_id, "generate")
    answer = Generated(body.request_id or asked.request_id, model, body.output_mode == "text")
    stream = service.submit(asked, body.token_ids, _params(service, body), priority=body.priority, cache_salt=body.cache_salt,
                            model=model)  # fmt: skip
    if body.stream:
        usage = usage_options(body.stream_options, service.options.enable_force_include_usage)
        return EventStream(openai_events([stream], answer, usage, service.options.stream_interval), service.watch, [stream])
    (output,) = await until_gone(request, finals([stream]))
    return json_reply(answer.whole(output))


def _params(service: Service, body: GenerateRequest) -> SamplingParams:
    given = {name: value for name, value in body.sampling_params.items() if value is not None}
    refuse_unknown("sampling_params", given, [f.name for f in fields(SamplingParams)])
    for name in ("output_kind", "extra_args"):
        if name in given:
            raise RequestError(f"sampling_params.{name} is not for HTTP; leave it out.", f"sampling_params.{name}")
    defaults = {name: value for name, value in service.defaults.items() if name != "max_tokens"}
    wanted: dict[str, Any] = {"detokenize": body.output_mode == "text" or bool(given.get("stop"))}
    return SamplingParams(**{**defaults, **wanted, **given}, output_kind=output_kind(body.stream))


class Generated:
    """Answers of /inference/v1/generate: choices of token ids, with logprobs by id and rank."""

    def __init__(self, request_id: str, model: str, text: bool):
        self.request_id, self.model, self.text, self.usage = request_id, model, text, Usage(details=True)

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        if output.error is not None:
            raise failed_request(output.error)
        self.usage.add(0, output)
        scores = prompt_logprobs(output.prompt_logprobs)
        return {
            **self._body([self._choice(one) for one in output.outputs]),
            "prompt_logprobs": scores,
            "usage": self.usage.body(),
        }

    def chunk(self, prompt: int, output: RequestOutput, usage: bool) -> list[dict[str, Any]]:
        self.usage.add(0, output)
        chunk = self._body([self._choice(one) for one in output.outputs])
        return [{**chunk, "usage": self.usage.body()} if usage else chunk]

    def usage_chunk(self) -> dict[str, Any]:
        return {**self._body([]), "usage": self.usage.body()}

    def _body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"request_id": self.request_id, "model": self.model, "choices": choices}

    def _choice(self, one: CompletionOutput) -> dict[str, Any]:
        choice = {"index": one.index, "token_ids": one.token_ids, "logprobs": _token_logprobs(one),
                  "finish_reason": one.finish_reason, "stop_reason": one.stop_reason}  # fmt: skip
        return {**choice, "text": one.text} if self.text else choice


def _token_logprobs(one: CompletionOutput) -> dict[str, Any] | None:
    """As in chat, with ids and ranks."""
    if one.logprobs is None:
        return None
    by_id = lambda i, p: {"token_id": i, "token": f"token_id:{i}", "logprob": clamped(p.logprob), "rank": p.rank}
    return {"content": [{**by_id(token, entry[token]), "top_logprobs": [by_id(i, p) for i, p in entry.items()]}
                        for token, entry in zip(one.token_ids, one.logprobs)]}  # fmt: skip
