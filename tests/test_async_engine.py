"""The engine behind asyncio: outputs arrive in order, leaving aborts, a reader who is slow loses nothing, all of it ends."""

import asyncio
import logging
import threading
import time

import pytest
from fakes import FakeRunner, paper_tokens

from jaxpaged import scheduler
from jaxpaged.async_engine import AsyncEngine, EngineDeadError
from jaxpaged.batch import ladder
from jaxpaged.engine import Engine
from jaxpaged.request import RequestError, RequestOutputKind, SamplingParams
from jaxpaged.scheduler import Limits
from jaxpaged.watchdog import Watchdog

VOCAB = 50


class GatedRunner(FakeRunner):
    """Steps wait until the gate is open."""

    def __init__(self, limits, fail_at=frozenset(), step_seconds=0.0):
        super().__init__(limits, fail_at, step_seconds)
        self.gate = threading.Event()
        self.gate.set()

    def dispatch(self, batch):
        assert self.gate.wait(20)
        return super().dispatch(batch)


def make(fail_at=frozenset(), max_num_seqs=4, step_seconds=0.0, **options) -> AsyncEngine:
    limits = Limits(max_num_seqs=max_num_seqs, max_num_batched_tokens=64, page_size=4, num_pages=200, max_model_len=64,
                    vocab_size=VOCAB)  # fmt: skip
    runner = GatedRunner(limits, fail_at, step_seconds)
    return AsyncEngine(Engine(limits, runner, ladder(64, max_num_seqs)), **options)


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 8, "output_kind": RequestOutputKind.DELTA, **changes})


def run(test, engine: AsyncEngine):
    """Runs `test(engine)` in a loop with the engine started; afterwards nothing may be left."""

    async def main():
        engine.start()
        result = await test(engine)
        if engine.error is None:
            await engine.drain(5)
            assert not engine.streams
            state = engine.engine.state
            scheduler.check(state)
            assert scheduler.stats(state).num_held_pages == 0
        await engine.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result

    async def in_time():
        async with asyncio.timeout(30):
            return await main()

    return asyncio.run(in_time())


async def read(engine, request_id, prompt, p) -> list[int]:
    tokens = []
    with engine.submit(request_id, prompt, p) as stream:
        async for output in stream:
            tokens += output.outputs[0].token_ids
    return tokens


def test_many_readers_each_get_the_oracle_s_tokens():
    prompts = [[i % 5, i % 3, 1] for i in range(30)]

    async def test(engine):
        return await asyncio.gather(*(read(engine, str(i), p, params(max_tokens=20)) for i, p in enumerate(prompts)))

    assert run(test, make()) == [paper_tokens(p, 20, VOCAB) for p in prompts]


def test_a_token_is_told_at_once_while_the_loop_has_time():
    async def test(engine):
        with engine.submit("a", [1, 2], params(max_tokens=14, ignore_eos=True)) as stream:
            return [len(output.outputs[0].token_ids) async for output in stream]

    told = run(test, make(step_seconds=0.03))
    assert sum(told) == 14 and len(told) >= 12, "one by one; two merged, where this machine was busy with something else"


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_what_a_slow_reader_did_not_read_is_merged(kind):
    async def test(engine):
        outputs = []
        with engine.submit("a", [1, 2], params(max_tokens=20, output_kind=kind, logprobs=0)) as stream:
            async for output in stream:
                outputs.append(output)
                await asyncio.sleep(0.05)  # many steps
        return outputs

    outputs = run(test, make())
    assert len(outputs) < 20  # some were merged
    completions = [output.outputs[0] for output in outputs]
    delta = kind is RequestOutputKind.DELTA
    tokens = sum((c.token_ids for c in completions), []) if delta else completions[-1].token_ids
    entries = sum((c.logprobs for c in completions), []) if delta else completions[-1].logprobs
    assert tokens == paper_tokens([1, 2], 20, VOCAB)
    assert [list(entry)[0] for entry in entries] == tokens
    assert outputs[-1].finished and completions[-1].finish_reason == "length"


def test_samples_are_merged_one_by_one():
    async def test(engine):
        found = {0: [], 1: [], 2: []}
        with engine.submit("a", [1], params(temperature=1, n=3, seed=3, max_tokens=10)) as stream:
            async for output in stream:
                for completion in output.outputs:
                    found[completion.index] += completion.token_ids
                await asyncio.sleep(0.02)
        return found

    assert {i: len(tokens) for i, tokens in run(test, make()).items()} == {0: 10, 1: 10, 2: 10}


def test_leaving_the_block_aborts_within_two_steps():
    async def test(engine):
        with engine.submit("a", [1], params(max_tokens=60)) as stream:
            await stream.__anext__()
        before = engine.engine.counters.steps
        while engine.streams:
            await asyncio.sleep(0.001)
        assert engine.engine.counters.steps - before <= 2
        assert stream.finished

    run(test, make())


def test_a_cancelled_task_aborts_its_request():
    async def test(engine):
        engine.engine.runner.gate.clear()
        task = asyncio.create_task(read(engine, "a", [1], params(max_tokens=60)))
        await asyncio.sleep(0.05)
        task.cancel()
        engine.engine.runner.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await engine.drain(5)

    run(test, make())


def test_generate_is_an_asynchronous_generator():
    async def test(engine):
        outputs = [output async for output in engine.generate("a", [1], params(max_tokens=5))]
        return sum((output.outputs[0].token_ids for output in outputs), [])

    assert run(test, make()) == paper_tokens([1], 5, VOCAB)


def test_a_request_that_cannot_be_served_leaves_nothing():
    async def test(engine):
        with pytest.raises(RequestError, match="max_model_len"):
            engine.submit("a", [1], params(max_tokens=1000))
        assert not engine.streams
        return await read(engine, "a", [1], params())

    assert run(test, make()) == paper_tokens([1], 8, VOCAB)


def test_requests_beyond_the_queue_limit_get_503():
    async def test(engine):
        engine.engine.runner.gate.clear()
        streams = [engine.submit(str(i), [1], params()) for i in range(4 + 2)]  # four run, two wait
        with pytest.raises(RequestError, match="max_num_queued_reqs is 2") as error:
            engine.submit("x", [1], params())
        assert error.value.status == 503
        engine.engine.runner.gate.set()
        await asyncio.gather(*(stream.last() for stream in streams))
        await read(engine, "x", [1], params())

    run(test, make(max_num_queued_reqs=2))


def test_a_failed_step_fails_its_own_requests_only():
    async def test(engine):
        with engine.submit("a", [1], params()) as stream:
            output = await stream.last()
        assert output.error == "RuntimeError: out of paper" and output.outputs[0].finish_reason == "error"
        return await read(engine, "b", [1], params())

    assert run(test, make(fail_at=frozenset({2}))) == paper_tokens([1], 8, VOCAB)


def test_when_the_engine_s_thread_dies_everybody_learns_why(monkeypatch, caplog):
    deaths = []

    async def test(engine):
        stream = engine.submit("a", [1], params(max_tokens=60))
        await stream.__anext__()
        monkeypatch.setattr(engine.engine, "advance", lambda: 1 / 0)
        with pytest.raises(EngineDeadError, match="division by zero"):
            await stream.last()
        with pytest.raises(EngineDeadError, match="division by zero"):
            engine.submit("b", [1], params())
        with pytest.raises(EngineDeadError):
            await engine.call(lambda e: None)
        assert not engine.is_running and not engine.streams

    run(test, make(on_death=deaths.append))
    assert [type(error) for error in deaths] == [ZeroDivisionError]


def test_who_waits_for_the_engine_s_thread_when_it_dies_learns_why(monkeypatch, caplog):
    async def test(engine):
        begun, go_on = threading.Event(), threading.Event()

        def advance():
            begun.set()
            go_on.wait(20)
            raise SystemExit("dead")

        monkeypatch.setattr(engine.engine, "advance", advance)
        engine.submit("a", [1], params())
        await asyncio.to_thread(begun.wait, 20)
        asked = asyncio.create_task(engine.reset_prefix_cache())
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(EngineDeadError, match="has stopped"):
            await asked

    run(test, make())


def test_an_engine_that_is_ended_before_it_starts_takes_nothing():
    engine = make()
    engine.end(RuntimeError("lost"))

    async def test(engine):
        with pytest.raises(EngineDeadError, match="lost"):
            engine.submit("a", [1], params())

    run(test, engine)


def test_what_is_not_a_request_does_not_wait():
    async def test(engine):
        engine.engine.runner.gate.clear()
        first = engine.submit("0", [1], params())
        for i in range(9):
            engine.abort(f"unknown {i}")
        engine.engine.reset_prefix_cache()
        second = engine.submit("1", [1], params())  # a limit of 2 is not reached
        assert engine.engine.num_queued == 0
        engine.engine.runner.gate.set()
        await asyncio.gather(first.last(), second.last())

    run(test, make(max_num_queued_reqs=2))


def test_call_runs_between_steps_and_hands_on_what_it_raises():
    async def test(engine):
        assert await engine.call(lambda e: threading.current_thread().name) == "jaxpaged-engine"
        with pytest.raises(KeyError):
            await engine.call(lambda e: {}["no"])

    run(test, make())


def test_draining_lets_requests_end_and_refuses_new_ones():
    async def test(engine):
        task = asyncio.create_task(read(engine, "a", [1], params(max_tokens=30)))
        await asyncio.sleep(0)
        assert await engine.drain(20)
        with pytest.raises(RequestError, match="shutting down") as error:
            engine.submit("b", [1], params())
        assert error.value.status == 503
        return await task

    assert run(test, make()) == paper_tokens([1], 30, VOCAB)


def test_draining_aborts_what_takes_too_long(caplog):
    async def test(engine):
        engine.engine.runner.gate.clear()
        stream = engine.submit("a", [1], params(max_tokens=60))
        threading.Timer(0.3, engine.engine.runner.gate.set).start()
        with caplog.at_level(logging.WARNING):
            assert not await engine.drain(0.05)
        output = await stream.last()
        assert output.finished and output.outputs[0].finish_reason in ("abort", "length")

    run(test, make())
    assert "aborting 1 requests" in caplog.text


def test_observers_see_every_request_and_token():
    class Seen:
        def __init__(self):
            self.submitted_ids, self.tokens, self.ended, self.rejections = [], 0, [], []

        def submitted(self, stream):
            self.submitted_ids.append(stream.request_id)

        def rejected(self, reason):
            self.rejections.append(reason)

        def stepped(self, report, streams):
            for output in report.outputs:
                assert output.request_id in streams
                self.tokens += sum(len(c.token_ids) for c in output.outputs)
                self.ended += [output.request_id] * output.finished

    seen = Seen()

    async def test(engine):
        await asyncio.gather(*(read(engine, str(i), [i], params()) for i in range(6)))
        await engine.drain(1)
        with pytest.raises(RequestError):
            engine.submit("late", [1], params())

    run(test, make(observers=[seen]))
    assert sorted(seen.submitted_ids) == sorted(seen.ended) == [str(i) for i in range(6)]
    assert seen.tokens == 6 * 8 and seen.rejections == ["draining"]


def test_the_watchdog_says_when_a_step_hangs_and_when_it_goes_on(caplog, capfd):
    async def test(engine):
        watchdog = Watchdog(engine, 0.1)
        watchdog.start()
        assert watchdog.cause is None
        engine.engine.runner.gate.clear()
        task = asyncio.create_task(read(engine, "a", [1, 2, 3], params()))
        deadline = time.monotonic() + 10
        while "it hangs" not in caplog.text and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert "a step has been running" in str(watchdog.cause)
        engine.engine.runner.gate.set()
        await task
        assert watchdog.cause is None
        watchdog.stop()

    run(test, make())
    assert "'num_prompt': 3" in caplog.text  # the state
    assert "in dispatch" in capfd.readouterr().err  # the stacks
