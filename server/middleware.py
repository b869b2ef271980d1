"""ASGI middleware: API keys, request ids. Plain functions of scope, receive, send: they cost a stream nothing."""

from __future__ import annotations

import hashlib
import hmac
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxpaged.request import RequestError
from jaxpaged_server.replies import error_reply

OPEN_PATHS = frozenset(("/", "/health", "/metrics", "/openapi.json", "/ping", "/version"))  # no key needed


class ApiKeys:
    """Lets a request pass only with one of the keys, as "Authorization: Bearer KEY" or "x-api-key: KEY" (Anthropic's clients).
    Compared in constant time. CORS preflights (OPTIONS) and `OPEN_PATHS` need none."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self.app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._may_pass(scope):
            return await self.app(scope, receive, send)
        error = RequestError("a valid API key is needed: send it as 'Authorization: Bearer KEY'.", status=401)
        await error_reply(error, own_path(scope))(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        if scope["method"] == "OPTIONS" or own_path(scope) in OPEN_PATHS:
            return True
        headers = Headers(scope=scope)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = _digest(given)
        return any([hmac.compare_digest(digest, known) for known in self._digests])  # a list: all are compared, always


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def own_path(scope: Scope) -> str:
    """The path below the root path that a proxy strips."""
    path, root = scope["path"], scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root) else path


class RequestIds:
    """Answers carry X-Request-Id: the client's, or a new one."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        own = headers.get("x-request-id") or uuid.uuid4().hex
        if "x-request-id" not in headers:
            scope["headers"] = [*scope["headers"], (b"x-request-id", own.encode())]

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = own
            await send(message)

        await self.app(scope, receive, send_with_id)
