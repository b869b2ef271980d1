"""A client of an OpenAI-compatible server: what models it has, and answers that stream."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx2

from jaxpaged.chat import Dialogue, Piece, Pieces, Usage, say
from jaxpaged.request import RequestError

CONNECT_SECONDS = 10.0  # an answer itself may take as long as it likes


def api_root(url: str) -> str:
    """The root of the API for what a user gives: "http://host:8000" and "http://host:8000/v1/" are the same."""
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise RequestError(f"{url!r} is no URL ({error}); give one such as http://localhost:8000.", "url") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise RequestError(f"{url!r} is no URL of a server; give one such as http://localhost:8000.", "url")
    root = url.rstrip("/")
    return root if parsed.path.strip("/") else f"{root}/v1"


def auth_headers(api_key: str | None) -> dict[str, str]:
    """api_key: by default that of the environment variable OPENAI_API_KEY."""
    key = api_key or os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def error_text(status: int, body: bytes) -> str:
    """What a refusal says, in any of the forms that servers use."""
    try:
        found = json.loads(body)
    except ValueError:
        found = body.decode(errors="replace").strip()
    while isinstance(found, dict):
        known = [found[key] for key in ("error", "message", "detail") if found.get(key)]
        found = known[0] if known else json.dumps(found)
    return f"HTTP {status}: {found or 'no reason given'}"


class Server:
    """A connection to a server. url: with or without /v1. model: by default the first that the server has.

    RequestError: the server refuses, and says why. ConnectionError: there is none, or it broke off.
    """

    def __init__(self, url: str, model: str | None = None, api_key: str | None = None,
                 headers: Mapping[str, str] | None = None):  # fmt: skip
        self.url = api_root(url)
        timeout = httpx2.Timeout(None, connect=CONNECT_SECONDS)
        self.client = httpx2.Client(headers={**auth_headers(api_key), **(headers or {})}, timeout=timeout)
        self._model = model

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: Any) -> None:
        self.client.close()

    @property
    def model(self) -> str:
        if self._model is None:
            self._model = self.models()[0]
        return self._model

    def models(self) -> list[str]:
        with self._reachable():
            response = self.client.get(f"{self.url}/models")
        _check(response)
        found = [card["id"] for card in response.json().get("data", [])]
        if not found:
            raise RequestError(f"{self.url}/models lists no model: name one.", "model")
        return found

    def chat(self, messages: list[dict[str, str]], **params: Any) -> Pieces:
        """params: further fields of the request, such as temperature."""
        for chunk in self._stream("chat/completions", {"messages": messages, **params}):
            delta = _choice(chunk).get("delta") or {}
            reasoning = delta.get("reasoning") or delta.get("reasoning_content") or ""  # some servers send both
            yield Piece(delta.get("content") or "", reasoning, _usage(chunk))

    def complete(self, prompt: str, **params: Any) -> Pieces:
        for chunk in self._stream("completions", {"prompt": prompt, **params}):
            yield Piece(_choice(chunk).get("text") or "", usage=_usage(chunk))

    def _stream(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        body = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}, **body}
        with self._reachable(), self.client.stream("POST", f"{self.url}/{path}", json=body) as response:
            if response.is_error:
                response.read()
                _check(response)
            for event in httpx2.EventSource(response):
                if event.data == "[DONE]":
                    return
                chunk = json.loads(event.data)
                if "error" in chunk:
                    raise RequestError(f"the answer failed: {error_text(200, event.data.encode())}")
                yield chunk
        raise ConnectionError(f"the answer of {self.url} broke off.")

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except httpx2.TransportError as error:
            raise ConnectionError(f"no answer from {self.url} ({error or type(error).__name__}); is the server running? "
                                  "jaxpaged serve MODEL starts one.") from None  # fmt: skip


def _check(response: httpx2.Response) -> None:
    if response.is_error:
        text = error_text(response.status_code, response.content)
        raise RequestError(f"{response.request.url} refuses: {text}", status=response.status_code)


def _choice(chunk: dict[str, Any]) -> dict[str, Any]:
    choices = chunk.get("choices")
    return choices[0] if choices else {}


def _usage(chunk: dict[str, Any]) -> Usage | None:
    if not (usage := chunk.get("usage")):
        return None
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return Usage(usage["prompt_tokens"], cached, usage.get("completion_tokens") or 0)


class RemoteConversation(Dialogue):
    """With a model behind a URL. params: fields of each request."""

    def __init__(self, server: Server, params: Mapping[str, Any], system: str | None = None, stats: bool = True,
                 write: Callable[[str], Any] = say):  # fmt: skip
        super().__init__(system, stats, write)
        self.server, self.params = server, dict(params)

    def _stream(self, messages: list[dict[str, str]]) -> Pieces:
        yield from self.server.chat(messages, **self.params)
