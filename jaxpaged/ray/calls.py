"""What travels between the front end and the replicas."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.types import Message, Scope

SCOPE_KEYS = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers",
              "client", "server")  # fmt: skip  # what of a scope is plain data


@dataclass(frozen=True)
class Call:
    """An HTTP request, whole. scope: its ASGI scope, less what is not data."""

    scope: dict[str, Any]
    body: bytes

    @classmethod
    def of(cls, scope: Scope, body: bytes) -> Call:
        return cls({name: scope[name] for name in SCOPE_KEYS if name in scope}, body)


@dataclass(frozen=True)
class Answer:
    """An HTTP answer, whole. replica: who gave it."""

    replica: str
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class ReplicaGone(Exception):
    """The replica that had a request has died, or cannot be reached."""


class TooBusy(Exception):
    """No replica takes another request, and as many wait as may."""


class Fleet(Protocol):
    """The replicas, as the front end sees them."""

    def stream(self, key: str, call: Call) -> AsyncGenerator[list[Message], None]:
        """One replica's answer, as ASGI messages in the pieces in which they come. Closing it aborts the request.
        ReplicaGone, TooBusy."""
        ...

    async def ask_all(self, call: Call) -> list[Answer]:
        """The answer of each replica."""
        ...
