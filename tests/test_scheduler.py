"""The scheduler: a state machine that tries everything, and the rules a user could notice, one by one."""

import numpy as np
import pytest
from fakes import paper_tokens
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxpaged import pages, scheduler
from jaxpaged.reach import Reach
from jaxpaged.request import FinishReason, Request, RequestError, SamplingParams
from jaxpaged.scheduler import Limits

EOS = 3
VOCAB = 7


def limits(**changes) -> Limits:
    base = dict(max_num_seqs=3, max_num_batched_tokens=8, page_size=4, num_pages=9, max_model_len=28, vocab_size=VOCAB)
    return Limits(**{**base, **changes})


def request(name: str, prompt, output: int = 4, arrival: int = 0, **changes) -> Request:
    params = SamplingParams(temperature=0, max_tokens=output)
    return Request(name, tuple(prompt), params, arrival=arrival, stop_ids=frozenset({EOS}),
                   max_total_tokens=len(prompt) + output, **changes)  # fmt: skip


def values(state) -> dict:
    """Everything a state says, read out: to see that it still says the same later."""
    seats = {name: getattr(state.seats, name).copy() for name in state.seats._fields}
    pool = state.pool
    return {
        **seats,
        "table": state.page_table.read().copy(),
        "tokens": state.tokens.read().copy(),
        "refs": pool.refs.read().copy(),
        "valid": pool.valid.read().copy(),
        "full": dict(pool.full.items()),
        "tails": dict(pool.tails.items()),
        "waiting": sorted(key for key, _ in state.waiting.items()),
        "free": pool.num_free,
    }


def assert_same(a: dict, b: dict) -> None:
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name) if isinstance(a[name], np.ndarray) else _equal(
            name, a[name], b[name]
        )


def _equal(name, a, b):
    assert a == b, name


class Machine(RuleBasedStateMachine):
    """Adds, aborts, schedules and commits (late, with random tokens), in any order, with too few pages."""

    LIMITS = limits()

    def __init__(self):
        super().__init__()
        self.limits = self.LIMITS
        self.state = scheduler.initial(self.limits)
        self.in_flight: list = []
        self.alive: dict[str, Request] = {}
        self.outputs: dict[str, list[int]] = {}
        self.count = 0
        self.kept: list = []  # old states and what they said

    def remember(self):
        if len(self.kept) < 4:
            self.kept.append((self.state, values(self.state)))

    @rule(prompt=st.lists(st.integers(0, 2), min_size=1, max_size=14), output=st.integers(1, 8),
          priority=st.integers(0, 1), salt=st.sampled_from(["", "x"]), skip=st.booleans())  # fmt: skip
    def add(self, prompt, output, priority, salt, skip):
        self.remember()
        self.count += 1
        r = request(f"r{self.count}", prompt, output, self.count, priority=priority, cache_salt=salt)
        if skip:
            r = Request(**{**r.__dict__, "params": r.params.clone(skip_reading_prefix_cache=True)})
        self.state = scheduler.add(self.state, r)
        self.alive[r.id], self.outputs[r.id] = r, []

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(sorted(self.alive)))
        self.state = scheduler.abort(self.state, name)
        del self.alive[name]

    @precondition(lambda self: len(self.in_flight) < 2)
    @rule()
    def schedule(self):
        self.remember()
        before = self.state
        self.state, plan = scheduler.schedule(before)
        again, same = scheduler.schedule(before)  # the same input, the same output
        assert_same(values(self.state), values(again))
        assert all(np.array_equal(a, b) for a, b in zip(plan, same))
        self.look_at(before, plan)
        if len(plan.slots):
            self.in_flight.append(plan)
        else:
            assert self.in_flight or not self.alive, "there is work, nothing is in flight, and nothing is scheduled"

    def look_at(self, before, plan):
        assert plan.num_tokens.sum() <= self.limits.max_num_batched_tokens
        assert (plan.num_tokens > 0).all() and len(set(plan.slots.tolist())) == len(plan.slots)
        running = [before.requests.read()[slot] for slot in np.flatnonzero(before.seats.active)]
        if running:
            oldest = min(running, key=lambda r: r.arrival)
            assert oldest.id not in plan.preempted, "the oldest was preempted"
        written = set()
        for slot, start, n in zip(plan.slots, plan.start, plan.num_tokens):
            for g in range(len(self.limits.reaches)):
                first = g * self.limits.max_pages_per_seq
                for page in self.state.page_table.read()[slot, first + start // 4 : first - (-(start + n) // 4)].tolist():
                    assert page not in written, "two rows write one page"
                    written.add(page)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def commit(self, data):
        self.remember()
        plan = self.in_flight.pop(0)
        tokens = np.array(data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=4, max_size=4)), np.int32)
        finite = np.array([data.draw(st.integers(0, 30)) > 0 for _ in range(4)])
        self.state, outputs = scheduler.commit(self.state, plan, tokens, finite)
        for name, _, _, token, reason, row in outputs.items():
            assert name in self.alive, "a token for a request that is gone"
            assert token == tokens[row]
            r, out = self.alive[name], self.outputs[name]
            out.append(token)
            expected = (
                FinishReason.ERROR
                if not finite[row]
                else FinishReason.STOP
                if token == EOS
                else FinishReason.LENGTH
                if len(out) == r.params.max_tokens
                else None
            )
            assert reason == expected
            if reason is not None:
                del self.alive[name]

    @rule()
    def reset(self):
        self.state = scheduler.reset_prefix_cache(self.state)
        assert self.state.pool.num_cached == 0

    @precondition(lambda self: self.in_flight)
    @rule()
    def fail(self):
        failed = set()
        while self.in_flight:
            self.state, ids = scheduler.fail(self.state, self.in_flight.pop(0))
            failed |= set(ids)
        for name in failed:
            del self.alive[name]

    @invariant()
    def holds(self):
        scheduler.check(self.state)
        stats = scheduler.stats(self.state)
        assert stats.num_running + stats.num_waiting == len(self.alive)

    def teardown(self):
        for state, said in self.kept:
            assert_same(values(state), said)  # old states are values still
        assert_same(values(self.state), values(self.state))
        for _ in range(400):
            if not self.alive:
                break
            self.schedule()
            while self.in_flight:
                plan = self.in_flight.pop(0)
                self.state, outputs = scheduler.commit(self.state, plan, np.full(4, EOS, np.int32), np.ones(4, bool))
                for name in outputs.ids:
                    del self.alive[name]
            scheduler.check(self.state)
        assert not self.alive, "work that never ends"
        assert self.state.pool.num_held == 0


class HybridMachine(Machine):
    """With layers that see all, others that see a window, and others that see blocks."""

    LIMITS = limits(num_pages=22, reaches=(Reach(), Reach(window=6), Reach(chunk=8)))


class WindowMachine(Machine):
    """With layers that see a window only."""

    LIMITS = limits(num_pages=7, reaches=(Reach(window=5),))


MANY = settings(max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
TestMachine, TestHybridMachine, TestWindowMachine = Machine.TestCase, HybridMachine.TestCase, WindowMachine.TestCase
TestMachine.settings = TestHybridMachine.settings = TestWindowMachine.settings = MANY


def step(state, tokens=None):
    """One step without overlap; tokens by request id, else 0."""
    state, plan = scheduler.schedule(state)
    given = np.array([(tokens or {}).get(r.id, 0) for r in plan.requests] + [0], np.int32)
    state, outputs = scheduler.commit(state, plan, given, np.ones(len(given), bool))
    scheduler.check(state)
    return state, plan, outputs


def test_two_requests_of_the_same_step_share_their_prefix():
    prompt = [1, 2, 1, 2, 1, 1, 2]
    state = scheduler.initial(limits(max_num_batched_tokens=16))
    state = scheduler.add(state, request("a", prompt, arrival=1))
    state = scheduler.add(state, request("b", prompt, arrival=2))
    state, plan, _ = step(state)
    assert dict(plan.admitted) == {"a": 0, "b": 4}
    table = state.page_table.read()
    assert table[0, 0] == table[1, 0] and table[0, 1] != table[1, 1]
    assert state.pool.refs.read()[table[0, 0]] == 2


def test_a_tail_is_copied_before_it_is_written():
    state = scheduler.initial(limits(max_num_batched_tokens=16))
    state = scheduler.add(state, request("a", [1, 2, 1, 2, 1, 1], 8, arrival=1))
    state, _, _ = step(state)
    state = scheduler.add(state, request("b", [1, 2, 1, 2, 1, 1], 8, arrival=2))
    state, plan, _ = step(state)
    source = state.page_table.read()[0, 1]
    assert dict(plan.admitted) == {"b": 5}  # all but the last token, which must be computed
    assert plan.copies.tolist() == [[source, state.page_table.read()[1, 1]]]


def test_other_salts_share_nothing():
    state = scheduler.initial(limits(max_num_batched_tokens=16))
    state = scheduler.add(state, request("a", [1] * 6, arrival=1, cache_salt="one"))
    state = scheduler.add(state, request("b", [1] * 6, arrival=2, cache_salt="two"))
    state, plan, _ = step(state)
    assert dict(plan.admitted) == {"a": 0, "b": 0}


def test_the_newest_is_preempted_and_comes_back_first():
    state = scheduler.initial(limits(num_pages=5, max_num_batched_tokens=16, max_num_seqs=2, max_model_len=16))
    state = scheduler.add(state, request("old", [1] * 7, 8, arrival=1))
    state = scheduler.add(state, request("new", [2] * 7, 8, arrival=2))
    state = scheduler.add(state, request("later", [2, 1], 1, arrival=3))
    preempted = []
    for _ in range(12):
        state, plan, _ = step(state)
        preempted += plan.preempted
        if plan.preempted:
            assert [r.id for r in plan.requests] == ["old"]
    assert preempted[0] == "new" and "old" not in preempted
    assert scheduler.stats(state).num_preemptions == len(preempted)


def test_fcfs_ignores_priority_and_priority_does_not():
    for policy, first in (("fcfs", "a"), ("priority", "b")):
        state = scheduler.initial(limits(policy=policy, max_num_seqs=1))
        state = scheduler.add(state, request("a", [1, 2], arrival=1, priority=5))
        state = scheduler.add(state, request("b", [1, 2], arrival=2, priority=-1))
        _, plan, _ = step(state)
        assert [r.id for r in plan.requests] == [first]


def test_chunks_share_the_budget_with_decodes():
    state = scheduler.initial(limits(max_num_batched_tokens=5))
    state = scheduler.add(state, request("a", [1, 2], 9, arrival=1))
    state, _, _ = step(state)
    state = scheduler.add(state, request("b", [2] * 9, arrival=2))
    state, plan, _ = step(state)
    assert [(r.id, int(n)) for r, n in zip(plan.requests, plan.num_tokens)] == [("a", 1), ("b", 4)]
    assert plan.num_decode == 1 and plan.samples.tolist() == [True, False]


def test_a_long_prompt_is_capped_by_the_threshold():
    state = scheduler.initial(limits(long_prefill_token_threshold=3))
    state = scheduler.add(state, request("a", [1] * 9, arrival=1))
    _, plan, _ = step(state)
    assert plan.num_tokens.tolist() == [3]


def test_least_recently_released_pages_go_first_and_of_a_chain_the_last():
    state = scheduler.initial(limits(num_pages=7, max_num_seqs=1, max_num_batched_tokens=32, max_model_len=24))
    first, second, big = [1] * 8 + [0], [2] * 8 + [0], [0] * 15
    for i, prompt in enumerate((first, second)):
        state = scheduler.add(state, request(f"r{i}", prompt, 1, arrival=i))
        state, _, _ = step(state)
    state = scheduler.add(state, request("big", big, 1, arrival=2))  # 4 pages: takes the first chain's
    state, _, _ = step(state)
    state = scheduler.add(state, request("again", second, 1, arrival=3))
    state, plan, _ = step(state)
    assert dict(plan.admitted)["again"] >= 4, "the chain that was used later is still there, from its beginning"


def test_what_can_never_fit_is_refused_with_the_numbers():
    state = scheduler.initial(limits(num_pages=4, max_model_len=28))
    with pytest.raises(RequestError, match=r"need 5 pages of 4 tokens, the cache has 3 .* max_tokens to at most 3"):
        scheduler.add(state, request("a", [1] * 10, 10))


HYBRID = (Reach(), Reach(window=5))


def test_pages_that_no_token_to_come_sees_come_back():
    state = scheduler.initial(limits(num_pages=40, max_num_batched_tokens=16, max_model_len=40, reaches=HYBRID))
    state = scheduler.add(state, request("a", [1] * 16, 20, arrival=1))
    state, _, _ = step(state)
    assert state.pool.num_held == 4 + 4  # the window's pages are all written by one chunk
    state, _, _ = step(state)
    assert state.pool.num_held == 5 + 2  # positions 12 to 16
    for _ in range(12):
        state, _, _ = step(state)
    assert state.seats.num_computed[0] == 29 and state.pool.num_held == 8 + 2  # 24 to 28


def test_of_a_prefix_only_what_is_seen_must_be_there():
    """The window's pages of the prefix's beginning are gone: it is shared all the same, unless its end is gone too."""
    prompt = [1] * 8 + [2] * 8
    state = scheduler.initial(limits(num_pages=12, max_num_batched_tokens=16, max_num_seqs=2, reaches=HYBRID))
    state = scheduler.add(state, request("a", prompt + [0], 2, arrival=1))
    for _ in range(3):
        state, _, _ = step(state)
    state = scheduler.add(forget(state, 1), request("b", prompt + [2], 1, arrival=2))
    _, plan = scheduler.schedule(state)
    assert dict(plan.admitted) == {"b": 16}
    _, plan = scheduler.schedule(forget(state, 4))  # the window's last page, too
    assert dict(plan.admitted) == {"b": 0}


def forget(state, n: int):
    """Of the pages that nobody holds, the n that were released first hold nothing any more."""
    num_blank = state.pool.num_free - state.pool.num_cached
    pool, taken = pages.take(state.pool, num_blank + n)
    return state._replace(pool=pages.release(pool, taken))


@pytest.mark.parametrize("reaches", [(Reach(),), (Reach(window=5),), HYBRID, (Reach(), Reach(chunk=8))])
def test_as_many_tokens_fit_as_is_said(reaches):
    given = limits(num_pages=13, max_model_len=400, reaches=reaches)
    longest = given.tokens_in(12)
    assert given.pages_for(longest) <= 12 and (longest == 400 or given.pages_for(longest + 1) > 12)
    state = scheduler.add(scheduler.initial(given), request("a", [1, 2, 1, 2, 2, 1, 1, 1], longest - 8))
    for _ in range(longest):
        state, plan, _ = step(state)
        assert not plan.preempted
    assert not state.slot_of.get("a") and state.pool.num_held == 0
    with pytest.raises(RequestError, match="max_model_len is 400"):
        scheduler.add(state, request("b", [1] * 400, longest))


def test_late_tokens_of_a_freed_slot_are_dropped():
    state = scheduler.initial(limits(max_num_seqs=1))
    state = scheduler.add(state, request("a", [1, 2], arrival=1))
    state, plan = scheduler.schedule(state)
    state = scheduler.abort(state, "a")
    state = scheduler.add(state, request("b", [2, 1, 2], arrival=2))
    state, second = scheduler.schedule(state)
    state, outputs = scheduler.commit(state, plan, np.array([5], np.int32), np.array([True]))
    assert outputs.ids == []
    state, outputs = scheduler.commit(state, second, np.array([6], np.int32), np.array([True]))
    assert (outputs.ids, outputs.tokens) == (["b"], [6])


def test_the_oracle_of_the_paper_cache_stops_where_asked():
    tokens = paper_tokens([1, 2, 3], 50, VOCAB)
    assert len(tokens) == 50 and set(tokens) <= set(range(VOCAB))
    stop = frozenset({tokens[4]})
    assert paper_tokens([1, 2, 3], 50, VOCAB, stop) == tokens[: tokens.index(tokens[4]) + 1]
