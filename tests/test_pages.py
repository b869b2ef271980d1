"""The page pool against a plain model of its rules: who holds what, what can be found, and which page goes next."""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxpaged import pages

NUM_PAGES, K = 9, 4
KEYS = [f"key {i}".encode() for i in range(6)]


def parent_of(page: int) -> bytes:
    """A page has one parent while it lives; here for ever, and some share theirs."""
    return f"parent {page % 3}".encode()


class Machine(RuleBasedStateMachine):
    """`model` holds, by page: holders; `cached`: free pages that can be found, the next one to go first."""

    def __init__(self):
        super().__init__()
        self.pool = pages.create(NUM_PAGES, K)
        self.holders = dict.fromkeys(range(1, NUM_PAGES), 0)
        self.cached: list[int] = []
        self.full: dict[bytes, int] = {}
        self.tails: dict[bytes, tuple[int, tuple]] = {}
        self.old: list[tuple[pages.Pool, dict]] = []

    def free(self) -> list[int]:
        return [page for page, holders in self.holders.items() if not holders]

    def held(self) -> list[int]:
        return [page for page, holders in self.holders.items() if holders]

    def forget(self, page: int) -> None:
        self.full = {key: p for key, p in self.full.items() if p != page}
        self.tails = {key: tail for key, tail in self.tails.items() if tail[0] != page}

    def is_full(self, page: int) -> bool:
        return page in self.full.values()

    def draw_pages(self, data, among: list[int]) -> list[int]:
        return data.draw(st.lists(st.sampled_from(among), unique=True, min_size=1))

    @rule(n=st.integers(0, NUM_PAGES - 1))
    def take(self, n):
        blank = set(self.free()) - set(self.cached)
        if n > len(self.free()):
            with pytest.raises(AssertionError, match=f"{n} pages wanted, {len(self.free())} free"):
                pages.take(self.pool, n)
            return
        self.pool, taken = pages.take(self.pool, n)
        taken, num_blank = taken.tolist(), min(n, len(blank))
        assert set(taken[:num_blank]) <= blank and len(set(taken)) == n, "blank pages go first"
        assert taken[num_blank:] == self.cached[: n - num_blank], "then those that were released first"
        del self.cached[: n - num_blank]
        for page in taken:
            self.holders[page] = 1
            self.forget(page)

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def release(self, data):
        chain = self.draw_pages(data, self.held())
        self.pool = pages.release(self.pool, np.array(chain))
        for page in reversed(chain):
            self.holders[page] -= 1
            found = self.is_full(page) or page in [tail for tail, _ in self.tails.values()]
            if not self.holders[page] and found:
                self.cached.append(page)

    @precondition(lambda self: self.held() or self.cached)
    @rule(data=st.data())
    def hold(self, data):
        chain = self.draw_pages(data, self.held() + self.cached)
        self.pool = pages.hold(self.pool, chain)
        for page in chain:
            self.holders[page] += 1
        self.cached = [page for page in self.cached if page not in chain]

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def publish(self, data):
        chain = self.draw_pages(data, self.held())
        keys = data.draw(st.lists(st.sampled_from(KEYS), min_size=len(chain), max_size=len(chain)))
        self.pool = pages.publish(self.pool, chain, keys)
        for page, key in zip(chain, keys):
            if key not in self.full and not self.is_full(page):
                self.forget(page)
                self.full[key] = page

    @precondition(lambda self: self.held())
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 2), max_size=K - 1).map(tuple))
    def publish_tail(self, data, tokens):
        page = data.draw(st.sampled_from(self.held()))
        self.pool = pages.publish_tail(self.pool, page, parent_of(page), tokens)
        if tokens and not self.is_full(page):
            old = self.tails.get(parent_of(page), (0,))[0]
            self.cached = [page for page in self.cached if page != old]  # nobody can find it any more
            self.tails[parent_of(page)] = page, tokens

    @rule()
    def reset(self):
        self.pool = pages.reset(self.pool)
        self.cached, self.full, self.tails = [], {}, {}

    @rule()
    def remember(self):
        self.old.append((self.pool, self.said(self.pool)))

    @precondition(lambda self: self.old)
    @rule(data=st.data())
    def look_back(self, data):
        pool, said = data.draw(st.sampled_from(self.old))
        pages.check(pool)
        assert self.said(pool) == said

    def said(self, pool: pages.Pool) -> dict:
        return {
            "holders": dict(enumerate(pool.refs.read().tolist())),
            "full": dict(pool.full.items()),
            "tails": dict(pool.tails.items()),
            "free": pool.num_free,
            "cached": pool.num_cached,
        }

    @invariant()
    def the_pool_is_what_the_model_says(self):
        pages.check(self.pool)
        assert self.said(self.pool) == {
            "holders": {0: 0, **self.holders},
            "full": self.full,
            "tails": self.tails,
            "free": len(self.free()),
            "cached": len(self.cached),
        }


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None,
                                suppress_health_check=list(HealthCheck))  # fmt: skip


# -- matching --------------------------------------------------------------------------------------------------------------


def sequence(pool: pages.Pool, tokens: list[int], salt: str = "") -> tuple[pages.Pool, list[int]]:
    """Takes pages for a sequence and publishes them, the last one as a tail."""
    pool, taken = pages.take(pool, -(-len(tokens) // K))
    parent, keys = pages.root(salt), []
    for words in pages.split(np.array(tokens, np.int32), K):
        parent = pages.page_key(parent, words)
        keys.append(parent)
    pool = pages.publish(pool, taken[: len(keys)].tolist(), keys)
    rest = tuple(tokens[len(keys) * K :])
    pool = pages.publish_tail(pool, int(taken[-1]), parent, rest) if rest else pool
    pages.check(pool)
    return pool, taken.tolist()


def found(pool: pages.Pool, tokens: list[int], salt: str = "") -> tuple[list[int], int, int]:
    match = pages.match(pool, np.array(tokens, np.int32), salt)
    (shared,) = match.pages
    assert len(match.keys) == len(shared)
    return shared, match.tail, match.tail_tokens


def test_the_longest_known_prefix_is_found_but_one_token_is_left():
    pool, (a, b, c) = sequence(pages.create(NUM_PAGES, K), [1, 2, 3, 4, 5, 6, 7, 8, 9, 9])
    assert found(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 0]) == ([a, b], c, 2)
    assert found(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9, 9]) == ([a, b], c, 1)
    assert found(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 9, 9]) == ([a, b], c, 1)
    assert found(pool, [1, 2, 3, 4, 5, 6, 7, 8]) == ([a], -1, 0)
    assert found(pool, [1, 2, 3, 4, 0, 6, 7, 8, 9, 9, 9]) == ([a], -1, 0)
    assert found(pool, [1, 2, 3]) == found(pool, [5, 6, 7, 8, 9]) == found(pool, [1]) == ([], -1, 0)


def test_the_same_tokens_after_others_or_with_another_salt_are_not_found():
    pool, (first, *_) = sequence(pages.create(NUM_PAGES, K), [1, 1, 1, 1, 2, 2, 2, 2], "mine")
    assert found(pool, [2, 2, 2, 2, 2], "mine") == found(pool, [1, 1, 1, 1, 1], "yours") == ([], -1, 0)
    assert found(pool, [1, 1, 1, 1, 1], "mine") == ([first], -1, 0)


def test_of_a_released_chain_the_end_goes_first_and_later_chains_stay():
    pool, first = sequence(pages.create(8, K), [1] * 13)
    pool, second = sequence(pool, [2] * 12)
    pool = pages.release(pages.release(pool, np.array(first)), np.array(second))
    assert (pool.num_free, pool.num_cached) == (7, 7)
    pool, taken = pages.take(pool, 2)
    assert taken.tolist() == first[:1:-1]
    assert found(pool, [1] * 13)[0] == first[:2] and found(pool, [2] * 12)[0] == second[:2]
    pool = pages.release(pages.hold(pool, first[:2]), np.array(first[:2]))  # used again: it goes last now
    pool, taken = pages.take(pool, 3)
    assert taken.tolist() == second[::-1]
    assert found(pool, [1] * 13)[0] == first[:2]


def test_the_queue_survives_many_releases():
    """More entries than the ring is long, most of them stale, while the oldest of all still counts."""
    pool, chain = sequence(pages.create(4, K), [1] * 12)
    pool = pages.release(pool, np.array(chain))
    for page in chain[:2] * 20:
        pool = pages.release(pages.hold(pool, [page]), np.array([page]))
        pages.check(pool)
    assert pages.take(pool, 3)[1].tolist() == [chain[2], *chain[:2]]
