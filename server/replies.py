"""JSON responses, encoded by msgspec, which also sees to it that NaN and infinities never reach JSON (they become null)."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

from jaxpaged.request import RequestError
from jaxpaged_server.errors import RETRY_AFTER, body_of

_encode = msgspec.json.Encoder().encode


def json_reply(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(_encode(content), status, headers, media_type="application/json")


def error_reply(error: RequestError, path: str) -> Response:
    """The error in the shape of the API that `path` belongs to."""
    headers = {"retry-after": str(RETRY_AFTER)} if error.status == 503 else None
    return json_reply(body_of(error, path), error.status, headers)
