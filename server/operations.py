"""Endpoints for those who run the server: /health, /version, /load, /metrics, /reset_prefix_cache, /abort_requests,
/v1/load_lora_adapter, /v1/unload_lora_adapter."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

import jaxpaged
from jaxpaged.adapter import LoRARequest
from jaxpaged.request import RequestError
from jaxpaged_server.exchange import read
from jaxpaged_server.fields import Body
from jaxpaged_server.replies import json_reply
from jaxpaged_server.schemas import AbortRequest, LoadLoraRequest, UnloadLoraRequest
from jaxpaged_server.service import Service

T = TypeVar("T", bound=Body)


async def health(service: Service, request: Request) -> Response:
    """GET /health: 200 with an empty body, or 503 with the cause."""
    cause = service.trouble()
    return Response(status_code=200) if cause is None else json_reply({"status": "unhealthy", "cause": cause}, 503)


async def version(service: Service, request: Request) -> Response:
    """GET /version."""
    return json_reply({"version": jaxpaged.__version__})


async def load(service: Service, request: Request) -> Response:
    """GET /load: requests that the engines have and that have not ended."""
    return json_reply({"server_load": len(service.engine.streams)})


async def metrics(service: Service, request: Request) -> Response:
    """GET /metrics, for Prometheus."""
    content, media_type = service.metrics.exposition()
    return Response(content, headers={"content-type": media_type})


async def reset_prefix_cache(service: Service, request: Request) -> Response:
    """POST /reset_prefix_cache: forgets every cached page that no running request holds."""
    await service.engine.reset_prefix_cache()
    return Response(status_code=200)


async def abort_requests(service: Service, request: Request) -> Response:
    """POST /abort_requests {"request_ids": [...]}: the ids of answers; without any, all requests."""
    body = await read(service, request, AbortRequest)
    return json_reply({"aborted": service.abort(body.request_ids)})


async def load_lora_adapter(service: Service, request: Request) -> Response:
    """POST /v1/load_lora_adapter {"lora_name": ..., "lora_path": ...}: from a folder that the server can read."""
    body = await _lora_update(service, request, LoadLoraRequest)
    wanted = LoRARequest(body.lora_name, lora_path=body.lora_path)
    await asyncio.to_thread(service.load_adapter, wanted, body.load_inplace)
    return Response(f"Success: LoRA adapter '{body.lora_name}' added successfully.", media_type="text/plain")


async def unload_lora_adapter(service: Service, request: Request) -> Response:
    """POST /v1/unload_lora_adapter {"lora_name": ...}: requests that have it go on with it."""
    body = await _lora_update(service, request, UnloadLoraRequest)
    service.loras.remove(body.lora_name)
    return Response(f"Success: LoRA adapter '{body.lora_name}' removed successfully.", media_type="text/plain")


async def _lora_update(service: Service, request: Request, kind: type[T]) -> T:
    if not service.options.allow_runtime_lora_updating:
        raise RequestError("this server does not load or unload LoRA adapters for clients; start it with "
                           "--allow-runtime-lora-updating.", status=403)  # fmt: skip
    return await read(service, request, kind)
