"""`create_app(service)`: routes, lifespan, errors to statuses."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from jaxpaged.async_engine import EngineDeadError
from jaxpaged.request import RequestError
from jaxpaged_server import messages, openai_api, openapi, operations, page, responses, tokens
from jaxpaged_server.http_metrics import HttpMetrics
from jaxpaged_server.metrics import Metrics
from jaxpaged_server.middleware import ApiKeys, RequestIds, own_path
from jaxpaged_server.replies import error_reply
from jaxpaged_server.service import Service
from jaxpaged_server.sse import ClientGone

log = logging.getLogger(__name__)
Endpoint = Callable[[Service, Request], Awaitable[Response]]

ENDPOINTS: list[tuple[str, str, Endpoint]] = [
    ("GET", "/v1/models", openai_api.models),
    ("GET", "/v1/models/{name:path}", openai_api.models),
    ("POST", "/v1/completions", openai_api.completions),
    ("POST", "/v1/chat/completions", openai_api.chat_completions),
    ("POST", "/v1/embeddings", openai_api.embeddings),
    ("POST", "/v1/responses", responses.responses),
    ("GET", "/v1/responses/{response_id}", responses.stored_response),
    ("DELETE", "/v1/responses/{response_id}", responses.stored_response),
    ("POST", "/v1/messages", messages.messages),
    ("POST", "/v1/messages/count_tokens", messages.count_tokens),
    ("POST", "/inference/v1/generate", tokens.generate),
    ("POST", "/tokenize", tokens.tokenize),
    ("POST", "/detokenize", tokens.detokenize),
    ("POST", "/render", tokens.render_prompt),
    ("POST", "/v1/completions/render", tokens.render_prompt),
    ("POST", "/v1/chat/completions/render", tokens.render_prompt),
    ("GET", "/health", operations.health),
    ("GET", "/version", operations.version),
    ("GET", "/load", operations.load),
    ("GET", "/metrics", operations.metrics),
    ("GET", "/openapi.json", openapi.document),
    ("POST", "/reset_prefix_cache", operations.reset_prefix_cache),
    ("POST", "/abort_requests", operations.abort_requests),
    ("POST", "/v1/load_lora_adapter", operations.load_lora_adapter),
    ("POST", "/v1/unload_lora_adapter", operations.unload_lora_adapter),
]


def create_app(service: Service) -> Starlette:
    """The ASGI application of a service. Its lifespan starts and ends the engine's thread."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with service.running():
            yield

    return App(
        service.metrics,
        routes=[*(Route(path, _bound(service, endpoint), methods=[method]) for method, path, endpoint in ENDPOINTS),
                *page.routes(service.engine, service.metrics, service.watch)],
        middleware=_middleware(service),
        exception_handlers={RequestError: _refused, EngineDeadError: _dead, HTTPException: _http_error, ClientGone: _gone,
                            ClientDisconnect: _gone, Exception: _bug},
        lifespan=lifespan,
    )  # fmt: skip


class App(Starlette):
    """Counts its requests outside of every other layer: a piece of a stream then passes no other one."""

    def __init__(self, metrics: Metrics, **options: Any):
        super().__init__(**options)
        self.metrics = metrics

    def build_middleware_stack(self) -> ASGIApp:
        return HttpMetrics(super().build_middleware_stack(), self.metrics)


def _bound(service: Service, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        return await endpoint(service, request)

    return handle


def _middleware(service: Service) -> list[Middleware]:
    options, chosen = service.options, list[Middleware]()
    if options.enable_request_id_headers:
        chosen.append(Middleware(RequestIds))
    if options.allowed_origins:
        cors = {f"allow_{name}": getattr(options, f"allowed_{name}") for name in ("origins", "methods", "headers")}
        chosen.append(Middleware(CORSMiddleware, **cors, allow_credentials=options.allow_credentials))
    if options.api_key:
        chosen.append(Middleware(ApiKeys, keys=options.api_key))
    return chosen


# -- errors ----------------------------------------------------------------------------------------------------------------


def _reply(request: Request, message: str, status: int) -> Response:
    return error_reply(RequestError(message, status=status), own_path(request.scope))


def _refused(request: Request, error: Any) -> Response:
    return error_reply(error, own_path(request.scope))


def _dead(request: Request, error: Exception) -> Response:
    return _reply(request, str(error), 500)


def _http_error(request: Request, error: Any) -> Response:
    known = {404: f"there is no endpoint {own_path(request.scope)[:200]}; /openapi.json lists those there are.",
             405: f"{request.method} is not allowed here."}  # fmt: skip
    reply = _reply(request, known.get(error.status_code, str(error.detail)), error.status_code)
    reply.headers.update(error.headers or {})
    return reply


def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; it stands in the access log


def _bug(request: Request, error: Exception) -> Response:
    return _reply(request, "the server made a mistake; its log says more.", 500)
