"""Whoever replays an engine's journal, sent as bytes, builds the same batches, whatever happens to the engine."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from fakes import FakeRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import chat_tokenizer

from jaxpaged import scheduler, wire
from jaxpaged.adapter import Adapter, Table
from jaxpaged.batch import Batch, ladder
from jaxpaged.engine import Engine
from jaxpaged.follower import Steps
from jaxpaged.journal import Aborted, Added, Committed, Failed, Record, Reset, Scheduled
from jaxpaged.leader import ClusterError
from jaxpaged.reach import Reach
from jaxpaged.replay import Replay
from jaxpaged.request import PoolingParams, Request, SamplingParams
from jaxpaged.scheduler import Limits
from jaxpaged.wire import WireError

TOKENIZER = chat_tokenizer()
ADAPTERS = [
    Adapter(
        f"adapter {i}",
        f"key {i}",
        "here",
        i,
        {"layers.0.q": Table(np.full((i, 3), i, np.float32), np.ones((2, i), np.float16))},
    )
    for i in (1, 2, 3)
]


class Recorder(FakeRunner):
    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.batches: list[Batch] = []

    def dispatch(self, batch: Batch) -> Any:
        self.batches.append(batch)
        return super().dispatch(batch)


@dataclass
class Pair:
    """An engine on paper, and what replays its journal, which gets there as bytes."""

    limits: Limits
    fail_at: frozenset[int] = frozenset()
    overlap: bool = True
    batches: list[Batch] = field(default_factory=list)  # of the replay
    frames: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        buckets = ladder(self.limits.max_num_batched_tokens, self.limits.max_num_seqs)
        self.runner = Recorder(self.limits, self.fail_at)
        self.engine = Engine(self.limits, self.runner, buckets, TOKENIZER, frozenset({7}), async_scheduling=self.overlap)
        self.engine.journal = self.send
        self.replay, self.writer, self.reader = Replay(self.limits, buckets), wire.Writer(), wire.Reader()

    def send(self, record: Record) -> None:
        self.frames.append(wire.encode(self.writer.step([record])))
        for one in self.reader.records(wire.decode(self.frames[-1])):
            batch = self.replay.apply(one)
            if batch is not None:
                self.batches.append(batch)

    def drain(self) -> dict[str, Any]:
        outputs = {}
        while self.engine.has_work:
            outputs |= {output.request_id: output for output in self.engine.step()}
        return outputs

    def check(self) -> None:
        assert len(self.batches) == len(self.runner.batches)
        for mine, theirs in zip(self.batches, self.runner.batches):
            assert equal(mine, theirs), f"{mine}\n\n{theirs}"
        scheduler.check(self.replay.state)
        assert scheduler.stats(self.replay.state) == self.engine.stats()


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Adapter):
        return (a.name, a.key, a.source, a.rank) == (b.name, b.key, b.source, b.rank) and equal(a.tables, b.tables)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


def limits(**changes: Any) -> Limits:
    base = dict(max_num_seqs=4, max_num_batched_tokens=16, page_size=4, num_pages=40, max_model_len=64,
                vocab_size=TOKENIZER.vocab_size)  # fmt: skip
    return Limits(**{**base, **changes})


STOPPING = "abcdefghijklmnopqrstuvwxyz0123456789 "  # one of them soon ends any text
sampling = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0, 0.7]), top_p=st.sampled_from([1.0, 0.9]), max_tokens=st.integers(1, 20),
    seed=st.sampled_from([None, 2**64 - 1, -(2**63)]), ignore_eos=st.booleans(), min_tokens=st.sampled_from([0, 1]),
    stop=st.sampled_from([None, list(STOPPING[:8]), list(STOPPING)]), stop_token_ids=st.sampled_from([(), (3, 4)]),
    presence_penalty=st.sampled_from([0.0, 0.1]), logit_bias=st.sampled_from([None, {5: 0.1}]),
    bad_words=st.sampled_from([(), ("ab", "the")]), logprobs=st.sampled_from([None, 2]), extra_args=st.just({"mine": object()}),
)  # fmt: skip
pooling = st.builds(PoolingParams, pooling=st.sampled_from(["last", "mean"]))
one = st.tuples(
    st.lists(st.integers(0, 2), min_size=1, max_size=30),  # few words: many shared prefixes
    st.one_of(sampling, sampling, sampling.filter(lambda p: p.temperature > 0).map(lambda p: p.clone(n=3)), pooling),
    st.integers(0, 3),  # adapter, 0: none
    st.integers(0, 4),  # steps before the next
    st.sampled_from(["", "", "abort", "reset"]),
)


@settings(max_examples=150, deadline=None)
@given(
    load=st.lists(one, min_size=1, max_size=8),
    fail_at=st.frozensets(st.integers(1, 20), max_size=2),
    overlap=st.booleans(),
    pipeline=st.sampled_from([1, 1, 3]),
    num_pages=st.integers(20, 40),
    policy=st.sampled_from(["fcfs", "priority"]),
    reaches=st.sampled_from([(Reach(),), (Reach(), Reach(window=7))]),
)
def test_a_follower_builds_the_same_batches(load, fail_at, overlap, pipeline, num_pages, policy, reaches):
    pair = Pair(limits(num_pages=num_pages * len(reaches), policy=policy, max_loras=2, pipeline=pipeline, reaches=reaches),
                fail_at, overlap)  # fmt: skip
    for number, (prompt, params, adapter, steps, event) in enumerate(load):
        options = {"priority": number % 3, "adapter": ADAPTERS[adapter - 1] if adapter else None, "prompt_text": "not sent"}
        pair.engine.submit(str(number), prompt, params, **options)
        for _ in range(steps):
            pair.engine.step()
        if event == "abort":
            pair.engine.abort(str(number // 2))
        if event == "reset":
            pair.engine.reset_prefix_cache()
    assert len(pair.drain()) <= len(load)
    pair.check()


def test_preemption_sharing_adapters_and_stop_strings_are_all_followed():
    pair = Pair(limits(num_pages=24, max_loras=1))
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    for i in range(4):
        pair.engine.submit(f"long {i}", [1, 2, 3, 4, 5, 6, 7, 8, i], greedy)
    for i in range(4):
        pair.engine.submit(f"adapted {i}", [9, 9, i], greedy, adapter=ADAPTERS[i % 2])
        pair.engine.submit(f"stopped {i}", [8, i], greedy.clone(stop=list(STOPPING)))
    outputs = pair.drain()
    pair.check()
    stats = pair.engine.stats()
    assert stats.num_preemptions and stats.prefix_hits, "this load is to be a hard one"
    assert any(outputs[f"stopped {i}"].outputs[0].stop_reason for i in range(4))
    assert sum(len(batch.loads) for batch in pair.batches) >= 2
    tables = [frame for frame in pair.frames if b"layers.0.q" in frame]
    assert len(tables) == 2, "each adapter goes over once"


@pytest.mark.parametrize("cache_lost", [False, True])
def test_a_failed_step_is_followed_and_so_is_a_lost_cache(cache_lost, monkeypatch):
    """A step has one of three sequences that run: only with the cache are the others lost too."""
    pair = Pair(limits(max_num_seqs=3, pipeline=3), fail_at=frozenset({4}), overlap=False)
    monkeypatch.setattr(pair.runner, "recover", lambda: cache_lost)
    for i in range(4):
        pair.engine.submit(str(i), [i, 2, 3], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    outputs = pair.drain()
    reasons = [outputs[str(i)].outputs[0].finish_reason for i in range(4)]
    assert reasons.count("error") == (3 if cache_lost else 1) and reasons[3] == "length"
    pair.check()


def test_an_engine_without_a_journal_says_nothing_and_a_step_says_what_it_did():
    pair, records = Pair(limits()), []
    pair.engine.journal = records.append
    pair.engine.submit("a", [1, 2], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    pair.engine.abort("nobody")
    pair.drain()
    kinds = [type(record) for record in records]
    assert kinds[:3] == [Added, Scheduled, Scheduled] and kinds.count(Committed) == 2 and Aborted not in kinds
    request = records[0].request
    assert (request.id, request.arrival, request.max_total_tokens) == ("a", 1, 4)


# -- a follower's steps ----------------------------------------------------------------------------------------------------


def followed(change=lambda record: record):
    """A follower on paper that has taken all steps of a short load. change: to what each record becomes."""
    pair, records = Pair(limits()), []
    pair.engine.journal = records.append
    pair.engine.submit("a", [1, 2, 3], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    pair.drain()
    runner = Recorder(pair.limits)
    steps = Steps(pair.limits, ladder(16, 4), runner)
    for record in records:
        steps.take(change(record))
    return pair, steps, runner


def test_a_follower_takes_the_leaders_steps():
    pair, steps, runner = followed()
    assert all(map(equal, runner.batches, pair.runner.batches)) and len(runner.batches) == len(pair.runner.batches) > 3
    assert np.array_equal(runner.cache, pair.runner.cache), "what its device has written is what the leader's has"
    steps.finish()
    assert runner.closed


def test_a_follower_that_samples_something_else_does_not_go_on():
    def wrong(record):
        return Committed(record.tokens + 1, record.finite) if isinstance(record, Committed) else record

    with pytest.raises(ClusterError, match="do not run the same program"):
        followed(wrong)


def test_a_follower_does_not_go_on_after_a_failed_step():
    with pytest.raises(ClusterError, match="a step of the leader failed"):
        followed(lambda record: Failed(False) if isinstance(record, Committed) else record)


# -- bytes -----------------------------------------------------------------------------------------------------------------

PARAMS = SamplingParams(n=2, stop=["x"], seed=2**64 - 1, logit_bias={5: 1.5}, allowed_token_ids=[1, 2], bad_words=["q"],
                        prompt_logprobs=1)  # fmt: skip
REQUEST = Request("a", (1, 2, 70_000), PARAMS, 3, 4, "salt", frozenset({4}), 9, None, ((1, 2), (3,)))
MOST = SamplingParams(top_k=2**64 - 1, min_tokens=2**64 - 1, max_tokens=2**64 - 1, repetition_penalty=10**30, seed=-(2**63),
                      presence_penalty=1, temperature=2, top_p=1, min_p=1, stop_token_ids=[2**64 - 1],
                      logit_bias={2**64 - 1: -100})  # fmt: skip  # whatever a request may say fits into a message
RECORDS = [
    Added(REQUEST), Added(Request("b", (1,), MOST, -(2**63))), Aborted(("a/0", "ü")), Reset(), Scheduled(), Failed(True),
    Committed(np.array([5, -1], np.int32), np.array([True, False]), ((3, 2**40),)),
]  # fmt: skip


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_records_come_back_as_they_went(record):
    (back,) = wire.Reader().records(wire.decode(wire.encode(wire.Writer().step([record]))))
    assert type(back) is type(record) and equal(tuple(vars(back).values()), tuple(vars(record).values()))


def test_an_adapter_of_bfloat16_comes_back_as_it_went():
    import ml_dtypes

    table = Table(np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(2, 3).T, np.zeros((0, 2), np.float32))
    added = Added(Request("a", (1,), SamplingParams(), adapter=Adapter("n", "k", "s", 2, {"p": table})))
    (back,) = wire.Reader().records(wire.decode(wire.encode(wire.Writer().step([added]))))
    assert equal(back.request.adapter, added.request.adapter)


def test_a_follower_forgets_adapters_that_the_leader_has_not_named_for_long():
    writer, reader = wire.Writer(), wire.Reader()
    for i in range(wire.MAX_ADAPTERS + 5):
        added = Added(Request("a", (1,), SamplingParams(), adapter=Adapter("n", f"key {i}", "s", 1, {})))
        reader.records(wire.decode(wire.encode(writer.step([added]))))
    assert len(reader._known) == wire.MAX_ADAPTERS


GOOD = wire.encode(wire.Writer().step(RECORDS))
PLACES = st.integers(0, len(GOOD) - 1)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=60), st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), st.integers(0, len(GOOD) - 1)
    )
)
def test_other_bytes_are_refused_or_are_messages_all_the_same(change):
    """Never anything but a WireError."""
    data = change
    if isinstance(change, int):
        data = GOOD[:change]
    if isinstance(change, tuple):
        data = GOOD[: change[0]] + bytes([change[1]]) + GOOD[change[0] + 1 :]
    try:
        message = wire.decode(data)
        if isinstance(message, wire.Step):
            wire.Reader().records(message)
    except WireError:
        pass


def learn(a):
    return wire.Learn("n", "k", "s", 1, {"p": (a, wire.Numbers("float32", (0,), b""))})


BAD_STEPS = {
    "names an adapter that has not been sent": wire.Add(REQUEST, "who?"),
    "do not fit together": wire.Commit(b"123", b"1", ()),
    "are no array": learn(wire.Numbers("float32", (2, 3), b"1234")),
    "no array of 'object'": learn(wire.Numbers("object", (1,), b"12345678")),
    "no array of 'float32' \\(-1, -1\\)": learn(wire.Numbers("float32", (-1, -1), b"1234")),
}


@pytest.mark.parametrize("message", BAD_STEPS)
def test_entries_that_do_not_fit_are_refused(message):
    step = wire.decode(wire.encode(wire.Step([BAD_STEPS[message]])))
    with pytest.raises(WireError, match=message):
        wire.Reader().records(step)


def test_values_that_no_request_has_are_refused():
    data = wire.encode(wire.Step([wire.Add(REQUEST, "")])).replace(
        b"\xabtemperature\xcb\x3f\xf0", b"\xabtemperature\xcb\x4f\xf0"
    )
    with pytest.raises(WireError, match="temperature must be a number in"):
        wire.decode(data)
