"""The page at `/`, a playground and a live view, and the feed that it reads at `/live`.

The page is one file that loads nothing from anywhere: its policy names the hashes of its own style and script and allows
requests to this server only. It is open to everybody; with an API key, it asks for the key and sends it, to `/live` too.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jaxpaged.replicas import FrontDoor
from jaxpaged_server.live import Feed, Meter
from jaxpaged_server.sse import EventStream, Watch


def routes(engine: FrontDoor, meter: Meter, watch: Watch) -> list[Route]:
    """`GET /`: the page. `GET /live`: `live.Frame`s as server-sent events."""
    body = resources.files("jaxpaged_server").joinpath("page.html").read_bytes()
    headers = page_headers(body)
    feed = Feed(engine, meter)

    async def page(request: Request) -> Response:
        if headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type="text/html")

    async def live(request: Request) -> Response:
        return EventStream(feed.events(), watch)

    return [Route("/", page), Route("/live", live)]


def page_headers(body: bytes) -> dict[str, str]:
    """Caching: always ask, transfer only what is new. Safety: nothing but what this file brings, no frame around it."""
    policy = [
        "default-src 'none'",
        f"script-src {_hashes('script', body)}",
        f"style-src {_hashes('style', body)}",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return {
        "cache-control": "no-cache",
        "etag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        "content-security-policy": "; ".join(policy),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }


def _hashes(element: str, body: bytes) -> str:
    """CSP sources of the inline elements of a kind (CSP level 3, section 8.3)."""
    texts = re.findall(rb"<%b\b[^>]*>(.*?)</%b>" % (element.encode(), element.encode()), body, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in texts)
