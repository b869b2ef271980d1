"""A small OpenAI-compatible server for the tests of the clients: on a loopback port, or as an ASGI application. The
fixtures `fake` and `url` (conftest.py) are one of them."""

import asyncio
import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxpaged import cli

MODEL = "fake/model-1"


class FakeOpenAI:
    """Answers " w0 w1 ..." with max_tokens words, one a chunk.

    What a test can see: bodies, headers, running, most_at_once, finished, unfinished (streams whose client left). What it can
    set: delay (seconds before each word), refuse(body) -> (status, message) or None, and the rest of `reset`.
    """

    def __init__(self):
        self.reset()
        routes = [Route("/v1/models", self.models), Route("/v1/completions", self.answer, methods=["POST"]),
                  Route("/v1/chat/completions", self.answer, methods=["POST"]),
                  Route("/v1/embeddings", self.embed, methods=["POST"]),
                  Route("/v1/crash", self.crash, methods=["POST"])]  # fmt: skip
        self.app = Starlette(routes=routes)

    def reset(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.running = self.most_at_once = self.finished = self.unfinished = 0
        self.delay = 0.0
        self.refuse: Callable[[dict[str, Any]], tuple[int, str] | None] = lambda body: None
        self.break_off_after: int | None = None  # words, then an error in the stream
        self.cut_after: int | None = None  # words, then the stream ends without [DONE]
        self.with_usage = True
        self.reasoning: list[str] = []
        self.words: list[str] | None = None
        self.not_ready = 0  # answers with 503 so many times
        self.api_key: str | None = None

    async def models(self, request: Request) -> Response:
        if self.not_ready:
            self.not_ready -= 1
            return PlainTextResponse("loading", 503)
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def embed(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"embedding": [0.5]}]})

    async def crash(self, request: Request) -> Response:
        raise RuntimeError("a bug of the server")

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if refusal := self.refuse(body):
            status, message = refusal
            return JSONResponse({"error": {"message": message, "type": "BadRequestError", "code": status}}, status)
        is_chat, words = "chat" in request.url.path, self._words(body)
        if body.get("stream"):
            return StreamingResponse(self._stream(body, is_chat, words), media_type="text/event-stream")
        async with self._counted():
            await asyncio.sleep(self.delay)
        text = "".join(words)
        choice = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        return JSONResponse({"id": "x", "choices": [{"index": 0, "finish_reason": "length", **choice}],
                             "usage": self._usage(body, words)}, headers={"x-request-id": "req-7"})  # fmt: skip

    def _words(self, body: dict[str, Any]) -> list[str]:
        count = body.get("max_completion_tokens") or body.get("max_tokens") or 3
        return self.words if self.words is not None else [f" w{i}" for i in range(count)]

    def _usage(self, body: dict[str, Any], words: list[str]) -> dict[str, Any]:
        prompt = body.get("prompt") or " ".join(m["content"] for m in body["messages"])
        count = len(prompt.split()) if isinstance(prompt, str) else len(prompt)
        return {"prompt_tokens": count, "completion_tokens": len(words), "total_tokens": count + len(words),
                "prompt_tokens_details": {"cached_tokens": 2}}  # fmt: skip

    async def _stream(self, body: dict[str, Any], is_chat: bool, words: list[str]):
        async with self._counted():
            if is_chat:
                yield _event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            for thought in self.reasoning:
                delta = {"reasoning": thought, "reasoning_content": thought}
                yield _event({"choices": [{"index": 0, "delta": delta}]})
            for i, word in enumerate(words):
                await asyncio.sleep(self.delay)
                if i == self.break_off_after:
                    yield _event({"error": {"message": "the engine fell over", "code": 500}}) + _event("[DONE]")
                    return
                if i == self.cut_after:
                    return
                yield _event({"choices": [{"index": 0, **({"delta": {"content": word}} if is_chat else {"text": word})}]})
            yield _event({"choices": [{"index": 0, "finish_reason": "length", **({"delta": {}} if is_chat else {"text": ""})}]})
            if self.with_usage and body.get("stream_options", {}).get("include_usage"):
                yield _event({"choices": [], "usage": self._usage(body, words)})
            yield _event("[DONE]")

    @contextlib.asynccontextmanager
    async def _counted(self):
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        try:
            yield
        except BaseException:
            self.unfinished += 1
            raise
        else:
            self.finished += 1
        finally:
            self.running -= 1


def _event(data: Any) -> str:
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"


@contextlib.contextmanager
def serving(fake: FakeOpenAI) -> Iterator[str]:
    """The URL of the application on a loopback port."""
    config = uvicorn.Config(fake.app, port=0, log_level="critical", lifespan="off", ws="none", loop="asyncio")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(5)


def run_cli(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Status, standard output, standard error of `jaxpaged arguments`."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", ["jaxpaged", *arguments])
    status = 0
    try:
        cli.main()
    except SystemExit as end:
        status = int(end.code or 0)
    return status, *capsys.readouterr()
