"""Batch files: what is refused before anything runs, what is written, and that an interrupted run goes on."""

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import tiny_tokenizers as tiny
from fake_openai import FakeOpenAI, run_cli, serving
from tiny_checkpoints import CONFIG

from jaxpaged import run_batch
from jaxpaged.request import RequestError


def call(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Status, standard output, standard error of `jaxpaged run-batch arguments`."""
    return run_cli(monkeypatch, capsys, "run-batch", "-q", *arguments)


def line(custom_id: str, **changes) -> dict:
    body = {"model": "m", "messages": [{"role": "user", "content": f"question {custom_id}"}], "max_tokens": 2}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body, **changes}


@pytest.fixture
def files(tmp_path):
    """Writes an input file; the flags that name it and the output."""

    def write(*lines) -> list[str]:
        text = "".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in lines)
        (tmp_path / "in.jsonl").write_text(text)
        return ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]

    return write


def output(flags: list[str]) -> Path:
    return Path(flags[3])


def answers(flags: list[str]) -> dict[str, dict]:
    lines = [json.loads(text) for text in output(flags).read_text().splitlines()]
    assert len({one["custom_id"] for one in lines}) == len(lines), "each is answered once"
    return {one["custom_id"]: one for one in lines}


@contextlib.asynccontextmanager
async def open_app(fake: FakeOpenAI, events: list[str]):
    events.append("open")
    yield fake.app
    events.append("closed")


def run(fake: FakeOpenAI, flags: list[str], events: list[str] | None = None, **options) -> run_batch.Totals:
    app = lambda: run_batch.in_process(open_app(fake, [] if events is None else events))
    return run_batch.run(Path(flags[1]), Path(flags[3]), app, quiet=True, **options)


# -- answers -----------------------------------------------------------------------------------------------------------


def test_every_line_is_answered_in_the_batch_format(fake, url, monkeypatch, capsys, files):
    completion = line("c", url="/v1/completions", body={"model": "m", "prompt": "one two three", "max_tokens": 1})
    flags = files(line("a"), line("b"), "", completion, line("d", url="/v1/embeddings", body={"input": "x"}))
    status, _, err = call(monkeypatch, capsys, *flags, "--url", url, "--api-key", "sesame")
    assert status == 0 and "4 requests answered" in err
    found = answers(flags)
    assert set(found) == {"a", "b", "c", "d"}
    for one in found.values():
        assert list(one) == ["id", "custom_id", "response", "error"] and one["id"].startswith("batch_req_")
        assert one["error"] is None and one["response"]["status_code"] == 200 and one["response"]["request_id"]
    assert found["a"]["response"]["request_id"] == "req-7", "the server's own"
    assert found["a"]["response"]["body"]["choices"][0]["message"]["content"] == " w0 w1"
    assert found["c"]["response"]["body"]["usage"]["prompt_tokens"] == 3
    assert found["d"]["response"]["body"]["data"][0]["embedding"] == [0.5]
    assert all(headers["authorization"] == "Bearer sesame" for headers in fake.headers)


def test_the_application_runs_in_this_process_and_is_closed(fake, files):
    flags, events = files(*(line(str(i)) for i in range(30))), []
    fake.delay = 0.01
    assert run(fake, flags, events, max_concurrency=4) == (30, 0, "")
    assert len(answers(flags)) == 30 and events == ["open", "closed"] and fake.most_at_once == 4


def test_an_answer_is_on_disk_before_the_next_request_is_sent(fake, files):
    flags, on_disk = files(line("a"), line("b"), line("c")), []
    fake.refuse = lambda body: on_disk.append(output(flags).read_text().count("\n"))  # a crash would lose no answer
    run(fake, flags, max_concurrency=1)
    assert on_disk == [0, 1, 2]


@pytest.mark.slow
def test_the_real_application_answers_without_a_server(tmp_path, files, monkeypatch, capsys):
    tokenizer, config = tiny.byte_level(400), {**CONFIG, "eos_token_id": None}
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": tokenizer.get_vocab_size()}))
    body = {"model": "tiny", "prompt": "the cat", "max_tokens": 5, "ignore_eos": True}
    requests = [line(str(i), url="/v1/completions", body=body) for i in range(12)]
    flags = files(*requests, line("x", url="/v1/completions", body={**body, "model": "gone"}))
    engine = "--load-format=dummy --enforce-eager --max-num-seqs=4 --max-num-batched-tokens=32 --block-size=4".split()
    status, _, err = call(monkeypatch, capsys, *flags, "-m", str(tmp_path), "--served-model-name", "tiny", *engine)
    found = answers(flags)
    assert status == 1 and "1 of 13 requests failed" in err and found["x"]["response"]["status_code"] == 404
    assert [found[str(i)]["response"]["body"]["usage"]["completion_tokens"] for i in range(12)] == [5] * 12


def test_failures_are_lines_too_and_the_status_says_so(fake, url, monkeypatch, capsys, files):
    fake.refuse = lambda body: (400, "no such thing") if "b" in body["messages"][0]["content"] else None
    flags = files(line("a"), line("b"), line("c", url="/v1/nothing"), line("d"))
    status, _, err = call(monkeypatch, capsys, *flags, "--url", url)
    found = answers(flags)
    assert status == 1 and "2 of 4 requests failed" in err and "--retry-errors" in err
    assert found["b"]["response"]["status_code"] == 400 and found["b"]["error"] is None
    assert found["b"]["response"]["body"]["error"]["message"] == "no such thing"
    assert found["c"]["response"]["status_code"] == 404 and found["a"]["response"]["status_code"] == 200


def test_a_bug_of_the_server_fails_its_request_only(fake, files):
    totals = run(fake, flags := files(line("a"), line("b", url="/v1/crash"), line("c")))
    assert totals[:2] == (3, 1) and answers(flags)["b"]["response"]["status_code"] == 500


def test_a_broken_connection_is_an_error_line(files):
    async def break_off(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    async def serve_once() -> run_batch.Totals:
        server = await asyncio.start_server(break_off, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        paths = [Path(name) for name in flags[1::2]]
        async with server:
            return await asyncio.to_thread(run_batch.run, *paths, lambda: run_batch.at_url(f"http://127.0.0.1:{port}", None), 1)

    flags = files(line("a"))
    assert asyncio.run(serve_once())[:2] == (1, 1)
    assert answers(flags)["a"]["response"] is None and answers(flags)["a"]["error"]["code"] == "connection_error"


# -- going on ----------------------------------------------------------------------------------------------------------


def test_what_is_answered_is_not_sent_again(fake, files):
    flags, events = files(line("a"), line("b")), []
    run(fake, flags)
    before = output(flags).read_text()
    flags = files(line("a"), line("b"), line("c"))
    assert run(fake, flags, events) == (1, 0, "") and output(flags).read_text().startswith(before)
    assert len(fake.bodies) == 3 and set(answers(flags)) == {"a", "b", "c"}
    assert run(fake, flags, events) == (0, 0, "") and events == ["open", "closed"], "nothing to do: nothing is opened"


def test_a_line_that_was_not_finished_is_cut_off_and_redone(fake, files):
    flags = files(line("a"), line("b"))
    run(fake, flags, max_concurrency=1)
    whole = output(flags).read_bytes()
    for cut in (1, 30, len(whole.splitlines()[1])):
        output(flags).write_bytes(whole[:-cut])
        assert run(fake, flags)[0] == 1 and set(answers(flags)) == {"a", "b"}
    assert not output(flags).with_name("out.jsonl.part").exists()


def test_failures_are_sent_again_when_asked_for(fake, files):
    flags = files(*(line(name) for name in "abcd"))
    fake.refuse = lambda body: (503, "full") if body["messages"][0]["content"][-1] in "bd" else None
    assert run(fake, flags) == (4, 2, "HTTP 503: full")
    fake.refuse = lambda body: None
    assert run(fake, flags) == (0, 0, ""), "a failure is an answer"
    assert run(fake, flags, retry_errors=True) == (2, 0, "")
    assert {one["response"]["status_code"] for one in answers(flags).values()} == {200} and len(fake.bodies) == 6


def test_ctrl_c_keeps_what_is_answered_and_the_next_run_goes_on(fake, url, monkeypatch, capsys, files):
    fake.delay = 0.02
    flags = files(*(line(str(i)) for i in range(60)))

    def press():
        while fake.finished < 9:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    status, _, _ = call(monkeypatch, capsys, *flags, "--url", url, "--max-concurrency", "3")
    kept = len(answers(flags))
    assert status == 130 and 6 <= kept < 60
    sent = len(fake.bodies)
    status, _, err = call(monkeypatch, capsys, *flags, "--url", url)
    assert status == 0 and f"{60 - kept} requests answered" in err
    assert len(answers(flags)) == 60 and len(fake.bodies) == sent + 60 - kept


def test_a_server_that_goes_away_stops_the_run_and_costs_nothing(fake, files, monkeypatch, capsys):
    own = FakeOpenAI()
    own.delay, flags = 0.01, files(*(line(str(i)) for i in range(200)))
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(serving(own))

        def stop():
            while len(own.bodies) < 10:
                time.sleep(0.005)
            stack.close()

        threading.Thread(target=stop, daemon=True).start()
        status, _, err = call(monkeypatch, capsys, *flags, "--url", url, "--max-concurrency", "2")
    assert status == 1 and "the same command goes on from there" in err and "Traceback" not in err
    assert 5 <= len(answers(flags)) < 200
    run(fake, flags, retry_errors=True)
    assert len(answers(flags)) == 200


# -- mistakes ----------------------------------------------------------------------------------------------------------

BAD_LINES = [
    ("{", "Expecting property name"),
    ("[]", "must be a JSON object, not list"),
    ({"custom_id": 3}, "custom_id must be a string, got 3"),
    (line("x", method="GET"), "method must be 'POST', got 'GET'"),
    (line("x", url="chat"), "url must be a path such as '/v1/chat/completions', got 'chat'"),
    (line("x", body="hello"), "body must be a JSON object, got 'hello'"),
    (line("x", body={"stream": True}), "body asks for a stream"),
    (line("a"), "custom_id 'a' is that of line 1 too"),
]


@pytest.mark.parametrize("bad, message", BAD_LINES, ids=[message for _, message in BAD_LINES])
def test_bad_lines_are_named_before_anything_runs(fake, files, bad, message):
    events = []
    with pytest.raises(RequestError) as error:
        run(fake, flags := files(line("a"), "", bad, line("b"), line("b")), events)
    assert f"line 3: {message}" in str(error.value) and "line 5: custom_id 'b' is that of line 4 too" in str(error.value)
    assert not events and not fake.bodies and not output(flags).exists()


def test_many_bad_lines_are_counted(fake, files):
    with pytest.raises(RequestError, match="(?s)line 20: .*and 5 more$"):
        run(fake, files(*["{}"] * 25))


@pytest.mark.parametrize("content", ["my notes", "my notes\n", '{"a": 1}\n', '{"id": "batch_req_1", "custom_id": "z"}\n'])
def test_a_file_that_is_no_output_is_left_alone(fake, files, content):
    flags = files(line("a"))
    output(flags).write_text(content)
    with pytest.raises(RequestError, match="line 1 of .*out.jsonl is no answer .*name another file"):
        run(fake, flags)
    assert output(flags).read_text() == content


def test_the_input_is_never_the_output(fake, files):
    flags = files(line("a"))
    with pytest.raises(RequestError, match="name another file"):
        run(fake, [*flags[:3], flags[1]])
    assert json.loads(Path(flags[1]).read_text()) == line("a")


def test_other_mistakes(fake, url, monkeypatch, capsys, files):
    status, _, err = call(monkeypatch, capsys, "-i", "/nowhere.jsonl", "-o", "x", "--url", url)
    assert status == 2 and "/nowhere.jsonl cannot be read" in err
    flags = files("")
    assert "has no requests" in call(monkeypatch, capsys, *flags, "--url", url)[2]
    flags = files(line("a"))
    status, _, err = call(monkeypatch, capsys, *flags, "--url", url, "--dtype", "float32")
    assert status == 2 and "leave out --dtype" in err
    assert call(monkeypatch, capsys, *flags, "--url", url, "--max-concurrency", "0")[0] == 2
    status, _, err = call(monkeypatch, capsys, *flags, "--url", "http://127.0.0.1:9")
    assert status == 1 and "no answer from http://127.0.0.1:9" in err and not fake.bodies
