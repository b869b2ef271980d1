"""Which engine gets a request: who shares goes where it is remembered, while that is not too busy; nothing is lost count of."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpaged.adapter import Adapter
from jaxpaged.request import PoolingParams, SamplingParams
from jaxpaged.router import EXACT, RUNNING, TYPICAL_OUTPUT, Route, Router, _lengths

PAGE = 4
GREEDY = SamplingParams(temperature=0, max_tokens=1)


def words(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


def make(num_engines=3, num_pages=1000, max_num_seqs=64) -> Router:
    return Router(num_engines, PAGE, num_pages, max_num_seqs)


class Traffic:
    """Requests that are sent where the router says."""

    def __init__(self, router: Router):
        self.router, self.count = router, 0

    def send(self, prompt, params=GREEDY, **options) -> int:
        """The engine that got it."""
        route = self.router.route(prompt, params, **options)
        self.router.began(str(self.count), route)
        self.count += 1
        return route.engine

    def send_and_end(self, prompt, params=GREEDY, **options) -> int:
        engine = self.send(prompt, params, **options)
        self.router.ended(str(self.count - 1))
        return engine


def test_the_turns_of_a_conversation_go_to_the_same_engine():
    traffic = Traffic(make())
    said = {name: words(1000 * name, 40) for name in range(6)}
    homes = {name: traffic.send_and_end(prompt) for name, prompt in said.items()}
    assert set(homes.values()) == {0, 1, 2}, "what has nothing in common is spread"
    for turn in range(5):
        for name in said:
            said[name] += words(10_000 * (name + 1) + 100 * turn, 17)
            assert traffic.send_and_end(said[name]) == homes[name]


def test_a_prefix_is_followed_only_as_far_as_it_saves():
    router = make(2)
    traffic = Traffic(router)
    prefix = words(0, 10 * PAGE)
    home = traffic.send_and_end(prefix)
    other = 1 - home
    for i in range(4):  # 12 tokens to compute and one to generate each time, and the prefix saves 40
        assert router.loads[home] == i * (12 + RUNNING) < 40
        assert traffic.send([*prefix, *words(100 + 50 * i, 12)]) == home
    assert router.loads[home] == 49 > 40
    assert traffic.send([*prefix, *words(400, 12)]) == other and router.loads[other] == 52.25
    assert traffic.send([*prefix, *words(500, 12)]) == home, "now both have it: less load is here"


@pytest.mark.parametrize("seats, homely", [(64, 4), (2, 3)])
def test_who_would_have_to_wait_for_a_seat_goes_elsewhere_sooner(seats, homely):
    traffic = Traffic(make(2, max_num_seqs=seats))
    prefix, talk = words(0, 64 * PAGE), SamplingParams(max_tokens=None)
    home = traffic.send_and_end(prefix)
    found = [traffic.send(prefix, talk) for _ in range(homely + 1)]
    assert found == [home] * homely + [1 - home]


def test_load_decides_between_strangers():
    traffic = Traffic(make())
    assert traffic.send(words(0, 40)) == 0
    assert [traffic.send(words(100 * i, 10)) for i in range(1, 10)] == [1, 2, 1, 2, 1, 2, 1, 2, 0]


def test_outputs_count_as_far_as_they_are_known():
    router, typical = make(2), RUNNING * TYPICAL_OUTPUT
    traffic = Traffic(router)
    assert traffic.send([1, 2], SamplingParams(max_tokens=None, n=2)) == 0
    assert router.loads == [2 + 2 * typical, 0]
    assert traffic.send([3], SamplingParams(max_tokens=10**6)) == 1 and router.loads[1] == 1 + typical
    assert traffic.send(words(5, 30), PoolingParams()) == 1 and router.loads[1] == 31 + typical
    assert traffic.send([4], SamplingParams(max_tokens=4)) == 1 and router.loads[1] == 32 + typical + 4 * RUNNING


def test_a_prompt_that_has_been_computed_weighs_no_more():
    router = make(2)
    traffic = Traffic(router)
    traffic.send(words(0, 100))
    router.computed(0, 60)
    assert router.loads == [40 + RUNNING, 0]
    router.computed(0, 1000)
    assert router.loads == [RUNNING, 0]
    router.ended("0")
    assert router.loads == [0, 0]
    router.ended("0")
    assert router.loads == [0, 0], "an end that is told twice changes nothing"


def test_a_prompt_that_will_not_be_computed_weighs_no_more():
    """Its client has left, while the engine has something else to do."""
    router = make(2)
    traffic = Traffic(router)
    traffic.send(words(0, 1000))
    traffic.send(words(1, 100))
    traffic.send(words(2, 100))
    assert [router.engine_of(name) for name in "012"] == [0, 1, 1]
    router.began("3", router.route([7], GREEDY)._replace(engine=0))
    router.ended("0", computed=False)
    assert router.loads[0] == 1 + RUNNING


def test_salts_and_adapters_do_not_share():
    router = make(2)
    prompt, a, b = words(0, 40), Adapter("a", "a@1", "", 4, {}), Adapter("b", "b@1", "", 4, {})
    Traffic(router).send_and_end(prompt, cache_salt="s", adapter=a)
    matched = lambda *of: router.route(prompt, GREEDY, *of).matched
    assert matched("s", a) == 40
    assert matched("s", b) == matched("t", a) == matched("s", None) == matched("", None) == 0


def test_text_and_ids_are_followed_each_among_its_kind():
    router = make(2)
    text = "You are a helpful assistant, \N{SNOWMAN}. " * 8
    Traffic(router).send_and_end(text)
    assert router.route(text + "More.", GREEDY).matched > 0.8 * len(text) / 4
    assert router.route("\udc80" + text, GREEDY).matched == 0  # half a character is text too
    assert router.route(list(text.encode()), GREEDY).matched == 0


def test_what_is_no_prompt_is_left_for_the_engine_to_refuse():
    for prompt in ([1.5], ["a"], [None], [2**40], [], ""):
        assert make().route(prompt, GREEDY).marks == ()


def test_one_engine_is_not_thought_about():
    assert make(1).route(words(0, 100), GREEDY) == Route(0)


def test_without_a_cache_nothing_is_remembered():
    router = make(2, num_pages=0)
    traffic = Traffic(router)
    assert [traffic.send(words(0, 40)) for _ in range(4)] == [0, 1, 0, 1] and router.num_remembered == [0, 0]


def test_an_emptied_cache_is_forgotten():
    router = make(2)
    Traffic(router).send_and_end(words(0, 40))
    assert router.route(words(0, 40), GREEDY).matched == 40
    router.forget()
    assert router.route(words(0, 40), GREEDY).matched == 0 and router.num_remembered == [0, 0]


def test_what_was_used_last_is_remembered_and_beginnings_outlive_ends():
    router = make(2, num_pages=20)
    matched = lambda prompt: router.route(prompt, GREEDY).matched
    old, new = words(0, 10 * PAGE), words(1000, 15 * PAGE)
    for i, prompt in enumerate((old, new)):
        router.began(str(i), router.route(prompt, GREEDY)._replace(engine=0))
        router.ended(str(i))
    assert matched(new) == 15 * PAGE and matched(old) == 5 * PAGE
    assert router.num_remembered == [20, 0]


def test_few_hashes_are_enough_for_a_long_prompt():
    lengths = list(_lengths(10_000))
    assert lengths[:EXACT] == list(range(1, EXACT + 1)) and len(lengths) < 80
    assert all(longer - shorter <= max(1, shorter / 8) for shorter, longer in zip(lengths, lengths[1:]))
    assert list(_lengths(100)) == [n for n in lengths if n <= 100], "the same for all prompts"


prompts = st.lists(st.integers(0, 1), max_size=40)  # few words: many shared prefixes


@settings(max_examples=200, deadline=None)
@given(prompts, prompts, st.integers(2, 4))
def test_what_is_matched_is_shared_and_nearly_all_that_is(first, second, num_engines):
    router = make(num_engines)
    home = router.route(first, GREEDY)
    router.began("a", home)
    router.ended("a")
    shared = next((i for i, (x, y) in enumerate(zip(first, second)) if x != y), min(len(first), len(second)))
    route = router.route(second, GREEDY)
    assert route.matched == shared // PAGE * PAGE and route.tokens == len(second)
    assert not route.matched or route.engine == home.engine


events = st.lists(st.one_of(prompts, st.integers(0, 30), st.tuples(st.integers(0, 3), st.integers(0, 50))), max_size=40)


@settings(max_examples=200, deadline=None)
@given(events, st.integers(1, 12))
def test_loads_are_never_negative_memory_is_bounded_and_all_ends_at_nothing(events, num_pages):
    router, live = make(4, num_pages, 2), []
    for i, event in enumerate(events):
        if isinstance(event, list):
            route = router.route(event, GREEDY)
            assert router.route(event, GREEDY) == route, "asking changes nothing"
            assert router.loads[route.engine] - min(router.loads) <= route.matched, (
                "no cache is waited for longer than it saves"
            )
            router.began(str(i), route)
            live.append(str(i))
        elif isinstance(event, int) and live:
            router.ended(live.pop(event % len(live)))
        elif isinstance(event, tuple):
            router.computed(*event)
        assert min(router.loads) >= 0 and max(router.num_remembered) <= num_pages
    for request_id in live:
        assert router.engine_of(request_id) is not None
        router.ended(request_id)
        assert router.engine_of(request_id) is None
    assert router.loads == [0, 0, 0, 0]
