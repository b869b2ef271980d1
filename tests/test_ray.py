"""jaxpaged.ray without a cluster: routing, the front end, replicas, the stage, its files. (test_ray_cluster.py: with one.)"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import sys

import httpx
import pyarrow as pa
import pytest
from prometheus_client.parser import text_string_to_metric_families
from scripted import scripted_service
from server_process import tiny_model

from jaxpaged import LLM, RequestError, SamplingParams
from jaxpaged.config import EngineConfig
from jaxpaged.ray import Generate, Sizes, app, batch, generate_stage, run_batch, serve_app
from jaxpaged.ray.calls import Answer, ReplicaGone, TooBusy
from jaxpaged.ray.front import Front
from jaxpaged.ray.gather import gathered
from jaxpaged.ray.parts import Parts, check_job, owned
from jaxpaged.ray.replica import Replica
from jaxpaged.ray.routing import choose, prompt_key, ranked
from jaxpaged.ray.serving import DRAIN_SECONDS
from jaxpaged.ray.stage import served
from jaxpaged_server.options import ServerOptions


def in_loop(test):
    """Runs an asynchronous test, for 30 seconds at most."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        async def in_time():
            async with asyncio.timeout(30):
                await test(*args, **kwargs)

        asyncio.run(in_time())

    return run


# -- routing ---------------------------------------------------------------------------------------------------------------


def key(length=100, **body):
    return prompt_key(json.dumps(body).encode(), length)


SYSTEM = {"role": "system", "content": "Be brief."}
FIRST = {"role": "user", "content": "What is a fox?"}


def test_all_turns_of_a_conversation_have_one_key():
    second = [SYSTEM, FIRST, {"role": "assistant", "content": "An animal."}, {"role": "user", "content": "And a dog?"}]
    assert key(messages=[SYSTEM, FIRST]) == key(messages=second) != ""
    parts = [SYSTEM, {"role": "user", "content": [{"type": "text", "text": "What is a fox?"}]}]
    assert key(messages=parts) == key(messages=second)
    assert key(messages=[SYSTEM, {"role": "user", "content": "What is a dog?"}]) != key(messages=second)


def test_texts_with_the_same_beginning_have_one_key():
    begin = "the quick brown fox " * 10
    assert key(prompt=begin + "a") == key(prompt=begin + "b") == key(prompt=[begin + "c", "another"])
    assert key(prompt="x" + begin) != key(prompt=begin)
    assert key(prompt=list(range(99)) + [7]) == key(prompt=list(range(99)) + [8]) != key(prompt=[1, *range(99)])
    assert key(input=begin + "a") == key(input=begin + "b")
    assert key(instructions="Be brief.", input="hi") != key(instructions="Be long.", input="hi")
    assert key(system="Be brief.", messages=[FIRST]) != key(system="Be long.", messages=[FIRST])


def test_what_shares_no_pages_has_another_key():
    assert len({key(prompt="fox"), key(prompt="fox", cache_salt="a"), key(prompt="fox", model="an-adapter")}) == 3
    assert key(prompt="fox", prompt_cache_key="k") == key(prompt="dog", prompt_cache_key="k")


NO_PROMPT = (b"", b"{", b"[1]", b"\xff", b'{"prompt": 3}', b'{"messages": 5}', b'{"messages": [null]}', b'{"messages": []}',
             b'{"prompt": [[]]}', b'{"prompt": null}', b'{"messages": [{"role": 1}]}')  # fmt: skip


@pytest.mark.parametrize("body", NO_PROMPT)
def test_a_body_without_a_prompt_has_no_key(body):
    assert prompt_key(body, 100) == ""


def pick(key, loads, spill=4):
    return choose(key, loads, spill, str, lambda everyone: sorted(everyone, key=loads.__getitem__)[:2])


def test_a_key_goes_to_its_replica_unless_that_is_much_busier():
    loads = dict.fromkeys("abcd", 0)
    own, next_ = ranked("k", list(loads))[:2]
    assert pick("k", loads)[:2] == [[own], [next_]]
    assert pick("k", loads | {own: 4})[0] == [own]
    groups = pick("k", loads | {own: 5})
    assert own not in groups[0] and len(groups[0]) == 2
    assert sorted(groups[-1]) == list("abcd")  # at last, whoever takes it
    assert pick("", loads | {"a": 9, "b": 9})[0] == ["c", "d"]
    assert pick("k", {}) == []


def test_a_replica_that_goes_moves_its_own_keys_only():
    keys, names = [f"key {i}" for i in range(400)], list("abcd")
    before = {k: ranked(k, names)[0] for k in keys}
    after = {k: ranked(k, names[:3])[0] for k in keys}
    assert all(after[k] == before[k] for k in keys if before[k] != "d")
    counts = [list(before.values()).count(name) for name in names]
    assert min(counts) > 60, counts


# -- the front end and replicas, in one process ----------------------------------------------------------------------------


class LocalFleet:
    """Replicas in this process. gone: after how many pieces the first replicas that are asked die, in turn."""

    def __init__(self, *replicas, gone=()):
        self.replicas, self.gone, self.asked = replicas, list(gone), []

    async def stream(self, key, call):
        self.asked.append(key)
        left = self.gone.pop(0) if self.gone else None
        if left is not None and left < 0:
            raise TooBusy("every replica is busy")
        async with contextlib.aclosing(self.replicas[0].stream(key, call)) as pieces:
            async for messages in pieces:
                for message in messages:
                    if left == 0:
                        raise ReplicaGone("it has died")
                    left = left if left is None else left - 1
                    yield [message]

    async def ask_all(self, call):
        return [await replica.ask(call) for replica in self.replicas]


@contextlib.asynccontextmanager
async def fleet(reply="Hello!", number=1, gone=(), **options):
    """A fleet, its front end, and a client."""
    replicas = [Replica(lambda: scripted_service(reply, **options), f"r{i}") for i in range(number)]
    async with contextlib.AsyncExitStack() as stack:
        for replica in replicas:
            await replica.start()
            stack.push_async_callback(replica.stop)
        local = LocalFleet(*replicas, gone=gone)
        front = Front(local, replicas[0].service.options.max_body_size)
        transport = httpx.ASGITransport(front, raise_app_exceptions=False)
        yield local, front, await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://front"))
        while any(replica.service.engine.streams for replica in replicas):  # an abort takes two steps
            await asyncio.sleep(0)


CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}]}
ANTHROPIC = {**CHAT, "max_tokens": 100}


def events(text):
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


@in_loop
async def test_answers_are_those_of_the_server():
    async with fleet() as (local, _, client):
        whole = await client.post("/v1/chat/completions", json=CHAT)
        assert whole.status_code == 200 and whole.json()["choices"][0]["message"]["content"] == "Hello!"
        stream = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
        assert stream.headers["content-type"].startswith("text/event-stream") and stream.text.endswith("data: [DONE]\n\n")
        assert "".join(e["choices"][0]["delta"].get("content", "") for e in events(stream.text)) == "Hello!"
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == "scripted"
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/nowhere")).status_code == 404
        bad = await client.post("/v1/chat/completions", json={**CHAT, "temperature": -1})
        assert bad.status_code == 400 and "temperature" in bad.json()["error"]["message"]
    assert local.asked[0] == local.asked[1] != "" and local.asked[2] == ""


@in_loop
async def test_a_key_is_asked_for_and_bodies_have_a_limit():
    async with fleet(api_key=("secret",), max_body_size=1000) as (_, _, client):
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 401
        key = {"authorization": "Bearer secret"}
        assert (await client.post("/v1/chat/completions", json=CHAT, headers=key)).status_code == 200
        long = {**CHAT, "messages": [{"role": "user", "content": "x" * 2000}]}
        assert (await client.post("/v1/chat/completions", json=long, headers=key)).status_code == 413
        assert (await client.post("/abort_requests", json={})).status_code == 401


@in_loop
async def test_every_replica_is_asked_where_that_is_meant():
    async with fleet(number=2) as (_, _, client):
        await client.post("/v1/chat/completions", json=CHAT)
        answer = await client.get("/metrics")
        families = {family.name: family for family in text_string_to_metric_families(answer.text)}
        tokens = {
            s.labels["replica"]: s.value for s in families["jaxpaged:generation_tokens"].samples if s.name.endswith("_total")
        }
        assert tokens.keys() == {"r0", "r1"} and tokens["r0"] > 0 == tokens["r1"]
        assert answer.text.count("# TYPE jaxpaged:generation_tokens_total") == 1
        assert (await client.get("/load")).json() == {"server_load": 0}
        assert (await client.post("/abort_requests", json={})).json() == {"aborted": 0}
        assert (await client.post("/reset_prefix_cache")).status_code == 200


class Client:
    """Half a connection: gives a body, and leaves when it is told to."""

    def __init__(self, body):
        self.body, self.left, self.got = json.dumps(body).encode(), asyncio.Event(), asyncio.Event()
        self.sent = []

    def scope(self, path):
        headers = [(b"content-type", b"application/json")]
        return {"type": "http", "asgi": {"version": "3.0"}, "method": "POST", "path": path, "raw_path": path.encode(),
                "query_string": b"", "headers": headers, "http_version": "1.1", "scheme": "http", "root_path": "",
                "not data": object()}  # fmt: skip

    async def receive(self):
        body, self.body = self.body, None
        if body is not None:
            return {"type": "http.request", "body": body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)
        if message.get("body"):
            self.got.set()


@pytest.mark.parametrize("stream", [True, False])
@in_loop
async def test_a_client_that_leaves_ends_its_request(stream):
    async with fleet("word " * 500, seconds=0.005) as (local, front, _):
        engine = local.replicas[0].service.engine
        client = Client({**CHAT, "stream": stream})
        call = asyncio.create_task(front(client.scope("/v1/chat/completions"), client.receive, client.send))
        while not engine.streams:
            await asyncio.sleep(0)
        if stream:
            await client.got.wait()
        client.left.set()
        await asyncio.wait_for(call, 5)
        while engine.streams:
            await asyncio.sleep(0)
        assert engine.engine.counters.finished["abort"] == 1


@in_loop
async def test_a_request_whose_replica_goes_is_sent_again():
    async with fleet(gone=[0, 1]) as (local, _, client):  # before anything, and after the start of the answer
        answer = await client.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == "Hello!"
        assert len(local.asked) == 3 and len(set(local.asked)) == 1


@pytest.mark.parametrize("path, body, shown", [
    ("/v1/chat/completions", CHAT, lambda e: e["error"]["code"] == 503),
    ("/v1/messages", ANTHROPIC, lambda e: e["type"] == "error" and e["error"]["type"] == "overloaded_error"),
])  # fmt: skip
@in_loop
async def test_a_stream_whose_replica_goes_says_so(path, body, shown):
    async with fleet("word " * 20, gone=[3]) as (local, _, client):
        answer = await client.post(path, json={**body, "stream": True})
        assert answer.status_code == 200 and shown(events(answer.text)[-1]) and len(events(answer.text)) > 1
        assert "[DONE]" not in answer.text and len(local.asked) == 1


@pytest.mark.parametrize("gone", [[0] * 9, [-1]], ids=["gone", "busy"])
@in_loop
async def test_without_a_replica_the_answer_is_503(gone):
    async with fleet(gone=gone) as (local, front, client):
        answer = await client.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1" and "error" in answer.json()
        assert len(local.asked) == (1 if gone == [-1] else front.retries + 1)


@in_loop
async def test_a_replica_that_ends_lets_requests_end_and_takes_no_more():
    async with fleet("word " * 30, seconds=0.01, shutdown_timeout=20) as (local, _, client):
        replica = local.replicas[0]
        running = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
        while not replica.service.engine.streams:
            await asyncio.sleep(0)
        ending = asyncio.create_task(replica.stop())
        while not replica.service.engine.draining:
            await asyncio.sleep(0)
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 503
        answer = await running
        assert answer.json()["choices"][0]["message"]["content"].count("word") == 30
        await ending


@in_loop
async def test_a_dead_engine_ends_its_replica(monkeypatch):
    ended = []

    def die(prompt):
        raise SystemExit("the engine's thread ends")

    monkeypatch.setattr("os._exit", ended.append)
    replica = Replica(lambda: scripted_service(die), "r0")
    await replica.start()
    replica.check_health()
    client = Client(CHAT)
    await Front(LocalFleet(replica), 1000)(client.scope("/v1/chat/completions"), client.receive, client.send)
    assert ended == [1]
    with pytest.raises(RuntimeError, match="the engine has stopped"):
        replica.check_health()
    await replica.stop()


def test_the_first_refusal_of_any_replica_is_the_answer():
    text = [(b"content-type", b"text/plain")]
    good, bad = Answer("a", 200, text, b"Success"), Answer("b", 403, text, b"no")
    assert gathered([good, bad]) is bad and gathered([good, good]).body == b"Success"
    assert gathered([]).status == 503


# -- what it is told -------------------------------------------------------------------------------------------------------


def test_arguments_from_a_command_line(monkeypatch):
    seen = {}
    monkeypatch.setattr("jaxpaged.ray.serving.application", lambda open, config, options, sizes: seen.update(
        config=config, options=options, sizes=sizes))  # fmt: skip
    monkeypatch.setenv("JAXPAGED_API_KEY", "secret")
    app({"model": "demo", "max_model_len": "4k", "max_num_seqs": "8", "enforce_eager": "true",
         "served_model_name": "[a, b]", "max_replicas": "4", "num_gpus": "0.5", "dtype": "float32",
         "tokenizer": "none", "max_cpu_loras": "none", "hf_overrides": '{"x": 1}', "allowed_origins": "0123",
         "lora_modules": '{"name": "sql", "path": "/sql"}'})  # fmt: skip
    config, options, sizes = seen["config"], seen["options"], seen["sizes"]
    assert (config.model, config.max_model_len, config.max_num_seqs, config.enforce_eager) == ("demo", 4000, 8, True)
    assert config.tokenizer is None and config.hf_overrides == {"x": 1}
    assert options.served_model_name == ("a", "b") and options.api_key == ("secret",)
    assert options.allowed_origins == ("0123",) and config.max_cpu_loras is None
    assert json.loads(options.lora_modules[0]) == {"name": "sql", "path": "/sql"}
    assert options.shutdown_timeout == DRAIN_SECONDS
    assert (sizes.max_replicas, sizes.num_gpus, sizes.target(config), sizes.most(config)) == (4, 0.5, 8, 16)


def test_every_argument_can_be_given_as_it_is(monkeypatch):
    monkeypatch.setattr("jaxpaged.ray.serving.application", lambda open, *made: made)
    defaults = EngineConfig(), ServerOptions(), Sizes()
    assert app({f.name: getattr(made, f.name) for made in defaults for f in dataclasses.fields(made)}) == defaults


@pytest.mark.parametrize("args, said", [
    ({"max_replica": "4"}, "did you mean 'max_replicas'"),
    ({"min_replicas": "2"}, "min_replicas=2 is more than max_replicas=1"),
    ({"max_replicas": "many"}, "max_replicas must be an integer, got 'many'"),
    ({"max_replicas": "2.5"}, "max_replicas must be an integer, got 2.5"),
    ({"max_replicas": True}, "max_replicas must be an integer, got True"),
    ({"max_replicas": "0"}, "max_replicas must be an integer >= 1, got 0"),
    ({"max_replicas": "x: ["}, "max_replicas cannot be read as YAML"),
    ({"max_queued_requests": "-5"}, "max_queued_requests must be an integer >= -1, got -5"),
    ({"max_queued_requests": "0"}, "max_queued_requests must be -1"),
    ({"hf_overrides": "{a"}, "hf_overrides cannot be read as YAML"),
    ({"hf_overrides": "a"}, "hf_overrides must be an object or none, got 'a'"),
    ({"seed": "2026-99-99"}, "seed cannot be read as YAML"),
    ({"enable_lora": "yess"}, "enable_lora must be true or false, got 'yess'"),
    ({"num_gpus": "nan"}, "num_gpus must be a number or none, got 'nan'"),
    ({"num_gpus": ".nan"}, "num_gpus must be a number >= 0, got nan"),
    ({"num_cpus": ".inf"}, "num_cpus must be a number >= 0, got inf"),
    ({"target_ongoing_requests": ".inf"}, "target_ongoing_requests must be a number above 0"),
    ({"max_body_size": "32M"}, "max_body_size must be an integer, got '32M'"),
    ({"dtype": 16}, "dtype must be a text, got 16"),
    ({"target_ongoing_requests": "0"}, "target_ongoing_requests must be a number above 0"),
    ({"target_ongoing_requests": "9", "max_ongoing_requests": "8"}, "no replica would ever be added"),
    ({"dtype": "float33"}, "dtype must be one of"),
    ({"port": "9000"}, "port is Ray Serve's to know"),
    ({"log_format": "json"}, "log_format is Ray Serve's to know"),
    ({"tool_call_parser": "hermess"}, "Did you mean hermes?"),
])  # fmt: skip
def test_wrong_arguments_are_said_at_once(args, said):
    with pytest.raises(RequestError, match=said):
        app(args)


def test_without_ray_the_extra_is_named(monkeypatch):
    for name in ("ray.serve", "ray.data"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: serve_app({"model": "demo"}), lambda: run_batch("x.jsonl", "/nowhere/else", {"model": "demo"}),
                 lambda: generate_stage({"model": "demo"})(None)):  # fmt: skip
        with pytest.raises(RequestError, match=r'pip install "jaxpaged\[ray\]"'):
            call()


def test_sizes_follow_the_engine():
    config = EngineConfig(max_num_seqs=32)
    assert (Sizes().target(config), Sizes().most(config), Sizes().most_ahead(config)) == (32, 64, 16)
    assert Sizes(max_ongoing_requests=8).target(config) == 8
    assert Sizes(target_ongoing_requests=2, spill=0).most_ahead(config) == 0


# -- the stage -------------------------------------------------------------------------------------------------------------

TINY = {"load_format": "dummy", "enforce_eager": True, "max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 64}
PARAMS = {"max_tokens": 3, "temperature": 0.0, "ignore_eos": True}


def test_a_row_that_cannot_be_served_takes_no_other_one_down(tmp_path):
    model = str(tiny_model(tmp_path))
    prompts = ["a fox", "x" * 500, "a dog", "the fox and the dog", None]
    table = pa.table({"prompt": prompts, "extra": [1, 2, 3, 4, 5]})
    stage = Generate({"model": model, **TINY}, PARAMS)
    rows = stage(table).to_pylist()
    numbers = stage(pa.table({"prompt": [5, 6, 7]})).to_pylist()
    with pytest.raises(RequestError, match="the rows have generated_text, error already"):
        stage(pa.table({"prompt": ["a fox"], "error": [""], "generated_text": ["a dog"]}))
    stage.llm.close()
    with LLM(model, use_tqdm=False, **TINY) as llm:
        alone = llm.generate([p for p in prompts if p and len(p) < 500], SamplingParams(**PARAMS), use_tqdm=False)
    good = [row for row in rows if not row["error"]]
    assert [row["extra"] for row in rows] == [1, 2, 3, 4, 5] and [row["extra"] for row in good] == [1, 3, 4]
    assert [row["generated_token_ids"] for row in good] == [list(output.outputs[0].token_ids) for output in alone]
    assert [row["generated_text"] for row in good] == [output.outputs[0].text for output in alone]
    assert rows[1]["finish_reason"] == "error" and "max_model_len" in rows[1]["error"]
    assert {row["finish_reason"] for row in good} == {"length"}
    assert rows[4]["error"] == "the column 'prompt' must have a text or a list in each row, got None."
    assert ["got 6" in row["error"] for row in numbers] == [False, True, False]


def test_bad_prompts_are_found_by_halves():
    calls = []

    def run(prompts):
        calls.append(len(prompts))
        if any(p < 0 for p in prompts):
            raise RequestError("negative")
        return [str(p) for p in prompts]

    numbers = [5, 3, -1, 4, 2, 7, 8, 9]
    assert served(numbers, run) == [str(n) if n >= 0 else "negative" for n in numbers]
    assert len(calls) == 7 and served([], run) == []


POOLS = (({"concurrency": 0}, "concurrency must be an integer >= 1, got 0"),
         ({"concurrency": (3, 2)}, "concurrency must be an integer >= 3, got 2"),
         ({"concurrency": (1, 2, 3)}, "concurrency must be an integer, or .least, most., got .1, 2, 3"),
         ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
         ({"batch_size": None}, "batch_size must be an integer >= 1, got None"),
         ({"num_gpus": float("nan")}, "num_gpus must be a number >= 0, got nan"),
         ({"num_cpus": -1}, "num_cpus must be a number >= 0, got -1"))  # fmt: skip


def test_mistakes_about_a_stage_are_said_before_it_runs(tmp_path):
    with pytest.raises(RequestError, match="n must be 1"):
        generate_stage({"model": "demo"}, {"n": 2})
    with pytest.raises(RequestError, match="max_num_seq"):
        generate_stage({"model": "demo", "max_num_seq": 2})
    for pool, said in POOLS:
        with pytest.raises(RequestError, match=said):
            generate_stage({"model": "demo"}, **pool)
    with pytest.raises(RequestError, match="there is no file"):
        batch.open_source(tmp_path / "none.jsonl")
    with pytest.raises(RequestError, match="source must be files of one kind"):
        batch.open_source([tmp_path / "a.jsonl", tmp_path / "b.csv"])
    with pytest.raises(RequestError, match="output_dir must be a folder of this machine"):
        run_batch("x.jsonl", "s3://bucket/x", {"model": "demo"})
    with pytest.raises(RequestError, match="there is no file"):
        run_batch(tmp_path / "none.jsonl", tmp_path / "out", {"model": "demo"})
    assert not (tmp_path / "out").exists()


# -- its files -------------------------------------------------------------------------------------------------------------


def rows(*ids, error=""):
    return pa.table({"id": list(ids), "generated_text": [f"text {i}" * 50 for i in ids], "error": [error] * len(ids)})


def reopened(folder, **options):
    parts = Parts(folder, "id")
    parts.read(**options)
    return parts


def test_parts_are_read_again(tmp_path):
    first = Parts(tmp_path, "id")
    first.write(rows(1, 2))
    first.write(rows(2, 3))  # a task that was run twice
    (tmp_path / ".part-00000002-0123.parquet").write_bytes(b"half of")  # killed while it was written
    again = reopened(tmp_path)
    assert again.done == {1, 2, 3} and len(list(tmp_path.glob("*.parquet"))) == 2
    assert not list(tmp_path.glob(".part-*"))
    again.write(rows(4))
    tables = [pa.parquet.read_table(path) for path in sorted(tmp_path.glob("part-*.parquet"))]
    assert [table["id"].to_pylist() for table in tables] == [[1, 2], [3], [4]]


@pytest.mark.parametrize("harm", [
    lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:-1],
    lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
], ids=["half", "empty", "last byte", "a bit"])  # fmt: skip
def test_a_part_that_is_not_whole_is_noticed(tmp_path, harm, caplog):
    parts = Parts(tmp_path, "id")
    parts.write(rows(1, 2))
    parts.write(rows(3))
    path = next(tmp_path.glob("part-00000000-*.parquet"))
    path.write_bytes(harm(path.read_bytes()))
    again = reopened(tmp_path)
    assert again.done == {3} and str(path) in caplog.text and not path.exists()
    again.write(rows(1, 2))
    assert reopened(tmp_path).done == {1, 2, 3}


def test_rows_with_an_error_can_be_done_again(tmp_path):
    parts = Parts(tmp_path, "id")
    parts.write(pa.concat_tables([rows(1), rows(2, error="no")]))
    parts.write(rows(3, error="no"))
    assert reopened(tmp_path).done == {1, 2, 3}
    assert reopened(tmp_path, retry_errors=True).done == {1} == reopened(tmp_path).done


def test_a_folder_belongs_to_one_job_and_one_process(tmp_path):
    check_job(tmp_path, {"model": "a", "rows": 3})
    check_job(tmp_path, {"model": "a", "rows": 3})
    with pytest.raises(RequestError, match="model was 'a', is 'b'"):
        check_job(tmp_path, {"model": "b", "rows": 3})
    with owned(tmp_path), pytest.raises(RequestError, match="is being written by another process"):
        with owned(tmp_path):
            pass
    with owned(tmp_path):
        pass


def test_rows_that_are_there_twice_are_refused(tmp_path):
    Parts(tmp_path, "id").write(rows(1, 2))
    path = next(tmp_path.glob("part-*"))
    path.with_name(path.name.replace("part-00000000", "part-00000005")).write_bytes(path.read_bytes())
    with pytest.raises(RequestError, match="repeats rows"):
        reopened(tmp_path)
