"""The live view's feed: what it says of each page and request, and to whom it says it."""

import asyncio
import base64
import json
import threading
import time
import zlib
from contextlib import aclosing, asynccontextmanager

import numpy as np
import pytest
from fakes import FakeRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpaged.async_engine import AsyncEngine
from jaxpaged.batch import ladder
from jaxpaged.engine import Engine
from jaxpaged.request import SamplingParams
from jaxpaged.scheduler import Limits
from jaxpaged_server import live
from jaxpaged_server.live import CACHED, FREE, SHARED, Feed, side_by_side, snapshot

PAGE_SIZE = 4
PREFIX = [9, 8, 7, 6, 5, 4, 3, 2]  # two pages


class Meter:
    def latencies(self):
        return {"ttft": {"p50": 0.1, "p90": None, "p99": None}, "itl": {"p50": None, "p90": None, "p99": None}}

    def throughput(self):
        return {"prompt": 12.5, "generation": 3.0}


def make_engine(**changes) -> Engine:
    base = dict(max_num_seqs=4, max_num_batched_tokens=32, page_size=PAGE_SIZE, num_pages=40, max_model_len=64, vocab_size=50)
    limits = Limits(**{**base, **changes})
    return Engine(limits, FakeRunner(limits), ladder(limits.max_num_batched_tokens, limits.max_num_seqs), None, frozenset())


def forever(**changes) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 20, "ignore_eos": True, **changes})


def codes_of(taken) -> list[int]:
    return np.frombuffer(taken.map, "<u2").tolist()


def expected(engine: Engine) -> list:
    """What page_map says, page by page: FREE, CACHED, or the slots that hold it."""
    state = engine.state
    table, found = state.page_table.read(), []
    for page in range(1, engine.limits.num_pages):
        holders = [slot for slot in range(engine.limits.max_num_seqs) if state.seats.active[slot]
                   and page in table[slot, : state.seats.num_pages[slot]]]  # fmt: skip
        found.append(holders or (CACHED if page in state.pool.key_of else FREE))
    return found


def told(taken) -> list:
    def read(code):
        return taken.groups[code - SHARED] if SHARED <= code < CACHED else [code - 1] if FREE < code < SHARED else code

    return [read(code) for code in codes_of(taken)]


# -- what it says ------------------------------------------------------------------------------------------------------------


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=24)  # few words: many shared prefixes
loads = st.lists(st.tuples(prompts, st.integers(1, 9), st.integers(0, 4)), max_size=9)  # prompt, output, steps before the next


@settings(max_examples=60, deadline=None)
@given(loads, st.integers(12, 40))
def test_every_page_is_told_as_the_page_table_has_it(load, num_pages):
    engine = make_engine(num_pages=num_pages, max_model_len=40)
    for i, (prompt, output, pause) in enumerate(load):
        engine.submit(str(i), prompt, forever(max_tokens=output))
        for _ in range(pause):
            engine.step()
            taken = snapshot(engine)
            assert told(taken) == expected(engine)
            counts, codes = taken.pages, codes_of(taken)
            assert counts.total == num_pages - 1 == counts.free + counts.held + counts.cached
            assert (counts.free, counts.cached) == (codes.count(FREE), codes.count(CACHED))
            assert counts.shared == sum(SHARED <= code < CACHED for code in codes)


def test_a_common_prefix_is_shared_by_all_who_have_it_and_cached_when_they_have_gone():
    engine = make_engine()
    for i in range(3):
        engine.submit(f"r{i}", [*PREFIX, i], forever(max_tokens=3 + i))
    engine.submit("other", [1, 1, 1, 1, 1], forever(max_tokens=3))
    engine.step()
    taken = snapshot(engine)
    shared = [code for code in codes_of(taken) if SHARED <= code < CACHED]
    assert len(shared) == taken.pages.shared == 2 and taken.groups == [[0, 1, 2]]
    assert [s.cached_tokens for s in taken.running] == [0, 8, 8, 0]
    while engine.has_work:
        engine.step()
    taken = snapshot(engine)
    assert taken.pages.held == taken.pages.shared == 0 and taken.groups == [] and taken.pages.cached >= 2


@settings(max_examples=30, deadline=None)
@given(st.lists(loads, min_size=2, max_size=3))
def test_several_engines_are_told_side_by_side(each):
    engines = [make_engine() for _ in each]
    for engine, load in zip(engines, each):
        for i, (prompt, output, _) in enumerate(load):
            engine.submit(str(i), prompt, forever(max_tokens=output))
        engine.step()
    snapshots = [snapshot(engine) for engine in engines]
    taken, moved = side_by_side(snapshots, 4), lambda at, i: [slot + 4 * i for slot in at] if isinstance(at, list) else at
    assert told(taken) == [moved(at, i) for i, engine in enumerate(engines) for at in expected(engine)]
    assert [one.slot for one in taken.running] == [one.slot + 4 * i for i, s in enumerate(snapshots) for one in s.running]
    for name in ("total", "free", "held", "shared", "cached"):
        assert getattr(taken.pages, name) == sum(getattr(one.pages, name) for one in snapshots)
    assert taken.pages.page_size == PAGE_SIZE and taken.num_waiting == sum(one.num_waiting for one in snapshots)
    assert side_by_side(snapshots[:1], 4) == snapshots[0]


def test_sequences_are_described():
    engine = make_engine(max_num_seqs=2, max_num_batched_tokens=8)
    engine.submit("long", list(range(20)), forever())
    engine.step()
    engine.submit("late", [1, 2], forever())
    engine.submit("later", [1, 2, 3], forever())
    (only,) = snapshot(engine).running
    assert (only.id, only.state, only.slot, only.prompt_tokens, only.generated_tokens, only.pages) == (
        "long",
        "prefill",
        0,
        20,
        0,
        2,
    )
    for _ in range(4):
        engine.step()
    taken = snapshot(engine)
    assert [(s.id, s.state) for s in taken.running] == [("long", "decode"), ("late", "decode")]
    assert taken.running[0].generated_tokens > 0
    (queued,) = taken.waiting
    assert (queued.id, queued.state, queued.slot, queued.prompt_tokens) == ("later", "waiting", None, 3)


def test_a_preempted_sequence_waits_with_what_it_has_generated():
    engine = make_engine(num_pages=9, max_model_len=32)
    for token in (1, 2):
        engine.submit(str(token), [token] * 12, forever(max_tokens=16))
    for _ in range(12):
        engine.step()
        if snapshot(engine).waiting:
            break
    (preempted,) = snapshot(engine).waiting
    assert preempted.state == "preempted" and preempted.prompt_tokens == 12 and preempted.generated_tokens > 0


def test_a_long_queue_is_counted_and_its_head_listed(monkeypatch):
    monkeypatch.setattr(live, "MAX_LISTED", 3)
    engine = make_engine(max_num_seqs=5)
    for i in range(12):
        engine.submit(str(i), [i], forever())
    engine.step()
    taken = snapshot(engine)
    assert (taken.num_running, taken.num_waiting) == (5, 7)
    assert [s.id for s in taken.running] == ["0", "1", "2"] and len(taken.waiting) == 3


# -- to whom -----------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def feed():
    engine = AsyncEngine(make_engine())
    engine.start()
    try:
        yield Feed(engine, Meter())
    finally:
        await engine.close()


def decoded(event: bytes) -> dict:
    assert event.startswith(b"data: ") and event.endswith(b"\n\n")
    return json.loads(event[6:])


def test_a_frame_is_json_with_a_compressed_map_and_the_meters_numbers():
    async def run():
        async with feed() as f, aclosing(f.events()) as events:
            return decoded(await anext(events))

    frame = asyncio.run(run())
    assert frame["throughput"] == {"prompt": 12.5, "generation": 3.0} and frame["latencies"]["ttft"]["p50"] == 0.1
    codes = zlib.decompress(base64.b64decode(frame["snapshot"]["map"]))
    assert codes == bytes(2 * 39)
    assert frame["snapshot"]["pages"] == {"total": 39, "free": 39, "held": 0, "shared": 0, "cached": 0, "page_size": 4}


def test_viewers_share_one_ticker_which_ends_with_the_last_of_them():
    async def run():
        async with feed() as f:
            assert f._ticker is None
            first, second = f.events(), f.events()
            one, two = await asyncio.gather(anext(first), anext(second))
            assert one is two and f.num_viewers == 2
            await first.aclose()
            assert f.num_viewers == 1 and f._ticker is not None
            await second.aclose()
            assert f.num_viewers == 0 and f._ticker is None
            late = f.events()
            assert decoded(await anext(late))["at"] > decoded(one)["at"]
            await late.aclose()

    asyncio.run(run())


def test_a_viewer_who_is_cancelled_while_he_waits_is_forgotten_at_once():
    async def run():
        async with feed() as f:
            events = f.events()
            await anext(events)
            waiting = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0.02)
            waiting.cancel()
            await asyncio.wait({waiting})
            assert f.num_viewers == 0 and f._ticker is None

    asyncio.run(run())


def test_changes_are_told_at_once_and_idleness_seldom(monkeypatch):
    monkeypatch.setattr(live, "BUSY_SECONDS", 0.02)
    monkeypatch.setattr(live, "IDLE_SECONDS", 0.5)

    async def run():
        async with feed() as f, aclosing(f.events()) as events:
            await anext(events)
            began = time.monotonic()
            await anext(events)
            assert time.monotonic() - began > 0.4, "nothing had changed"
            with f.engine.submit("a", PREFIX, forever(max_tokens=50)):
                began = time.monotonic()
                frame = decoded(await anext(events))
                assert time.monotonic() - began < 0.3
                assert [s["id"] for s in frame["snapshot"]["running"]] == ["a"]

    asyncio.run(run())


def test_a_slow_viewer_misses_frames_and_sees_the_newest(monkeypatch):
    monkeypatch.setattr(live, "BUSY_SECONDS", 0.01)
    monkeypatch.setattr(live, "IDLE_SECONDS", 0.01)

    async def run():
        async with feed() as f, aclosing(f.events()) as slow, aclosing(f.events()) as quick:
            await anext(slow)
            seen = [decoded(await anext(quick))["at"] for _ in range(8)]
            assert decoded(await anext(slow))["at"] >= seen[-1] > seen[0]

    asyncio.run(run())


def test_the_feed_ends_when_the_server_drains_or_the_engine_dies():
    async def run(end):
        async with feed() as f, aclosing(f.events()) as events:
            await anext(events)
            end(f.engine)
            async with asyncio.timeout(5):
                return [frame async for frame in events]

    def drain(engine):
        engine.draining = True

    def die(engine):
        engine._stopping = True
        engine._wake.set()

    assert asyncio.run(run(drain)) == [] == asyncio.run(run(die))


def test_the_state_is_read_in_the_engines_thread(monkeypatch):
    where = []
    monkeypatch.setattr(live, "snapshot", lambda engine: where.append(threading.current_thread().name) or snapshot(engine))

    async def run():
        async with feed() as f, aclosing(f.events()) as events:
            await anext(events)

    asyncio.run(run())
    assert where == ["jaxpaged-engine"]


@pytest.mark.parametrize("count", [0, 1])
def test_few_sequences_have_no_groups(count):
    engine = make_engine()
    for i in range(count):
        engine.submit(str(i), PREFIX, forever())
    engine.step()
    assert snapshot(engine).groups == []
