"""A server whose model takes no time: what is left is the path of a token from the scheduler to the socket.

Each token is the time at which it was sampled (microseconds of the monotonic clock, mod 10^7), and its text says so: a
client on the same machine reads how long the token has been under way.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jaxpaged.async_engine import AsyncEngine
from jaxpaged.batch import Batch, Sampled, ladder
from jaxpaged.detokenizer import Pieces
from jaxpaged.engine import Engine
from jaxpaged.scheduler import Limits
from jaxpaged_server import run
from jaxpaged_server.app import create_app
from jaxpaged_server.options import ServerOptions
from jaxpaged_server.replies import json_reply
from jaxpaged_server.service import Service

CLOCK = 10**7  # token ids: microseconds


class ClockTokenizer:
    """Token i is written "i ", of seven digits."""

    vocab_size = CLOCK
    special_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()
    chat_template = "{{ messages[-1].content }}"
    chat_templates: dict[str, str] = {}

    def __init__(self) -> None:
        self.pieces = Pieces(lambda token: b"%07d " % token)
        self.pieces._known = _Forgetful()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [byte + 1 for byte in text.encode()] or [1]

    def token(self, token: int) -> str:
        return f"{token:07d} "

    def token_bytes(self, token: int) -> bytes:
        return self.token(token).encode()

    def apply_chat_template(self, messages: Any, tokenize: bool = True, **_: Any) -> Any:
        text = "".join(str(message["content"]) for message in messages)
        return self.encode(text) if tokenize else text


class _Forgetful(dict):
    """Ten million clock readings are not worth remembering."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class NullRunner:
    """Samples the time. step_ms: how long a step takes on the pretended device (the host is free meanwhile)."""

    def __init__(self, step_ms: float = 0.0):
        self.step = step_ms / 1000
        self.free_at = 0.0

    def dispatch(self, batch: Batch) -> tuple[int, float]:
        self.free_at = max(self.free_at, time.monotonic()) + self.step
        return len(batch.slots), self.free_at

    def collect(self, handle: tuple[int, float]) -> Sampled:
        rows, ready_at = handle
        wait = ready_at - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        now = int(time.monotonic() * 1e6) % CLOCK
        return Sampled(np.full(rows, now, np.int32), np.ones(rows, bool), None, None)

    def recover(self) -> bool:
        return False

    def close(self) -> None:
        pass


def service(max_num_seqs: int, max_model_len: int = 4096, step_ms: float = 0.0, **options: Any) -> Service:
    limits = Limits(max_num_seqs=max_num_seqs, max_num_batched_tokens=8192, page_size=32, max_model_len=max_model_len,
                    num_pages=max_num_seqs * max_model_len // 32 + 1, vocab_size=CLOCK)  # fmt: skip
    tokenizer: Any = ClockTokenizer()
    engine = Engine(limits, NullRunner(step_ms), ladder(8192, max_num_seqs), tokenizer)
    return Service(AsyncEngine(engine), ServerOptions(**options), ["null"])


async def tasks(request: Request) -> Response:
    """How many asyncio tasks there are."""
    return json_reply({"tasks": len(asyncio.all_tasks())})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--step-ms", type=float, default=0.0)
    parser.add_argument("--slow-client-timeout", type=float, default=30.0)
    args = parser.parse_args()
    run.set_up_logs("text", "warning")
    made = service(args.max_num_seqs, step_ms=args.step_ms, port=args.port, disable_uvicorn_access_log=True,
                   slow_client_timeout=args.slow_client_timeout)  # fmt: skip
    with run.listen(made.options) as sock:
        app = create_app(made)
        app.router.routes.append(Route("/debug/tasks", tasks))
        run.serve(made, sock, app)


if __name__ == "__main__":
    main()
