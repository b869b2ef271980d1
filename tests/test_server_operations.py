"""What those who run a server rely on: keys, CORS, limits, and that failures, hangs and clients that leave harm nobody else."""

import asyncio
import contextlib
import gc
import json
import random
import re
import socket
import threading
from collections.abc import Iterator

import anthropic
import httpx
import openai
import pytest
from live_server import LiveServer, serve, wait_until
from scripted import scripted_engine, scripted_service
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from jaxpaged.async_engine import AsyncEngine
from jaxpaged_server.http_metrics import Exchange
from jaxpaged_server.options import ServerOptions
from jaxpaged_server.service import Service

LONG = "the fox and the dog. " * 120
LIMITS = {"max_num_seqs": 1, "max_model_len": 2048}


def limited_service(reply, *, seconds: float = 0.0, limits: dict | None = None, **options) -> Service:
    """`scripted_service`, with limits of the scheduler."""
    engine = scripted_engine(reply, seconds=seconds, **(limits or {}))
    return Service(AsyncEngine(engine), ServerOptions(**options), ["scripted"])


def http_of(live: LiveServer, **options) -> httpx.Client:
    return httpx.Client(base_url=live.base_url, timeout=30, **options)


def post(http: httpx.Client, **body) -> httpx.Response:
    return http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1000, **body})


def events(reply: httpx.Response) -> list[dict]:
    """The events of a stream, which ends as OpenAI's do."""
    *data, done = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert done == "[DONE]"
    return [json.loads(one) for one in data]


def metric(http: httpx.Client, name: str) -> float:
    """The sum of a metric over its labels."""
    found = re.findall(rf"^jaxpaged:{name}(?:{{.*}})? (\S+)$", http.get("/metrics").text, re.MULTILINE)
    assert found, f"there is no metric {name}"
    return sum(map(float, found))


def pages_held(live: LiveServer) -> int:
    return live.service.engine.engine.state.pool.num_held


def num_dispatched(live: LiveServer) -> int:
    return live.service.engine.engine.counters.steps


# -- who may come in -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked():
    with serve(scripted_service("Hello", api_key=("k1", "k2"), allowed_origins=("https://a.example",))) as live:
        yield live


@pytest.mark.parametrize("headers, status", [
    ({}, 401), ({"authorization": "Bearer k3"}, 401), ({"authorization": "k1"}, 401),
    ({"authorization": "Basic k1"}, 401), ({"x-api-key": "k"}, 401),
    ({"authorization": "Bearer k1"}, 200), ({"authorization": "bearer k2"}, 200), ({"x-api-key": "k2"}, 200),
])  # fmt: skip
def test_a_key_is_needed(locked, headers, status):
    with http_of(locked, headers=headers) as http:
        assert http.get("/v1/models").status_code == http.get("/load").status_code == status
        reply = http.post("/v1/completions", json={"prompt": "x"})
        assert reply.status_code == status
        assert status == 200 or reply.json()["error"]["type"] == "AuthenticationError"


def test_the_clients_say_that_the_key_is_wrong(locked):
    with openai.OpenAI(base_url=f"{locked.base_url}/v1", api_key="k3", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
    with anthropic.Anthropic(base_url=locked.base_url, api_key="k3", max_retries=0) as client:
        with pytest.raises(anthropic.AuthenticationError) as caught:
            client.messages.create(model="scripted", max_tokens=5, messages=[{"role": "user", "content": "x"}])
    assert caught.value.body["error"]["type"] == "authentication_error"


def test_some_paths_are_open_to_all(locked):
    with http_of(locked) as http:
        for path in ("/", "/health", "/metrics", "/version"):
            assert http.get(path).status_code == 200
        assert http.options("/v1/models").status_code == 405  # a question about the path, not a request
        for path in ("/healthz", "/metrics/", "/live", "/nowhere"):
            assert http.get(path).status_code == 401


def test_pages_of_allowed_origins_may_call(locked):
    asks = {
        "origin": "https://a.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    with http_of(locked) as http:
        preflight = http.options("/v1/completions", headers=asks)  # a browser sends no key with it
        assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == "https://a.example"
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        assert (
            "access-control-allow-origin"
            not in http.options("/v1/completions", headers={**asks, "origin": "https://b.example"}).headers
        )
        refused = http.get("/v1/models", headers={"origin": "https://a.example"})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://a.example"


def test_no_page_may_call_unless_told():
    with serve(scripted_service("Hello")) as live, http_of(live, headers={"origin": "https://a.example"}) as http:
        reply = post(http)
        assert reply.status_code == 200 and not [name for name in reply.headers if name.startswith("access-control")]
        assert http.options("/v1/completions", headers={"access-control-request-method": "POST"}).status_code == 405


# -- ids -------------------------------------------------------------------------------------------------------------------


def test_a_request_keeps_the_id_that_it_came_with():
    with serve(scripted_service("Hello", enable_request_id_headers=True)) as live, http_of(live) as http:
        reply = http.post("/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "mine"})
        assert reply.json()["id"] == "cmpl-mine" and reply.headers["x-request-id"] == "mine"
        assert post(http, request_id="body's").json()["id"] == "cmpl-body's"
        first, second = post(http), post(http)
        assert first.json()["id"] == f"cmpl-{first.headers['x-request-id']}" != second.json()["id"]
        assert http.get("/nowhere").headers["x-request-id"]
        assert http.post("/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "m" * 129}).status_code == 400


def test_ids_stay_inside_unless_told():
    with serve(scripted_service("Hello")) as live, http_of(live) as http:
        reply = http.post("/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "mine"})
        assert reply.json()["id"] == "cmpl-mine" and "x-request-id" not in reply.headers


def test_the_same_id_twice_at_once():
    with serve(limited_service(LONG, seconds=0.001)) as live, http_of(live) as http:
        with streaming(http, request_id="a"):
            assert post(http, request_id="a", max_tokens=3).status_code == 200


# -- limits ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def streaming(http: httpx.Client, **body) -> Iterator[Iterator[str]]:
    """The lines of a stream that has begun."""
    with http.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True, "max_tokens": 1000, **body}) as reply:
        lines = reply.iter_lines()
        next(lines)
        yield (line for line in lines if line)


def test_a_full_queue_is_said_with_503():
    service = limited_service(LONG, seconds=0.005, limits=LIMITS, max_num_queued_reqs=1)
    with serve(service) as live, http_of(live) as http, http_of(live) as other:
        with streaming(http):
            thread = threading.Thread(target=post, args=(other,), kwargs={"max_tokens": 1})
            thread.start()
            with http_of(live) as third:
                wait_until(lambda: metric(third, "num_requests_waiting") == 1, "one request waits")
                reply = post(third)
                assert reply.status_code == 503 and int(reply.headers["retry-after"]) >= 1
                assert reply.json()["error"]["type"] == "ServiceUnavailableError" and "max_num_queued_reqs" in reply.text
                assert third.get("/load").json() == {"server_load": 2}
        thread.join()
        assert post(other, max_tokens=1).status_code == 200


def test_of_a_request_with_too_many_prompts_nothing_runs():
    service = limited_service(LONG, seconds=0.05, limits=LIMITS, max_num_queued_reqs=3, max_num_prompts=9)
    with serve(service) as live, http_of(live) as http:
        assert post(http, prompt=["x"] * 9).status_code == 503
        wait_until(lambda: not service.engine.streams and pages_held(live) == 0, "the first ones are aborted")
        assert post(http, prompt=["x"] * 10).json()["error"]["param"] == "prompt"
        assert post(http, max_tokens=2).status_code == 200


def test_running_requests_can_be_aborted_by_id():
    with serve(limited_service(LONG, seconds=0.005)) as live, http_of(live) as http, http_of(live) as operator:
        with streaming(http, request_id="a") as lines:
            assert operator.post("/abort_requests", json={"request_ids": ["cmpl-b"]}).json() == {"aborted": 0}
            assert operator.post("/abort_requests", json={"request_ids": ["cmpl-a"]}).json() == {"aborted": 1}
            *_, last, done = lines
        assert done == "data: [DONE]" and json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "abort"
        assert post(operator, max_tokens=2).status_code == 200


def test_the_prefix_cache_can_be_forgotten():
    with serve(scripted_service("Hello", enable_prompt_tokens_details=True)) as live, http_of(live) as http:
        cached = lambda: post(http, prompt=[7] * 100, max_tokens=1).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert (cached(), cached()) == (0, 99)  # all but the last, which has to be computed
        assert http.post("/reset_prefix_cache").status_code == 200
        assert cached() == 0


# -- failures --------------------------------------------------------------------------------------------------------------


def fragile(prompt: str) -> str:
    if "boom" in prompt:
        raise RuntimeError("out of paper")
    return LONG


def test_a_step_that_fails_takes_only_its_own_requests_down():
    with serve(limited_service(fragile, seconds=0.002)) as live, http_of(live) as http:
        whole = post(http, prompt="boom")
        assert whole.status_code == 500 and "out of paper" in whole.json()["error"]["message"]
        with http.stream("POST", "/v1/completions", json={"prompt": "boom", "stream": True}) as reply:
            assert reply.status_code == 200
            (error,) = events(reply)
        assert error["error"]["code"] == 500 and "out of paper" in error["error"]["message"]
        assert http.get("/health").status_code == 200 and pages_held(live) == 0
        assert post(http, max_tokens=3).json()["choices"][0]["finish_reason"] == "length"


def test_the_end_of_the_engine_is_told_to_all():
    def dies(prompt: str) -> str:
        if "die" in prompt:
            raise SystemExit("no more paper")
        return LONG

    with serve(limited_service(dies, seconds=0.01)) as live, http_of(live) as http, http_of(live) as other:
        live.service.engine.on_death = lambda error: None  # the process would end; test_serve_command.py sees that
        with streaming(http) as lines:
            dead = post(other, prompt="die")
            *_, error, done = lines
        assert dead.status_code == 500 and "no more paper" in dead.json()["error"]["message"]
        assert done == "data: [DONE]" and "no more paper" in error
        health = http.get("/health")
        assert health.status_code == 503 and "no more paper" in health.json()["cause"]
        assert post(http).status_code == 500


def test_a_step_that_hangs_is_told_and_forgiven(capfd, caplog):
    let_go = threading.Event()

    def hangs(prompt: str) -> str:
        if "hang" in prompt:
            let_go.wait(30)
        return "Hello"

    stacks: list[str] = []

    def told() -> str:
        stacks.append(capfd.readouterr().err)
        return "".join(stacks)

    with serve(scripted_service(hangs, watchdog_timeout=0.2)) as live, http_of(live) as http:
        thread = threading.Thread(target=post, args=(http,), kwargs={"prompt": "hang"})
        thread.start()
        try:
            with http_of(live) as other:
                wait_until(lambda: other.get("/health").status_code == 503, "the hang is noticed")
                assert "a step has been running" in other.get("/health").json()["cause"]
                wait_until(lambda: "in hangs" in told(), "the stacks are on standard error")
                assert other.get("/metrics").status_code == 200
        finally:
            let_go.set()
            thread.join()
        assert http.get("/health").status_code == 200 and post(http).json()["choices"][0]["text"] == "Hello"
    assert any("it hangs. State of the scheduler" in record.getMessage() for record in caplog.records)


# -- clients that leave ----------------------------------------------------------------------------------------------------


def connect(live: LiveServer, body: dict, path: str = "/v1/completions", **options) -> socket.socket:
    """A connection over which a request has been sent, and nothing read."""
    client = socket.socket()
    for option, value in options.items():
        client.setsockopt(socket.SOL_SOCKET, getattr(socket, option), value)
    client.connect(("127.0.0.1", int(live.base_url.rpartition(":")[2])))
    client.sendall(request_bytes(body, path))
    return client


def request_bytes(body: dict, path: str = "/v1/completions") -> bytes:
    data = json.dumps(body).encode()
    return b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        path.encode(), len(data), data)  # fmt: skip


@pytest.mark.parametrize("more", [{"stream": True}, {}, {"n": 4, "temperature": 1}, {"prompt": ["x", "y"]},
                                  {"prompt": ["x", "y"], "stream": True}], ids=str)  # fmt: skip
def test_a_client_that_leaves_ends_its_request_within_two_steps(more):
    with serve(limited_service(LONG, seconds=0.1)) as live, http_of(live) as http:
        client = connect(live, {"prompt": "x", "max_tokens": 1000, **more})
        wait_until(lambda: num_dispatched(live) >= 3, "it runs")
        client.close()
        at = num_dispatched(live)
        wait_until(lambda: not live.service.engine.streams, "it ends")
        assert num_dispatched(live) - at <= 3  # one may have begun just now
        assert pages_held(live) == 0 and metric(http, "num_requests_running") == 0


def test_a_client_that_leaves_the_queue_gives_its_place_back():
    service = limited_service(LONG, seconds=0.01, limits=LIMITS)
    with serve(service) as live, http_of(live) as http:
        with streaming(http), http_of(live) as other:
            client = connect(live, {"prompt": "y", "max_tokens": 1000})
            wait_until(lambda: metric(other, "num_requests_waiting") == 1, "it waits")
            client.close()
            wait_until(lambda: metric(other, "num_requests_waiting") == 0, "it waits no more")
            assert metric(other, "num_requests_running") == len(service.engine.streams) == 1


def test_a_client_that_leaves_while_it_still_sends():
    with serve(scripted_service("Hello")) as live, http_of(live) as http:
        for sent in (20, 110, 130):
            client = socket.create_connection(("127.0.0.1", int(live.base_url.rpartition(":")[2])))
            client.sendall(request_bytes({"prompt": "x" * 500})[:sent])
            client.close()
        assert post(http).status_code == 200
        assert "caused an exception" not in http.get("/metrics").text


def test_a_client_that_stops_reading_is_dropped_and_holds_up_nobody(caplog):
    service = limited_service(LONG, seconds=0.001, limits={"max_num_seqs": 16}, slow_client_timeout=2)
    big = {"prompt": "x", "stream": True, "max_tokens": 2000, "ignore_eos": True, "logprobs": 20, "n": 8}
    with serve(service) as live, http_of(live) as http:
        live._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)  # connections inherit it: soon nothing more fits
        slow = connect(live, big, SO_RCVBUF=4096)
        wait_until(lambda: metric(http, "num_requests_running") == 8, "it runs")
        for _ in range(3):
            assert post(http, max_tokens=20).status_code == 200
            assert service.engine.streams, "the others wait for the slow one"
        wait_until(lambda: not service.engine.streams, "the slow one is dropped")
        assert pages_held(live) == 0
        assert any("has not read for 2" in record.getMessage() for record in caplog.records)
        slow.settimeout(5)
        assert b"[DONE]" not in b"".join(iter(lambda: slow.recv(1 << 20), b""))  # it ends in the middle
        slow.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_connection_that_has_ended_needs_no_garbage_collector(stream):
    """Garbage of thousands of connections, in the oldest generation, looks like a leak."""
    with serve(limited_service(LONG)) as live:
        gc.collect()
        gc.disable()
        try:
            for _ in range(8):
                assert httpx.post(f"{live.base_url}/v1/completions", json={"prompt": "x", "stream": stream}).status_code == 200
            kept = lambda: sum(type(one) in (RequestResponseCycle, Exchange) for one in gc.get_objects())
            wait_until(lambda: kept() <= 2, lambda: f"{kept()} objects of connections are kept")
        finally:
            gc.enable()


CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1000}
STREAMS = {
    "/v1/completions": {"prompt": "x", "max_tokens": 1000},
    "/v1/chat/completions": CHAT,
    "/v1/messages": CHAT,
    "/v1/responses": {"input": "x"},
    "/inference/v1/generate": {"token_ids": [5], "sampling_params": {"max_tokens": 1000}},
}


def test_every_stream_keeps_to_the_server_s_interval():
    def num_events(live: LiveServer, path: str) -> int:
        reply = httpx.post(f"{live.base_url}{path}", json={**STREAMS[path], "stream": True}, timeout=30)
        assert reply.status_code == 200, reply.text
        return sum(line.startswith("data: {") for line in reply.iter_lines())

    with serve(limited_service("abcd " * 40)) as one, serve(limited_service("abcd " * 40, stream_interval=40)) as many:
        for path in STREAMS:
            assert num_events(many, path) < num_events(one, path) / 3, path


def test_what_is_generated_is_logged_streamed_or_not(caplog):
    caplog.set_level("INFO", "jaxpaged_server")
    with serve(limited_service("Hello there!", enable_log_outputs=True, max_log_len=7)) as live:
        for path, body in STREAMS.items():
            for stream in (True, False):
                mode = {"output_mode": "text"} if "generate" in path else {}
                caplog.clear()
                assert httpx.post(f"{live.base_url}{path}", json={**body, **mode, "stream": stream}).status_code == 200
                (line,) = [record.getMessage() for record in caplog.records if "finished" in record.getMessage()]
                assert line.endswith("(stop): 'Hello t'"), path
    with serve(limited_service("Hello there!")) as live:
        caplog.clear()
        httpx.post(f"{live.base_url}/v1/completions", json=STREAMS["/v1/completions"])
        assert "Hello" not in caplog.text


async def visit(live: LiveServer, chance: random.Random) -> None:
    """One client: it connects, perhaps asks, perhaps reads, and leaves when it likes, politely or not."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(live.base_url.rpartition(":")[2]))
    kind = chance.choice([{"stream": True}, {}, {"n": 3, "temperature": 1}, {"prompt": ["a", "b"], "stream": True}])
    data = request_bytes({"prompt": "x", "max_tokens": chance.choice([1, 20, 1000]), **kind})
    writer.write(data if chance.random() < 0.9 else data[: chance.randrange(len(data))])
    try:
        async with asyncio.timeout(chance.random() * 0.2):
            while await reader.read(4096):
                pass
    except TimeoutError:
        pass
    if chance.random() < 0.5:
        writer.transport.abort()
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@pytest.mark.slow
def test_a_thousand_clients_that_come_and_go(monkeypatch):
    async def crowd(live: LiveServer) -> None:
        room, chance = asyncio.Semaphore(60), random.Random(0)

        async def one() -> None:
            async with room:
                await visit(live, chance)

        await asyncio.gather(*(one() for _ in range(1000)))

    service = limited_service(LONG, seconds=0.02, limits={"max_num_seqs": 16})
    with serve(service) as live, http_of(live) as http:
        aborts, abort = [], service.engine.abort
        monkeypatch.setattr(service.engine, "abort", lambda own: aborts.append(num_dispatched(live)) or abort(own))
        asyncio.run(crowd(live))
        assert http.get("/health").status_code == 200  # on a new connection: by now it has met all the others
        wait_until(lambda: not service.engine.streams, "all requests end")
        assert len(aborts) > 100 and num_dispatched(live) - aborts[-1] <= 2
        assert metric(http, "num_requests_running") == metric(http, "num_requests_waiting") == 0
        assert pages_held(live) == 0 and http.get("/load").json() == {"server_load": 0}
        assert post(http, max_tokens=5).json()["usage"]["completion_tokens"] == 5
