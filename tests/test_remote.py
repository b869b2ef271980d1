"""`chat` and `complete` against a small server, as a user meets them, and what the client makes of servers' habits."""

import io
import sys
import time

import pytest
from fake_openai import run_cli

from jaxpaged import chat, remote
from jaxpaged.remote import RemoteConversation, Server
from jaxpaged.request import RequestError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def call(monkeypatch, capsys, *arguments: str, stdin: io.StringIO | None = None) -> tuple[int, str, str]:
    """Status, standard output, standard error of `jaxpaged arguments`."""
    monkeypatch.setattr(sys, "stdin", stdin or Terminal())
    return run_cli(monkeypatch, capsys, *arguments)


@pytest.fixture
def server(url):
    with Server(url) as server:
        yield server


def talk(server: Server) -> tuple[RemoteConversation, list[str]]:
    lines: list[str] = []
    return RemoteConversation(server, {}, write=lines.append), lines


# -- chat --------------------------------------------------------------------------------------------------------------


def test_a_message_is_answered_with_the_parameters_given(fake, url, monkeypatch, capsys):
    fake.words = ["Paris", ", of", " course"]
    status, out, _ = call(monkeypatch, capsys, "chat", "--url", url, "-q", "Capital of France?", "--system-prompt", "be brief",
                          "--temperature", "0", "--max-tokens", "7", "--stop", "x", "--api-key", "sesame")  # fmt: skip
    assert status == 0 and out.startswith("Paris, of course\n")
    assert "[5 tokens of prompt, 2 of them cached; 3 new in" in out
    (body,) = fake.bodies
    assert body["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Capital of France?"}]
    assert (body["temperature"], body["max_tokens"], body["stop"]) == (0, 7, ["x"])
    assert body["model"] == "fake/model-1" and fake.headers[0]["authorization"] == "Bearer sesame"


def test_without_stats_the_answer_is_all(fake, url, monkeypatch, capsys):
    fake.words = ["Yes"]
    _, out, _ = call(monkeypatch, capsys, "chat", "--url", f"{url}/v1/", "--no-stats", "-q", "?", "--model-name", "other")
    assert out == "Yes\n" and fake.bodies[0]["model"] == "other"
    assert set(fake.bodies[0]) == {"model", "stream", "stream_options", "messages"}, "the rest is the server's"


def test_the_repl_keeps_turns_and_takes_commands(fake, url, monkeypatch, capsys):
    said = iter(["one", "two", "/undo", "three", "/reset", "four", "/quit", "never"])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    status, out, _ = call(monkeypatch, capsys, "chat", "--url", url, "--max-tokens", "2")
    asked = [[m["content"] for m in body["messages"]] for body in fake.bodies]
    assert status == 0 and next(said) == "never" and chat.HELP in out
    assert asked == [["one"], ["one", " w0 w1", "two"], ["one", " w0 w1", "three"], ["four"]]


def test_the_answer_streams(fake, server):
    fake.delay, times = 0.05, []
    conversation = RemoteConversation(server, {"max_tokens": 4}, write=lambda text: times.append(time.perf_counter()))
    conversation.answer("go")
    assert times[3] - times[0] > 0.1


def test_reasoning_is_dimmed_once_and_not_kept(fake, server, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    fake.reasoning, fake.words = ["Let me ", "think."], ["It is ", "4."]
    conversation, lines = talk(server)
    assert conversation.answer("2+2?") == "It is 4."
    shown = "".join(lines)
    assert f"{chat.DIM}Let me {chat.PLAIN}{chat.DIM}think.{chat.PLAIN}\n\nIt is 4.\n" in shown
    assert conversation.messages[-1] == {"role": "assistant", "content": "It is 4."}


def test_ctrl_c_ends_the_answer_for_the_server_too_and_keeps_what_came(fake, server):
    fake.delay, parts = 0.02, []

    def write(text: str) -> None:
        parts.append(text)
        if len(parts) == 3:
            raise KeyboardInterrupt

    conversation = RemoteConversation(server, {"max_tokens": 500}, write=write)
    conversation.answer("tell me everything")
    assert conversation.messages[-1]["content"] == " w0 w1", "the third was not shown to its end"
    deadline = time.monotonic() + 5
    while fake.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (fake.running, fake.unfinished) == (0, 1)
    fake.delay = 0
    conversation.params["max_tokens"] = 2
    assert conversation.answer("go on") == " w0 w1"


def test_a_refusal_is_said_and_the_conversation_goes_on(fake, server, monkeypatch):
    fake.refuse = lambda body: (400, "prompt has 9,001 tokens") if len(body["messages"][-1]["content"]) > 9 else None
    said = iter(["a very long line", "short", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    conversation, lines = talk(server)
    conversation.run()
    assert any("HTTP 400: prompt has 9,001 tokens" in line for line in lines)
    assert [m["content"] for m in conversation.messages if m["role"] == "user"] == ["short"]


@pytest.mark.parametrize("how, message", [("break_off_after", "the engine fell over"), ("cut_after", "broke off")])
def test_an_answer_that_breaks_is_said_and_not_kept(fake, server, monkeypatch, how, message):
    setattr(fake, how, 1)
    said = iter(["one", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    conversation, lines = talk(server)
    conversation.run()
    assert message in "".join(lines) and conversation.messages == []


def test_text_with_odd_line_ends_comes_whole(fake, server):
    fake.words = ["a\u2028b", "\x85c\x0b", "d\r\n"]
    conversation, _ = talk(server)
    assert conversation.answer("?") == "a\u2028b\x85c\x0bd\r\n"


# -- complete ----------------------------------------------------------------------------------------------------------


def test_complete_takes_a_prompt_or_standard_input(fake, url, monkeypatch, capsys):
    asked = ("complete", "--url", url, "--max-tokens", "2", "--top-p", "0.5")
    assert call(monkeypatch, capsys, *asked, "-q", "Once upon")[:2] == (0, " w0 w1\n")
    assert call(monkeypatch, capsys, *asked, stdin=io.StringIO("two\nlines\n"))[:2] == (0, " w0 w1\n")
    assert [body["prompt"] for body in fake.bodies] == ["Once upon", "two\nlines\n"]
    assert fake.bodies[0]["max_tokens"] == 2 and fake.bodies[0]["top_p"] == 0.5


def test_complete_reads_lines_in_a_terminal(fake, url, monkeypatch, capsys):
    said = iter(["one", "two", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    status, out, _ = call(monkeypatch, capsys, "complete", "--url", url, "--max-tokens", "1", "--stats")
    assert status == 0 and [body["prompt"] for body in fake.bodies] == ["one", "two"], "each line stands alone"
    assert out.count("[1 tokens of prompt, 2 of them cached; 1 new in") == 2


# -- mistakes ----------------------------------------------------------------------------------------------------------

MISTAKES = [
    (["complete", "-q", "x"], 2, "--url http://localhost:8000, or use `jaxpaged generate`"),
    (["complete", "--url", "http://127.0.0.1:9", "-q", "x"], 1, "no answer from http://127.0.0.1:9/v1"),
    (["chat", "--url", "http://127.0.0.1:9", "-q", "x"], 1, "jaxpaged serve MODEL starts one"),
    (["chat", "--url", "localhost:8000", "-q", "x"], 2, "'localhost:8000' is no URL of a server"),
    (["chat", "--url", "http://x:y", "-q", "x"], 2, "'http://x:y' is no URL"),
    (["chat", "--url", "http://127.0.0.1:9", "--dtype", "float32", "-m", "demo"], 2, "leave out --model, --dtype"),
    (["chat", "--url", "http://127.0.0.1:9", "--top-p", "2"], 2, "top_p must be a number in (0, 1], got 2.0."),
]


@pytest.mark.parametrize("arguments, status, message", MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_mistakes_are_said(monkeypatch, capsys, arguments, status, message):
    found, out, err = call(monkeypatch, capsys, *arguments)
    assert found == status and out == "" and message in err and "Traceback" not in err


def test_a_wrong_key_is_said(fake, url, monkeypatch, capsys):
    fake.api_key = "sesame"
    status, _, err = call(monkeypatch, capsys, "chat", "--url", url, "-q", "x")
    assert status == 2 and "HTTP 401: Unauthorized" in err
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    with Server(url) as server:
        assert server.models() == ["fake/model-1"]


@pytest.mark.parametrize(
    "body, text",
    [
        (b'{"error": {"message": "too long", "code": 400}}', "too long"),
        (b'{"error": "Unauthorized"}', "Unauthorized"),
        (b'{"object": "error", "message": "flat"}', "flat"),
        (b'{"detail": "not found"}', "not found"),
        (b'{"code": 3}', '{"code": 3}'),
        (b"Bad Gateway\n", "Bad Gateway"),
        (b"", "no reason given"),
    ],
)
def test_every_servers_error_is_read(body, text):
    assert remote.error_text(400, body) == f"HTTP 400: {text}"


@pytest.mark.parametrize("given", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_the_root_of_the_api(given):
    assert remote.api_root(given) == "http://h:1/v1"
    assert remote.api_root("https://h/proxy/v1") == "https://h/proxy/v1"
    with pytest.raises(RequestError, match="no URL"):
        remote.api_root("ftp://h")
