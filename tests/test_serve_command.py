"""`jaxpaged serve` as a command: its flags, its sockets, its ends."""

import contextlib
import json
import logging
import signal
import socket
import ssl
import sys
import threading
import time

import httpx
import openai
import pytest
import trustme
from live_server import wait_until
from server_process import TINY, jaxpaged, running, scripted, tiny_model

from jaxpaged import build_replicas, cli, cli_serve
from jaxpaged.request import RequestError
from jaxpaged_server import run
from jaxpaged_server.options import ServerOptions

LONG = "the fox and the dog. " * 100


@pytest.fixture(autouse=True)
def logs_as_before():
    """The command sends the process's logs where the test's output goes, which ends with the test."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture
def serve(monkeypatch, capsys):
    """Runs `jaxpaged serve FLAGS` up to where it would start: (status, standard error, engine's config, server's options,
    notes)."""

    def call(*flags: str):
        started = []
        monkeypatch.setattr(cli_serve, "run", lambda *given: started.append(given) or 0)
        monkeypatch.setattr(sys, "argv", ["jaxpaged", "serve", *flags])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), capsys.readouterr().err, *(started[0][:3] if started else (None, None, None))

    return call


# -- flags -----------------------------------------------------------------------------------------------------------------


def test_vllms_flags_are_taken(serve):
    status, _, config, options, notes = serve(
        "demo", "--enforce-eager", "--swap-space", "4", "--disable-log-requests", "--served-model-name", "a", "b",
        "--api-key", "k1", "k2", "--max-model-len", "4k", "--gpu-memory-utilization", "0.5", "--tensor-parallel-size", "1",
        "--enable-prefix-caching", "--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--kv-cache-dtype", "auto",
        "--allowed-origins", "https://a.example", "--override-generation-config", '{"temperature": 0.5}',
    )  # fmt: skip
    assert status == 0
    assert (config.model, config.enforce_eager, config.max_model_len, config.gpu_memory_utilization) == (
        "demo",
        True,
        4000,
        0.5,
    )
    assert options.served_model_name == ("a", "b") and options.api_key == ("k1", "k2")
    assert options.allowed_origins == ("https://a.example",) and options.tool_call_parser == "hermes"
    assert options.generation_defaults == {"temperature": 0.5}
    noted = " ".join(notes)
    assert "--swap-space" in noted and "--disable-log-requests" in noted and "--enforce-eager" not in noted


def test_a_file_has_flags_too(serve, tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("model: demo\nport: 9000\nserved-model-name: [a, b]\nenforce_eager: true\nmax_num_seqs: 7\n")
    _, _, config, options, _ = serve("--config", str(file), "--port", "9001")
    assert (config.model, config.enforce_eager, config.max_num_seqs) == ("demo", True, 7)
    assert (options.port, options.served_model_name) == (9001, ("a", "b"))  # the command line wins


def test_the_key_may_come_from_the_environment(serve, monkeypatch):
    monkeypatch.setenv("JAXPAGED_API_KEY", "secret")
    assert serve()[3].api_key == ("secret",)
    assert serve("--api-key", "other")[3].api_key == ("other",)


@pytest.mark.parametrize("flags, said", [
    (("--max-model-length", "5"), "--max-model-len"),
    (("--swap-space", "16"), "swap_space='16' is not supported"),
    (("--quantization", "bitsandbytes"), "quantization"),
    (("--max-loras", "0"), "max_loras must be a positive integer"),
    (("--tensor-parallel-size", "0"), "tensor_parallel_size must be a positive integer"),
    (("--trust-remote-code",), "trust_remote_code"),
    (("--port", "99999"), "port must be in 0..65535"),
    (("--port", "http"), "port"),
    (("--tool-call-parser", "hermess"), "Did you mean hermes?"),
    (("--ssl-keyfile", "/nowhere/key"), "ssl_keyfile"),
    (("--root-path", "x"), "root_path"),
    (("--api-key", ""), "api_key"),
    (("--watchdog-timeout", "-1"), "watchdog_timeout"),
    (("--override-generation-config", "{"), "--override-generation-config must be a JSON object"),
    (("--override-generation-config", '{"temprature": 1}'), "temprature"),
    (("--config", "/nowhere.yaml"), "/nowhere.yaml"),
    (("demo", "--model", "other"), "give the model once"),
    (("demo", "other"), "other"),
])  # fmt: skip
def test_wrong_flags_are_said_at_once(serve, flags, said):
    status, err, config, *_ = serve(*flags)
    assert status == 2 and said in err and config is None and "Traceback" not in err


def test_a_port_in_use_is_said_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(build_replicas, "build_replicas", lambda *_, **__: pytest.fail("a model is loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(sys, "argv", ["jaxpaged", "serve", "--port", str(taken.getsockname()[1])])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: cannot listen on 127.0.0.1:") and "--port" in line


# -- a whole server --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_whole_server_with_vllms_flags(tmp_path):
    (tmp_path / "serve.yaml").write_text("served_model_name: [a, b]\n")
    flags = (
        "--swap-space",
        "4",
        "--disable-log-requests",
        "--api-key",
        "k1",
        "k2",
        "--enable-log-requests",
        "--log-format",
        "json",
    )
    command = jaxpaged("serve", str(tiny_model(tmp_path)), *TINY, *flags, "--config", str(tmp_path / "serve.yaml"))
    with running(command) as server:
        with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="k2", max_retries=0) as client:
            assert [card.id for card in client.models.list()] == ["a", "b"]
            chat = client.chat.completions.create(model="b", messages=[{"role": "user", "content": "x"}], max_tokens=7)
            assert chat.model == "b" and chat.usage.completion_tokens <= 7
        assert httpx.get(f"{server.base_url}/v1/models").status_code == 401
        server.signal(signal.SIGTERM)
        server.wait()
    entries = [json.loads(line) for line in server.log.splitlines()]
    assert all({"time", "level", "logger", "message"} <= entry.keys() for entry in entries)
    notes = [entry["message"] for entry in entries if "means nothing here" in entry["message"]]
    assert ["--swap-space" in note or "--disable-log-requests" in note for note in notes] == [True, True]
    assert "received chatcmpl-" in server.log


# -- sockets ---------------------------------------------------------------------------------------------------------------


def test_behind_a_proxy_that_strips_a_path():
    with running(scripted("Hello", root_path="/llm", api_key=["k"])) as server:
        at = server.base_url.removesuffix("/llm")
        assert server.base_url.endswith("/llm")
        assert httpx.get(f"{at}/health").status_code == 200 and httpx.get(f"{at}/v1/models").status_code == 401
        assert httpx.get(f"{at}/v1/models", headers={"x-api-key": "k"}).status_code == 200
        wrong = httpx.post(f"{at}/v1/messages", json={}, headers={"x-api-key": "k"})
        assert wrong.json()["type"] == "error"  # by its path below the root: Anthropic's shape


def test_on_a_unix_socket(tmp_path):
    path = str(tmp_path / "server.sock")
    for _ in range(2):  # whatever the first one leaves behind
        with running(scripted("Hello", uds=path)) as server:
            with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://server") as http:
                assert http.post("/v1/completions", json={"prompt": "x"}).json()["choices"][0]["text"] == "Hello"
            with pytest.raises(RequestError, match="it is in use"):
                run.listen(ServerOptions(uds=path))
            assert f"unix:{path}" in server.log
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RequestError, match="no socket"):
        run.listen(ServerOptions(uds=str(tmp_path / "file")))
    assert (tmp_path / "file").read_text() == "mine"


def test_over_tls(tmp_path):
    authority, stranger = trustme.CA(), trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    for name, part in {"key": certificate.private_key_pem, "cert": certificate.cert_chain_pems[0], "ca": authority.cert_pem,
                       "other": stranger.cert_pem}.items():  # fmt: skip
        part.write_to_path(tmp_path / name)
    trusting = lambda name: ssl.create_default_context(cafile=tmp_path / name)
    with running(scripted("Hello", ssl_keyfile=str(tmp_path / "key"), ssl_certfile=str(tmp_path / "cert"))) as server:
        assert server.base_url.startswith("https://")
        assert httpx.get(f"{server.base_url}/health", verify=trusting("ca")).status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.base_url}/health", verify=trusting("other"))
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{server.base_url}/health".replace("https", "http"))


# -- the end ---------------------------------------------------------------------------------------------------------------


class Stream:
    """A stream that somebody reads in a thread: its finish reasons, and whether it ended as it should."""

    def __init__(self, base_url: str):
        self.reasons: list[str] = []
        self.whole = False
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(base_url,))
        self._thread.start()
        assert self._begun.wait(10)

    def _read(self, base_url: str) -> None:
        body = {"prompt": "x", "stream": True, "max_tokens": 60}
        ask = httpx.stream("POST", f"{base_url}/v1/completions", json=body, timeout=30)
        with contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError), ask as reply:
            for line in reply.iter_lines():
                self._begun.set()
                self.whole = self.whole or line == "data: [DONE]"
                if line.startswith("data: {"):
                    self.reasons.append(json.loads(line[6:])["choices"][0]["finish_reason"])

    def join(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.mark.parametrize("timeout, reason", [(30, "length"), (0.3, "abort"), (0, "abort")])
def test_running_requests_get_their_time_after_sigterm(timeout, reason):
    with running(scripted(LONG, seconds=0.03, shutdown_timeout=timeout)) as server:
        stream = Stream(server.base_url)
        server.signal(signal.SIGTERM)
        if timeout == 30:  # there is time to ask
            more = lambda: httpx.post(f"{server.base_url}/v1/completions", json={"prompt": "x"})
            wait_until(lambda: more().status_code == 503, "no more requests are taken")
        stream.join()
        assert server.wait() in (0, -signal.SIGTERM)
    assert stream.whole and stream.reasons[-1] == reason


def test_a_second_signal_ends_at_once():
    with running(scripted(LONG, seconds=0.5, shutdown_timeout=600)) as server:
        stream = Stream(server.base_url)
        server.signal(signal.SIGINT)
        time.sleep(0.3)
        assert server.process.poll() is None and not stream.whole  # it waits for the stream
        server.signal(signal.SIGINT)
        server.wait()
        stream.join()
    assert not stream.whole


def test_a_server_whose_engine_has_died_ends_with_status_1():
    with running(scripted("die")) as server:
        reply = httpx.post(f"{server.base_url}/v1/completions", json={"prompt": "x"})
        assert reply.status_code == 500 and "the engine's thread ends" in reply.json()["error"]["message"]
        assert server.wait() == 1
    assert "Traceback" in server.log
