"""`jaxpaged run-batch`: answers a file of requests in OpenAI's batch format, and goes on where it was interrupted.

    in:   {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}           a line each
    out:  {"id": "batch_req_...", "custom_id": "a", "response": {"status_code", "request_id", "body"}, "error": null}

Requests go to the server's application in this process, or to a server at a URL. Each answer is written when it is there,
in any order; a request that the output file has an answer for is not sent again.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import httpx2
from tqdm import tqdm

from jaxpaged.remote import CONNECT_SECONDS, api_root, auth_headers, error_text
from jaxpaged.request import RequestError

SHOWN_ERRORS = 20  # bad lines of the input that are told at once
BEGIN = b'{"id": "batch_req_'  # of a line of the output

OpenClient = Callable[[], AbstractAsyncContextManager[httpx2.AsyncClient]]


class Item(NamedTuple):
    custom_id: str
    url: str
    body: dict[str, Any]


class Totals(NamedTuple):
    """done: answers of this run. failed: those of them that are errors. first_error: text of one."""

    done: int = 0
    failed: int = 0
    first_error: str = ""


def run(source: Path, target: Path, open_client: OpenClient, max_concurrency: int = 256, retry_errors: bool = False,
        quiet: bool = False) -> Totals:  # fmt: skip
    """Answers what `target` has no answer for; with retry_errors also what failed. Nothing is opened before both files are
    checked: RequestError names the bad lines. ConnectionError: the server has gone; the same call goes on later."""
    if max_concurrency < 1:
        raise RequestError(f"--max-concurrency must be at least 1, got {max_concurrency}.", "max_concurrency")
    ids = _check_input(source)
    answered = _resume(target, ids, retry_errors)
    if len(answered) == len(ids):
        return Totals()
    with tqdm(total=len(ids), initial=len(answered), disable=quiet, unit="req") as bar:
        return asyncio.run(_answer_all(source, target, answered, open_client, max_concurrency, bar))


@asynccontextmanager
async def at_url(url: str, api_key: str | None) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a running server."""
    root = api_root(url).removesuffix("/v1")  # the lines have it
    timeout, limits = httpx2.Timeout(None, connect=CONNECT_SECONDS), httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=root, headers=auth_headers(api_key), timeout=timeout, limits=limits) as client:
        yield client


@asynccontextmanager
async def in_process(app: AbstractAsyncContextManager[Any]) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of an ASGI application that `app` opens, without a network between them."""
    async with app as application:
        transport = httpx2.ASGITransport(application, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as client:
            yield client


# -- the files ---------------------------------------------------------------------------------------------------------


def _check_input(source: Path) -> set[str]:
    """The custom_ids. RequestError lists the bad lines."""
    ids, errors = dict[str, int](), list[str]()
    for number, line in _lines(source):
        try:
            item = _item(line)
            if item.custom_id in ids:
                raise ValueError(f"custom_id {item.custom_id!r} is that of line {ids[item.custom_id]} too")
            ids[item.custom_id] = number
        except ValueError as error:
            errors.append(f"  line {number}: {error}")
    if errors:
        more = [f"  ... and {len(errors) - SHOWN_ERRORS} more"] if len(errors) > SHOWN_ERRORS else []
        raise RequestError("\n".join([f"{source} has bad lines:", *errors[:SHOWN_ERRORS], *more]), "input_file")
    if not ids:
        raise RequestError(f"{source} has no requests.", "input_file")
    return set(ids)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers."""
    try:
        with path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error}") from None


def _item(line: bytes) -> Item:
    """ValueError says what is wrong with the line."""
    found = json.loads(line)
    if not isinstance(found, dict):
        raise ValueError(f"must be a JSON object, not {type(found).__name__}")
    custom_id, url, body = found.get("custom_id"), found.get("url"), found.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise ValueError(f"custom_id must be a string, got {custom_id!r}")
    if found.get("method") != "POST":
        raise ValueError(f"method must be 'POST', got {found.get('method')!r}")
    if not isinstance(url, str) or not url.startswith("/"):
        raise ValueError(f"url must be a path such as '/v1/chat/completions', got {url!r}")
    if not isinstance(body, dict):
        raise ValueError(f"body must be a JSON object, got {body!r}")
    if body.get("stream"):
        raise ValueError("body asks for a stream, a batch cannot have one: leave stream out")
    return Item(custom_id, url, body)


def _resume(target: Path, ids: set[str], retry_errors: bool) -> set[str]:
    """The custom_ids that have an answer already. Cuts off a last line that was not finished and, with retry_errors, takes
    the failures out; a file that is no output of this batch is refused and left alone."""
    answered, all_kept = set[str](), True
    for number, line in _lines(target) if target.exists() else ():
        if not line.endswith(b"\n") and (line.startswith(BEGIN) or BEGIN.startswith(line)):
            all_kept = False
            continue
        answer = _answer_line(target, number, line, ids)
        if retry_errors and failure(answer):
            all_kept = False
        else:
            answered.add(answer["custom_id"])
    if not all_kept:
        _keep(target, answered)
    return answered


def _keep(target: Path, answered: set[str]) -> None:
    """Leaves the lines of these requests, at once or not at all."""
    temporary = target.with_name(target.name + ".part")
    with temporary.open("wb") as file:
        for _, line in _lines(target):
            if line.endswith(b"\n") and json.loads(line)["custom_id"] in answered:
                file.write(line)
    os.replace(temporary, target)


def _answer_line(target: Path, number: int, line: bytes, ids: set[str]) -> dict[str, Any]:
    try:
        answer = json.loads(line)
        known = answer["custom_id"] in ids and {"response", "error"} <= set(answer)
    except (ValueError, KeyError, TypeError):
        known, answer = False, {}
    if not known:
        raise RequestError(f"line {number} of {target} is no answer to a request of this input: name another file.",
                           "output_file")  # fmt: skip
    return answer


# -- the requests ------------------------------------------------------------------------------------------------------


async def _answer_all(source: Path, target: Path, answered: set[str], open_client: OpenClient, max_concurrency: int,
                      bar: tqdm) -> Totals:  # fmt: skip
    """Workers share one iterator over the input, so that only what is under way is in memory."""
    items = (item for item in (_item(line) for _, line in _lines(source)) if item.custom_id not in answered)
    totals = Totals()

    async def work(client: httpx2.AsyncClient, out: IO[bytes]) -> None:
        nonlocal totals
        for item in items:
            answer = await _answer(client, item)
            out.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
            out.flush()
            error = failure(answer)
            totals = Totals(totals.done + 1, totals.failed + bool(error), totals.first_error or error)
            bar.update()

    try:
        async with open_client() as client:
            with target.open("ab") as out:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(max_concurrency):
                        workers.create_task(work(client, out))
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return totals


async def _answer(client: httpx2.AsyncClient, item: Item) -> dict[str, Any]:
    """The line for one request. ConnectionError if nobody answers at the URL at all."""
    response, error = None, None
    try:
        reply = await client.post(item.url, json=item.body)
        request_id = reply.headers.get("x-request-id") or uuid.uuid4().hex
        response = {"status_code": reply.status_code, "request_id": request_id, "body": _body(reply)}
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as gone:
        raise ConnectionError(f"no answer from {client.base_url} ({gone or type(gone).__name__}). What is answered is kept: "
                              "the same command goes on from there.") from None  # fmt: skip
    except httpx2.TransportError as broken:  # which kind depends on what arrived first
        error = {"code": "connection_error", "message": f"the connection broke ({broken or type(broken).__name__})"}
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": item.custom_id, "response": response, "error": error}


def _body(reply: httpx2.Response) -> Any:
    try:
        return reply.json()
    except ValueError:
        return {"error": {"message": reply.text or "the server failed", "code": reply.status_code}}


def failure(answer: dict[str, Any]) -> str:
    """Why a request failed, empty if it did not."""
    if answer["error"] is not None:
        return str(answer["error"].get("message", answer["error"]))
    status = answer["response"]["status_code"]
    return "" if status < 400 else error_text(status, json.dumps(answer["response"]["body"]).encode())


def say(totals: Totals, target: Path) -> None:
    """Says what came of it. RuntimeError if requests failed."""
    if totals.failed:
        raise RuntimeError(f"{totals.failed} of {totals.done} requests failed (they are in {target}; --retry-errors sends them "
                           f"again); the first error: {totals.first_error}")  # fmt: skip
    print(f"{totals.done} requests answered." if totals.done else f"{target} has all answers already.", file=sys.stderr)
