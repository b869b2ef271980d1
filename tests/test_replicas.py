"""Several engines behind one front door, as clients and operators see them: over HTTP, whose engines say what they should."""

import asyncio
import contextlib
import json
import re
import threading

import httpx
import pytest
from fakes import FakeRunner, paper_tokens
from live_server import LiveServer, serve, wait_until
from scripted import scripted_engine

from jaxpaged import scheduler
from jaxpaged.async_engine import EngineDeadError
from jaxpaged.batch import ladder
from jaxpaged.engine import Engine
from jaxpaged.replicas import Replicas, front_door
from jaxpaged.request import RequestError, RequestOutputKind, SamplingParams
from jaxpaged.scheduler import Limits
from jaxpaged_server.options import ServerOptions
from jaxpaged_server.service import Service

LONG = "the fox and the dog. " * 100
VOCAB = 50


def service(*replies, seconds: float = 0.0, limits: dict | None = None, **options) -> Service:
    """An engine for each reply."""
    engines = [scripted_engine(reply, seconds=seconds, **(limits or {})) for reply in replies]
    return Service(Replicas(engines), ServerOptions(**options), ["scripted"])


def http_of(live: LiveServer) -> httpx.Client:
    return httpx.Client(base_url=live.base_url, timeout=30)


def complete(http: httpx.Client, prompt, **body) -> httpx.Response:
    return http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1000, **body})


@contextlib.contextmanager
def streaming(live: LiveServer, prompt: str, **body):
    """(The answer's id, its lines), once it has begun."""
    given = {"prompt": prompt, "stream": True, "max_tokens": 1000, **body}
    with http_of(live) as http, http.stream("POST", "/v1/completions", json=given) as reply:
        lines = (line for line in reply.iter_lines() if line)
        yield json.loads(next(lines).removeprefix("data: "))["id"], lines


def engines(live: LiveServer) -> list[Engine]:
    return [one.engine for one in live.service.engine.engines]


def finished(live: LiveServer) -> list[dict[str, int]]:
    return [engine.counters.finished for engine in engines(live)]


def metric(http: httpx.Client, name: str) -> dict[str, float]:
    """By engine, summed over other labels."""
    found: dict[str, float] = {}
    lines = re.compile(rf'^jaxpaged:{name}{{.*?engine="(\d+)".*}} (\S+)$', re.MULTILINE)
    for engine, value in lines.findall(http.get("/metrics").text):
        found[engine] = found.get(engine, 0) + float(value)
    return found


# -- who gets what ---------------------------------------------------------------------------------------------------------


def test_a_conversation_stays_where_its_beginning_is_cached():
    with serve(service("Hello", "Hello", "Hello")) as live, http_of(live) as http:
        said = [[10 + i] * 64 for i in range(6)]
        for turn in range(4):
            for i in range(6):
                said[i] += [20 * turn + i + 1] * 40
                assert complete(http, said[i]).status_code == 200
        hits, queries = metric(http, "prefix_cache_hits_total"), metric(http, "prefix_cache_queries_total")
        assert [finished(live)[i] for i in range(3)] == [{"stop": 8}] * 3, "two conversations each"
        lengths = [64 + 40 * turn for turn in range(1, 5)]
        assert sum(queries.values()) == 6 * sum(lengths)
        assert sum(hits.values()) >= 6 * sum(n // 16 * 16 for n in lengths[:-1]), "all that was said before"


def test_strangers_are_spread_and_answers_come_from_both():
    all_are_in, texts = threading.Event(), list[str]()

    def says(text: str):
        return lambda prompt: text if all_are_in.wait(20) else "they do not come"

    with serve(service(says("from 0"), says("from 1"))) as live:

        def ask(i: int) -> None:
            with http_of(live) as http:
                texts.append(complete(http, [i] * 50).json()["choices"][0]["text"])

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(1, 17)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(live.service.engine.streams) == 16, "all requests are in", seconds=20)
        all_are_in.set()
        for thread in threads:
            thread.join()
        assert sorted(texts) == ["from 0"] * 8 + ["from 1"] * 8


def test_salts_and_several_prompts_of_one_request():
    with serve(service("Hello", "Hello")) as live, http_of(live) as http:
        answer = complete(http, [[i] * 40 for i in range(1, 9)]).json()
        assert [choice["index"] for choice in answer["choices"]] == list(range(8))
        assert finished(live) == [{"stop": 4}, {"stop": 4}]
        for salt in ("a", "b"):
            complete(http, [3] * 40, cache_salt=salt)
        assert finished(live) == [{"stop": 5}, {"stop": 5}], "what another salt has cached counts for nothing"


# -- the right engine ------------------------------------------------------------------------------------------------------


def test_abort_and_disconnect_reach_the_engine_that_has_the_request():
    with serve(service(LONG, LONG, seconds=0.005)) as live, http_of(live) as http:
        with streaming(live, "one") as (first, _), streaming(live, "two") as (second, _), streaming(live, "three") as third:
            assert [engine.stats().num_running for engine in engines(live)] == [2, 1]
            assert http.get("/load").json() == {"server_load": 3}
            assert http.post("/abort_requests", json={"request_ids": [second, "unknown"]}).json() == {"aborted": 1}
            wait_until(lambda: finished(live) == [{}, {"abort": 1}], "the second is aborted, where it is")
            assert next(third[1])
        wait_until(lambda: finished(live) == [{"abort": 2}, {"abort": 1}], "those whose clients leave too")
        assert first and http.post("/abort_requests", json={}).json() == {"aborted": 0}
        assert [engine.stats().num_held_pages for engine in engines(live)] == [0, 0]


def test_a_prefix_cache_is_reset_in_all_engines_and_forgotten_by_the_router():
    with serve(service("Hello", "Hello")) as live, http_of(live) as http:
        for i in (1, 2):
            complete(http, [i] * 64)
        assert all(engine.stats().num_cached_pages for engine in engines(live))
        assert http.post("/reset_prefix_cache").status_code == 200
        wait_until(lambda: not any(engine.stats().num_cached_pages for engine in engines(live)), "both are empty")
        assert live.service.engine.router.num_remembered == [0, 0]


def test_the_queue_s_limit_is_for_all_together():
    limits = {"max_num_seqs": 1}
    with serve(service(LONG, LONG, seconds=0.005, limits=limits, max_num_queued_reqs=1)) as live, http_of(live) as http:
        with streaming(live, "one"), streaming(live, "two"):
            rest = threading.Thread(target=complete, args=(http, "three"))
            rest.start()
            wait_until(lambda: sum(engine.num_queued for engine in engines(live)) == 1, "one waits")
            with http_of(live) as other:
                refused = complete(other, "four")
                assert refused.status_code == 503 and "1 sequences are waiting already" in refused.json()["error"]["message"]
                assert sum(metric(other, "admission_rejections_total").values()) == 1
        live.service.abort(None)
        rest.join()


# -- what is told ----------------------------------------------------------------------------------------------------------


def test_metrics_have_a_value_for_each_engine_and_one_for_http():
    with serve(service("Hello", "Hello")) as live, http_of(live) as http:
        for i in range(1, 7):
            complete(http, [i] * 40)
        text = http.get("/metrics").text
        assert metric(http, "prompt_tokens_total") == {"0": 120, "1": 120}
        assert metric(http, "cache_config_info") == {"0": 1, "1": 1} and 'num_gpu_blocks="1024"' in text
        assert metric(http, "time_to_first_token_seconds_count") == {"0": 3, "1": 3}
        assert text.count("# TYPE jaxpaged:prompt_tokens_total counter") == 1
        assert re.findall(r'^http_requests_total{handler="/v1/completions",.*} (\S+)$', text, re.MULTILINE) == ["6.0"]
        assert live.service.metrics.throughput()["generation"] == pytest.approx(sum(
            engine.counters.generated_tokens for engine in engines(live)) / 5)  # fmt: skip


def test_the_live_view_shows_all_pages_and_slots():
    with serve(service(LONG, LONG, seconds=0.01)) as live, http_of(live) as http:
        with streaming(live, "one"), streaming(live, "two"), http.stream("GET", "/live") as reply:
            frame = json.loads(next(reply.iter_lines()).removeprefix("data: "))
        taken = frame["snapshot"]
        assert taken["num_running"] == 2 and [one["slot"] for one in taken["running"]] == [0, 8]
        assert taken["pages"]["total"] == 2 * 1023


def test_the_end_of_one_engine_is_the_end_of_all():
    def dies(prompt: str) -> str:
        if "die" in prompt:
            raise SystemExit("no more paper")
        return LONG

    with serve(service(dies, dies, seconds=0.005)) as live, http_of(live) as http:
        deaths: list[BaseException] = []
        for one in live.service.engine.engines:
            one.on_death = deaths.append  # the process would end
        with streaming(live, "a long story") as (_, lines):
            dead = complete(http, "die")
            assert dead.status_code == 500 and "no more paper" in dead.json()["error"]["message"]
            assert [str(error) for error in deaths] == ["no more paper"]
            health = http.get("/health")
            assert health.status_code == 503 and "no more paper" in health.json()["cause"]
            assert complete(http, "and now?").status_code == 500, "whichever engine would have got it"
            *_, last, done = lines
        assert done == "data: [DONE]" and '"finish_reason":"stop"' in last, "the other engine has finished its answer"


def test_a_step_that_hangs_is_told_with_its_engine(capfd):
    let_go = threading.Event()

    def hangs(prompt: str) -> str:
        if "hang" in prompt:
            let_go.wait(30)
        return "Hello"

    with serve(service("Hello", hangs, watchdog_timeout=0.2)) as live, http_of(live) as http:
        complete(http, "the first goes to engine 0")
        thread = threading.Thread(target=complete, args=(http, "hang"))
        thread.start()
        try:
            with http_of(live) as other:
                wait_until(lambda: other.get("/health").status_code == 503, "the hang is noticed")
                assert re.search(r"a step has been running for \d+ s in engine 1", other.get("/health").json()["cause"])
        finally:
            let_go.set()
            thread.join()
        assert http.get("/health").status_code == 200


# -- without HTTP ----------------------------------------------------------------------------------------------------------


def paper_engines(count: int, **changes) -> list[Engine]:
    base = dict(max_num_seqs=4, max_num_batched_tokens=64, page_size=4, num_pages=200, max_model_len=64, vocab_size=VOCAB)
    limits = Limits(**{**base, **changes})
    return [Engine(limits, FakeRunner(limits), ladder(64, limits.max_num_seqs)) for _ in range(count)]


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 8, "output_kind": RequestOutputKind.DELTA, **changes})


def run(test, replicas: Replicas):
    """Runs `test(replicas)` in a loop; afterwards nothing may be left."""

    async def main():
        async with asyncio.timeout(30):
            replicas.start()
            result = await test(replicas)
            assert await replicas.drain(5)
            assert not replicas.streams and replicas.router.loads == [0] * len(replicas.engines)
            for one in replicas.engines:
                scheduler.check(one.engine.state)
                assert one.engine.stats().num_held_pages == 0
            await replicas.close()
            assert asyncio.all_tasks() == {asyncio.current_task()}
            return result

    return asyncio.run(main())


async def read(replicas, request_id, prompt, p) -> list[int]:
    with replicas.submit(request_id, prompt, p) as stream:
        return [token async for output in stream for token in output.outputs[0].token_ids]


def test_many_readers_each_get_the_oracle_s_tokens():
    prompts = [[i % 5, i % 3, 1] for i in range(40)]

    async def test(replicas):
        return await asyncio.gather(*(read(replicas, str(i), p, params(max_tokens=20)) for i, p in enumerate(prompts)))

    assert run(test, Replicas(paper_engines(3))) == [paper_tokens(p, 20, VOCAB) for p in prompts]


class SeedRunner(FakeRunner):
    """Its tokens are made of the row's seed."""

    def dispatch(self, batch):
        sampled = super().dispatch(batch)
        rows = int(batch.counts[1])
        sampled.tokens[:rows] = batch.sampling.seed[:rows].sum(1) % VOCAB
        self.last_token[batch.slots[:rows]] = sampled.tokens[:rows]
        return sampled


def test_seeds_do_not_depend_on_who_runs_the_request():
    def tokens(count: int) -> list[list[int]]:
        async def main():
            engines = paper_engines(count)
            for engine in engines:
                engine.runner = SeedRunner(engine.limits)
            door = front_door(engines)
            door.start()
            wanted = params(temperature=1.0, max_tokens=3, ignore_eos=True)
            found = await asyncio.gather(*(read(door, str(i), [i, i + 1], wanted) for i in range(12)))
            assert await door.drain(5) and all(engine.counters.steps for engine in engines)
            await door.close()
            return found

        return asyncio.run(main())

    alone = tokens(1)
    assert len({tuple(one) for one in alone}) > 6
    assert tokens(2) == tokens(3) == alone


def test_an_id_that_is_in_use_is_refused_by_whichever_engine_has_it():
    async def test(replicas):
        with replicas.submit("a", [1, 2], params(max_tokens=40)), replicas.submit("b", [3, 4], params(max_tokens=40)):
            for name in ("a", "b"):
                with pytest.raises(RequestError, match=f"request id '{name}' is in use"):
                    replicas.submit(name, [9], params())
        await replicas.drain(5)

    run(test, Replicas(paper_engines(2)))


def test_what_is_refused_leaves_no_load():
    async def test(replicas):
        with pytest.raises(RequestError, match="not a token id"):
            replicas.submit("a", [VOCAB], params())
        with pytest.raises(RequestError, match="max_model_len is 64"):
            replicas.submit("a", [1] * 70, params())
        assert replicas.router.loads == [0, 0] and not replicas.streams
        replicas.abort("unknown")

    run(test, Replicas(paper_engines(2)))


def test_draining_takes_nothing_more_and_closing_fails_what_runs():
    async def main():
        replicas = Replicas(paper_engines(2))
        replicas.start()
        streams = [replicas.submit(str(i), [i], params(max_tokens=60)) for i in range(6)]
        assert not await replicas.drain(0), "some had to be aborted"
        with pytest.raises(RequestError, match="shutting down"):
            replicas.submit("late", [1], params())
        assert [(await stream.last()).outputs[0].finish_reason for stream in streams] == ["abort"] * 6
        await replicas.close()
        assert not replicas.is_running

    asyncio.run(main())


def test_after_a_death_there_are_no_more_requests(monkeypatch):
    async def main():
        replicas = Replicas(paper_engines(2))
        replicas.start()
        monkeypatch.setattr(replicas.engines[1].engine, "advance", lambda: 1 / 0)
        with replicas.submit("a", [1], params(max_tokens=40)) as alive, replicas.submit("b", [2], params()) as dead:
            with pytest.raises(EngineDeadError, match="ZeroDivisionError"):
                await dead.last()
            assert isinstance(replicas.error, ZeroDivisionError) and not replicas.is_running
            with pytest.raises(EngineDeadError, match="ZeroDivisionError"):
                replicas.submit("c", [3], params())
            assert (await alive.last()).outputs[0].finish_reason == "length"
        await replicas.close()

    asyncio.run(main())


def test_a_prompt_whose_client_leaves_before_its_turn_is_no_load():
    """One seat each: the long prompt waits behind another request, which goes on."""

    async def test():
        limits = Limits(
            max_num_seqs=1, max_num_batched_tokens=64, page_size=4, num_pages=600, max_model_len=2000, vocab_size=VOCAB
        )
        replicas = Replicas([Engine(limits, FakeRunner(limits, step_seconds=0.01), ladder(64, 1)) for _ in range(2)])
        replicas.start()
        greedy = SamplingParams(temperature=0, max_tokens=1900, ignore_eos=True, detokenize=False)
        for name in ("a", "b"):
            replicas.submit(name, [1, 2], greedy)
        long = replicas.submit("long", list(range(50)) * 3, SamplingParams(temperature=0, max_tokens=1, detokenize=False))
        loads = replicas.router.loads
        long.close()
        while replicas.router.engine_of("long") is not None:
            await asyncio.sleep(0.005)
        assert all(replicas.router.engine_of(name) is not None for name in ("a", "b")), "they go on"
        assert max(replicas.router.loads) < max(loads) - 100
        await replicas.drain(0)
        await replicas.close()

    asyncio.run(test())
