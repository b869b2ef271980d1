"""Endpoints for those who run the server: /health, /version, /load, /metrics, /reset_prefix_cache, /abort_requests."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

import jaxpaged
from jaxpaged.engine import Engine
from jaxpaged_server.exchange import read
from jaxpaged_server.replies import json_reply
from jaxpaged_server.schemas import AbortRequest
from jaxpaged_server.service import Service


async def health(service: Service, request: Request) -> Response:
    """GET /health: 200 with an empty body, or 503 with the cause."""
    cause = service.trouble()
    return Response(status_code=200) if cause is None else json_reply({"status": "unhealthy", "cause": cause}, 503)


async def version(service: Service, request: Request) -> Response:
    """GET /version."""
    return json_reply({"version": jaxpaged.__version__})


async def load(service: Service, request: Request) -> Response:
    """GET /load: requests that the engine has and that have not ended."""
    return json_reply({"server_load": len(service.engine.streams)})


async def metrics(service: Service, request: Request) -> Response:
    """GET /metrics, for Prometheus."""
    content, media_type = service.metrics.exposition()
    return Response(content, headers={"content-type": media_type})


async def reset_prefix_cache(service: Service, request: Request) -> Response:
    """POST /reset_prefix_cache: forgets every cached page that no running request holds."""
    await service.engine.call(Engine.reset_prefix_cache)
    return Response(status_code=200)


async def abort_requests(service: Service, request: Request) -> Response:
    """POST /abort_requests {"request_ids": [...]}: the ids of answers; without any, all requests."""
    body = await read(service, request, AbortRequest)
    return json_reply({"aborted": service.abort(body.request_ids)})
