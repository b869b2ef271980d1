"""2,000 bodies that are wrong, and clients that send theirs badly: each gets a 4xx that says what is wrong in a few words,
while a stream beside them delivers every token, and nothing is left of them afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from live_server import LiveServer, serve, wait_until
from scripted import scripted_service
from scripted_vectors import scripted_engine_with_vectors

from jaxpaged.async_engine import AsyncEngine
from jaxpaged_server.app import create_app
from jaxpaged_server.openapi import methods
from jaxpaged_server.options import ServerOptions
from jaxpaged_server.service import Service

SEED = 20260101
LONG = 10_000_000  # bytes of a long body
STALL = 20.0  # seconds: what nothing may take, even on a machine that does ten other things
MESSAGE = {"role": "user", "content": "hi"}
PATHS: dict[str, dict[str, Any]] = {  # the least that each endpoint takes
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": [MESSAGE], "max_tokens": 4},
    "/v1/responses": {"input": "hi", "max_output_tokens": 4},
    "/v1/embeddings": {"input": "hi"},
    "/v1/messages": {"messages": [MESSAGE], "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": [MESSAGE]},
    "/inference/v1/generate": {"token_ids": [1]},
    "/tokenize": {"messages": [MESSAGE]},
    "/detokenize": {"tokens": [1]},
    "/render": {"messages": [MESSAGE]},
    "/v1/completions/render": {"prompt": "hi"},
    "/v1/chat/completions/render": {"messages": [MESSAGE]},
    "/abort_requests": {"request_ids": ["nobody"]},
    "/v1/load_lora_adapter": {"lora_name": "a", "lora_path": "b"},
    "/v1/unload_lora_adapter": {"lora_name": "a"},
}
NO_BODY = {"/reset_prefix_cache"}
CHAT = ("/v1/chat/completions", "/tokenize", "/render", "/v1/chat/completions/render")
SAMPLED = ("/v1/completions", "/v1/chat/completions")

# -- what is wrong, by what a field is (never null, which is the same as not given) -------------------------------------------

HUGE = (2**70, -(2**63) - 1, 10**300)
WRONG: dict[str, tuple[Any, ...]] = {
    "integer": ("5", 1.5, True, [], {}, [1], "x" * 3000),
    "number": ("0.5", True, [], {}, [0.5]),
    "boolean": (0, 1, "true", [], {}, 0.5),
    "text": (0, 1.5, True, [], {}, ["a"], *HUGE),
    "texts": (0, True, {}, [1], [["a"]], [None], {"a": "b"}),
    "ids": (0, True, {}, "1", ["1"], [1.5], [None], [[1]], [-1], [2**70], [-(2**63) - 1]),
    "object": (0, True, "{}", [], [1], "x" * 3000),
    "prompt": (0, True, {}, [], [[]], [1, "a"], [{}], [None], [[1], "a"], [-1], [2**70], [[["a"]]], [[1.5]], 1e300),
    "messages": (0, "hi", {}, [], [0], ["hi"], [None], [[]], MESSAGE, [[MESSAGE]], [{}], [{"role": "user"}],
                 [{"role": 5, "content": "a"}], [{"role": None, "content": "a"}], [{"content": "a"}],
                 [{"role": "user", "content": 5}], [{"role": "user", "content": {}}], [{"role": "user", "content": [5]}],
                 [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": [{"type": "image_url"}]}],
                 [{"role": "user", "content": [{"type": "text", "text": 5}]}], [{"role": "user", "content": [[]]}],
                 [{"role": "user", "content": [{"type": 5, "text": "a"}]}], [MESSAGE, 5], [MESSAGE, {"role": "x" * 3000}]),
    "tools": (0, "f", {}, [], [0], ["f"], [{}], [{"type": "function"}], [{"type": "function", "function": {}}],
              [{"type": "function", "function": {"name": 5}}], [{"type": "function", "function": {"name": ""}}],
              [{"type": "other", "function": {"name": "f"}}], [{"type": "function", "function": "f"}], [None], [[]],
              [{"type": "function", "function": {"name": "f", "parameters": []}}]),
    "tool_choice": (0, True, [], "nonsense", {}, {"type": "function"}, {"type": "function", "function": {}}, "required"),
    "items": (0, True, {}, [], [0], [{}], ["hi"], [[]], [{"type": "nonsense"}], [{"role": "user"}], [{"type": "function_call"}],
              [{"role": "user", "content": 5}], [{"role": "user", "content": [{"type": "input_image"}]}]),
    "thinking": (0, True, [], "a", {}, {"type": "nonsense"}, {"type": 5}),
    "stream_options": (0, True, [], "a", {"include_usage": "yes"}, {"include_usage": 5}, {"include_usage": True}),
}  # fmt: skip
# Wrong for an assistant's message with calls: those have their own test, on a conversation that is right but for them.
CALLS = (5, "f", {"a": 1}, [5], ["f"], [[]], [{}], [{"function": 5}],
         *([{"function": {"name": "f", "arguments": text}}] for text in ("{", "[" * 100_000, "1" * 5000)))  # fmt: skip
BIAS = (0, [], "a", True, {"x": 1}, {"-1": 1}, {"1.5": 1}, {"": 1}, {"9" * 5000: 1}, {"1": "a"}, {"1": None}, {"9" * 25: 0},
        {str(i): 0 for i in range(1025)})  # fmt: skip
BEYOND: dict[str, tuple[Any, ...]] = {  # of SamplingParams
    "n": (0, -1, *HUGE), "max_tokens": (-1, *HUGE), "min_tokens": (-1, -(2**63) - 1),
    "temperature": (-0.1, 2.1, 1e308, *HUGE), "top_p": (0, -1, 1.1, 1e308), "top_k": (-2, -(2**63) - 1),
    "min_p": (-0.1, 1.1), "presence_penalty": (-2.1, 2.1, 1e308), "frequency_penalty": (-2.1, 1e308),
    "repetition_penalty": (0, -1, -1e308, 1e300, 1e-300), "seed": (2**64, *HUGE), "prompt_logprobs": (-2, 10**6, *HUGE),
    "stop": ([""], "", ["a", ""]), "bad_words": ([""], ["a"] * 129, ["a" * 257]), "allowed_token_ids": ([], [10**6]),
    "stop_token_ids": ([-1], [10**6], [2**70]), "logit_bias": BIAS,
}  # fmt: skip
KINDS: dict[str, str] = {
    "n": "integer", "max_tokens": "integer", "min_tokens": "integer", "top_k": "integer", "seed": "integer",
    "prompt_logprobs": "integer", "temperature": "number", "top_p": "number", "min_p": "number", "presence_penalty": "number",
    "frequency_penalty": "number", "repetition_penalty": "number", "ignore_eos": "boolean", "skip_special_tokens": "boolean",
    "include_stop_str_in_output": "boolean", "stop": "texts", "stop_token_ids": "ids", "allowed_token_ids": "ids",
}  # fmt: skip
REQUEST = {"model": "text", "priority": "integer", "request_id": "text", "cache_salt": "text"}
SERVED = {**KINDS, **REQUEST, "bad_words": "texts", "stream": "boolean", "stream_options": "stream_options",
          "stream_interval": "integer", "truncate_prompt_tokens": "integer", "truncation_side": "text",
          "return_token_ids": "boolean", "skip_reading_prefix_cache": "boolean"}  # fmt: skip
TALK = {"messages": "messages", "tools": "tools", "tool_choice": "tool_choice", "chat_template_kwargs": "object",
        "add_generation_prompt": "boolean", "reasoning_effort": "text", "documents": "ids"}  # fmt: skip
TOLD = {"model": "text", "messages": "messages", "system": "texts", "tool_choice": "tool_choice", "thinking": "thinking"}
FIELDS: dict[str, dict[str, str]] = {
    "/v1/completions": {**SERVED, "prompt": "prompt", "echo": "boolean", "logprobs": "integer"},
    "/v1/chat/completions": {**SERVED, **TALK, "logprobs": "boolean", "top_logprobs": "integer"},
    "/v1/responses": {**REQUEST, "input": "items", "temperature": "number", "max_output_tokens": "integer", "stream": "boolean",
                      "tool_choice": "tool_choice", "instructions": "text", "metadata": "object", "include": "texts"},
    "/v1/embeddings": {**REQUEST, "input": "prompt", "dimensions": "integer", "encoding_format": "text", "pooling": "text"},
    "/v1/messages": {**TOLD, "max_tokens": "integer", "temperature": "number", "top_k": "integer", "stream": "boolean",
                     "stop_sequences": "texts"},
    "/v1/messages/count_tokens": TOLD,
    "/inference/v1/generate": {**REQUEST, "token_ids": "ids", "sampling_params": "object", "stream": "boolean"},
    "/tokenize": {**TALK, "model": "text", "return_token_strs": "boolean"},
    "/detokenize": {"tokens": "ids", "model": "text"},
    "/render": {"model": "text", **TALK},
    "/v1/completions/render": {"prompt": "prompt", "model": "text"},
    "/v1/chat/completions/render": {"model": "text", **TALK},
    "/abort_requests": {"request_ids": "texts"},
    "/v1/load_lora_adapter": {"lora_name": "text", "lora_path": "text", "load_inplace": "boolean"},
    "/v1/unload_lora_adapter": {"lora_name": "text"},
}  # fmt: skip
UNSUPPORTED = ("best_of", "guided_json", "response_format", "prompt_embeds", "use_beam_search", "functions")
LITERALS = (b"NaN", b"Infinity", b"-Infinity", b"1e400", b"-1e400", b"1" * 5000, b"01", b"+1", b".5", b"'a'", b"undefined",
            b'"\\ud800"', b'"\\q"', b'"\xff"', b'"\xc3"', b'"a\nb"', b"[1,]", b"{,}", b"[" * 100_000,
            b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000)  # fmt: skip
WHOLE = (b"", b" ", b"null", b"true", b"5", b"[]", b'"hi"', b"[{}]", b"hello", b"\x00", b"\xff\xfe{}", b"\xef\xbb\xbf{}",
         b"{}{}", b"{'prompt': 'hi'}", b'{"prompt" "hi"}', b"{", b'{"', b"[" * 100_000, b"prompt=hi", b"<prompt/>")  # fmt: skip
TYPES = ("text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonp", "json")


class Fuzz:
    """Wrong bodies, the same for a seed."""

    def __init__(self, seed: int, paths: list[str]):
        self.random, self.paths = random.Random(seed), paths

    def request(self) -> tuple[str, bytes, str, str]:
        """(path, body, content type, what is wrong with it)."""
        path = self.random.choice(self.paths)
        kind = self.random.choice(
            (self.field,) * 10 + (self.beyond,) * 4 + (self.text, self.truncated, self.literal, self.missing)
        )
        if self.random.random() < 0.03:
            content_type = self.random.choice(TYPES)
            return path, json.dumps(PATHS[path]).encode(), content_type, f"content type {content_type!r}"
        body, why = kind(path)
        return path, body, "application/json", why

    def field(self, path: str) -> tuple[bytes, str]:
        name, kind = self.random.choice(list(FIELDS[path].items()))
        value = self.random.choice(WRONG[kind])
        return self.body(path, name, value), f"{name}={value!r:.200}"

    def beyond(self, path: str) -> tuple[bytes, str]:
        """Sampling parameters that are out of their range; elsewhere, fields that this server does not have."""
        name, values = self.random.choice(list(BEYOND.items()))
        value = self.random.choice(values)
        if path == "/inference/v1/generate":
            return self.body(path, "sampling_params", {name: value}), f"sampling_params.{name}={value!r:.200}"
        if path in SAMPLED:
            if self.random.random() < 0.3:
                name, value = self.random.choice((*UNSUPPORTED, "stop")), ["please"] * 1000
            return self.body(path, name, value), f"{name}={value!r:.200}"
        return self.field(path)

    def body(self, path: str, name: str, value: Any) -> bytes:
        """A body that is right but for one field, with others that nobody knows; the field may come twice."""
        rest = {key: one for key, one in PATHS[path].items() if key != name or self.random.random() < 0.3}
        noise = {f"x{self.random.randrange(1000)}": self.noise(3) for _ in range(self.random.randrange(3))}
        told = json.dumps({**rest, **noise})[1:-1]
        return ("{" + ", ".join(filter(None, (told, f"{json.dumps(name)}: {json.dumps(value)}"))) + "}").encode()

    def noise(self, depth: int) -> Any:
        if depth and self.random.random() < 0.3:
            return [self.noise(depth - 1) for _ in range(self.random.randrange(3))]
        return self.random.choice((None, True, 0, -1, 1e300, "", "é\u2028\U0001f600", "x" * 500, {"a": {}}))

    def text(self, path: str) -> tuple[bytes, str]:
        body = self.random.choice(WHOLE)
        return body, f"body {body[:50]!r}"

    def truncated(self, path: str) -> tuple[bytes, str]:
        body = json.dumps({**PATHS[path], "x": self.noise(3)}).encode()
        at = self.random.randrange(len(body))
        return body[:at], f"cut off at {at}"

    def literal(self, path: str) -> tuple[bytes, str]:
        literal = self.random.choice(LITERALS)
        name = self.random.choice(("x", *FIELDS[path]))
        return json.dumps(PATHS[path]).encode()[:-1] + b', "%s": %s}' % (name.encode(), literal), f"{name}: {literal[:50]!r}"

    def missing(self, path: str) -> tuple[bytes, str]:
        """Without what is needed; null is no better. (/abort_requests needs nothing.)"""
        if path == "/abort_requests":
            return self.field(path)
        given = {name: None for name in PATHS[path] if self.random.random() < 0.5}
        return json.dumps({**given, "x": self.noise(3)}).encode(), "without what is needed"


def long_bodies() -> Iterator[tuple[str, bytes, str]]:
    """(path, body of 10 MB, what it is)."""
    text, ids = b'"' + b"a" * LONG + b'"', b"[" + b"1," * (LONG // 2) + b"1]"
    members = b"{" + b",".join(b'"k%d":1' % i for i in range(LONG // 11)) + b"}"
    shapes = {
        "text": text, "escapes": b'"' + b"\\u00e9" * (LONG // 6) + b'"', "ids": ids, "bad ids": ids.replace(b"1,", b"-1,"),
        "strings": b"[" + b'"",' * (LONG // 3) + b'""]', "lists": b"[" + b"[]," * (LONG // 3) + b"[]]", "members": members,
    }  # fmt: skip
    needs = {"/v1/completions": b"prompt", "/v1/chat/completions": b"messages", "/inference/v1/generate": b"token_ids",
             "/detokenize": b"tokens", "/render": b"prompt"}  # fmt: skip
    for path, name in needs.items():
        for shape, value in shapes.items():
            if shape != "ids" or path not in ("/detokenize", "/render"):  # where they are right
                yield path, b'{"%s":%s}' % (name, value), f"{name.decode()} of long {shape}"
    for name in (b"stop", b"stop_token_ids", b"logit_bias", b"bad_words", b"max_tokens", b"model"):
        for shape in ("text", "bad ids", "members"):
            if (name, shape) != (b"stop", "text"):  # which is right
                yield "/v1/completions", b'{"prompt":"hi","%s":%s}' % (name, shapes[shape]), f"{name.decode()} of long {shape}"
    yield "/v1/completions", b'{"prompt":"hi","bad_words":[%s]}' % text, "a long bad word"
    yield "/v1/completions", members, "a million fields"
    yield "/tokenize", b'{"x":%s}' % ids, "long ids in a field that nobody knows"


# -- the server beside a stream ----------------------------------------------------------------------------------------------


def fuzzed(seconds: float = 0.001) -> Service:
    engine = scripted_engine_with_vectors(lambda prompt: "word " * 2000, seconds=seconds, max_model_len=1024)
    return Service(
        AsyncEngine(engine), ServerOptions(tool_call_parser="hermes", allow_runtime_lora_updating=True), ["scripted"]
    )


class Reader(threading.Thread):
    """A client that streams answer after answer. gap: the longest time between two chunks; answers: how many were whole."""

    def __init__(self, live: LiveServer, num_tokens: int = 200):
        super().__init__(name="reader")
        self.url, self.num_tokens = f"{live.base_url}/v1/completions", num_tokens
        self.stopping, self.gap, self.answers, self.wrong = threading.Event(), 0.0, 0, list[str]()

    def run(self) -> None:
        while not self.stopping.is_set():
            self.read()

    def read(self) -> None:
        asked = {"prompt": "hi", "stream": True, "max_tokens": self.num_tokens, "return_token_ids": True}
        last, tokens, reason = time.monotonic(), 0, None
        with httpx.stream("POST", self.url, json=asked, timeout=60) as answer:
            for line in answer.iter_lines():
                now = time.monotonic()
                self.gap, last = max(self.gap, now - last), now
                if line.startswith("data: {"):
                    (choice,) = json.loads(line[6:])["choices"]
                    tokens, reason = tokens + len(choice["token_ids"]), choice["finish_reason"] or reason
        self.answers += 1
        if (tokens, reason) != (self.num_tokens, "length"):
            self.wrong.append(f"{tokens} tokens, {reason}")


class Beside:
    """What goes on beside the fuzz: a stream, and a task that measures how long the event loop stands still."""

    def __init__(self, live: LiveServer):
        self.reader, self.stall, self._loop = Reader(live), 0.0, live.service.engine._loop
        self._end = threading.Event()

    async def _look(self) -> None:
        while not self._end.is_set():
            before = time.monotonic()
            await asyncio.sleep(0.005)
            self.stall = max(self.stall, time.monotonic() - before - 0.005)

    def __enter__(self) -> Beside:
        self.reader.start()
        self._looking = asyncio.run_coroutine_threadsafe(self._look(), self._loop)
        return self

    def __exit__(self, *_: Any) -> None:
        self.reader.stopping.set()
        self.reader.join(60)
        self._end.set()
        self._looking.result(10)


def check_refusal(answer: httpx.Response, path: str, why: str) -> None:
    """A short error in the shape of the path's API."""
    assert 400 <= answer.status_code < 500, f"{path}, {why}: {answer.status_code} {answer.text:.500}"
    body = answer.json()
    error = body["error"]
    if path.startswith("/v1/messages"):
        assert body["type"] == "error" and error.keys() == {"type", "message"}, body
    else:
        assert error.keys() == {"message", "type", "param", "code"} and error["code"] == answer.status_code, body
    assert 0 < len(error["message"]) < 2000 and len(answer.content) < 10_000, f"{path}, {why}: {len(answer.content)} bytes"


def check_all_is_well(live: LiveServer, tasks: int) -> None:
    """Nothing is left of what was asked, and what is right is answered."""
    with httpx.Client(base_url=live.base_url, timeout=60) as client:
        for path in paths():
            answer = client.post(path, json=PATHS[path])
            status = (400, 403, 404) if path.endswith("lora_adapter") else (200,)  # this server has none
            assert answer.status_code in status, f"{path}: {answer.text:.500}"
    live.check()
    pool = live.service.engine.engine.state.pool
    wait_until(lambda: pool.num_held == 0, "all pages are free")
    wait_until(lambda: num_tasks(live) <= tasks, lambda: f"{num_tasks(live)} tasks are left, there were {tasks}")


def num_tasks(live: LiveServer) -> int:
    async def count() -> int:
        return len(asyncio.all_tasks())

    return asyncio.run_coroutine_threadsafe(count(), live.service.engine._loop).result(10)


def paths() -> list[str]:
    found = methods(create_app(scripted_service("")).routes)
    return [path for method, path in found if method == "POST" and path not in NO_BODY]


def test_every_endpoint_with_a_body_is_tried():
    assert set(paths()) <= PATHS.keys()


def run_fuzz(count: int) -> None:
    fuzz, seen = Fuzz(SEED, paths()), Counter[int]()
    with serve(fuzzed()) as live:
        tasks = num_tasks(live)
        with Beside(live) as beside, httpx.Client(base_url=live.base_url, timeout=60) as client:
            for _ in range(count):
                path, body, kind, why = fuzz.request()
                answer = client.post(path, content=body, headers={"content-type": kind})
                check_refusal(answer, path, why)
                seen[answer.status_code] += 1
        print(f"{count} bodies, {dict(seen)}: gap {beside.reader.gap:.3f} s, stall {beside.stall:.3f} s, "
              f"{beside.reader.answers} answers beside them")  # fmt: skip
        assert beside.reader.answers and not beside.reader.wrong
        assert beside.reader.gap < STALL and beside.stall < STALL
        check_all_is_well(live, tasks)


def test_wrong_bodies_are_refused():
    run_fuzz(200)


@pytest.mark.slow
def test_two_thousand_wrong_bodies_are_refused():
    run_fuzz(2000)


@pytest.mark.parametrize("calls", CALLS, ids=lambda calls: repr(calls)[:30])
def test_wrong_tool_calls_are_refused(server, calls):
    messages = [MESSAGE, {"role": "assistant", "content": "", "tool_calls": calls}, MESSAGE]
    answer = httpx.post(f"{server.base_url}/v1/chat/completions", json={"messages": messages})
    check_refusal(answer, "/v1/chat/completions", repr(calls)[:100])


def test_an_error_does_not_repeat_a_body(server):
    tools = [{"type": "function", "function": {"name": "f" * 100_000}}]
    choice = {"type": "function", "function": {"name": "g" * 100_000}}
    answer = httpx.post(
        f"{server.base_url}/v1/chat/completions", json={"messages": [MESSAGE], "tools": tools, "tool_choice": choice}
    )
    check_refusal(answer, "/v1/chat/completions", "names of 100,000 characters")
    assert "tool_choice names" in answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with serve(fuzzed(0.0)) as live:
        yield live


@pytest.mark.slow
def test_bodies_of_ten_megabytes_do_not_hold_up_others():
    worst: list[tuple[float, str]] = []
    with serve(fuzzed()) as live:
        tasks = num_tasks(live)
        with httpx.Client(base_url=live.base_url, timeout=120) as client:
            for path, body, why in long_bodies():
                with Beside(live) as beside:
                    check_refusal(client.post(path, content=body, headers={"content-type": "application/json"}), path, why)
                worst.append((beside.stall, f"{path}, {why}: stall {beside.stall:.3f} s, gap {beside.reader.gap:.3f} s"))
                assert beside.reader.answers and not beside.reader.wrong
                assert beside.stall < STALL and beside.reader.gap < STALL, why
        print("\n".join(line for _, line in sorted(worst, reverse=True)))
        check_all_is_well(live, tasks)


# -- bodies that come badly --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def connected(
    live: LiveServer, *headers: str, path: str = "/v1/completions"
) -> Iterator[tuple[socket.socket, Callable[[], bytes]]]:
    """A connection that has sent the head of a request, and what reads the answer until the server closes."""
    host, _, port = live.base_url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        head = (f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", "connection: close", *headers)
        sock.sendall("\r\n".join(head).encode() + b"\r\n\r\n")
        yield sock, lambda: b"".join(iter(lambda: sock.recv(65536), b""))


def test_a_body_that_comes_byte_by_byte_is_read(server):
    body = b'{"prompt": "hi", "max_tokens": 3}'
    with connected(server, f"content-length: {len(body)}") as (sock, read):
        for i in range(len(body)):
            sock.sendall(body[i : i + 1])
            time.sleep(0.002)
        assert read().startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("length", ["content-length: 1000", "transfer-encoding: chunked"])
def test_a_client_that_leaves_within_its_body_leaves_nothing(server, length):
    tasks = num_tasks(server)
    left = lambda: server.service.metrics.http._requests["POST", "4xx", "/v1/completions"]
    before = left()
    for _ in range(20):
        with connected(server, length) as (sock, _):
            sock.sendall(b'10\r\n{"prompt": "hi"' if "chunked" in length else b'{"prompt": "hi"')
    wait_until(lambda: left() == before + 20, lambda: f"they count as 499: {left() - before}")
    check_all_is_well(server, tasks)


def test_a_chunked_body_beyond_the_limit_is_refused_early():
    with serve(scripted_service("Hello", max_body_size=10_000)) as live:
        with connected(live, "transfer-encoding: chunked") as (sock, read):
            for _ in range(12):
                sock.sendall(b"3e8\r\n" + b"a" * 1000 + b"\r\n")
            answer = read()  # the body has no end yet
        assert answer.startswith(b"HTTP/1.1 413") and b"RequestTooLargeError" in answer
        with connected(live, "content-length: 10001") as (_, read):
            assert read().startswith(b"HTTP/1.1 413")
        body = json.dumps({"prompt": "hi", "x": "a" * 9000}).encode()
        assert httpx.post(
            f"{live.base_url}/v1/completions", content=body, headers={"content-type": "application/json"}
        ).is_success
