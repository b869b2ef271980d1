"""How layers are sorted into groups, and what a sequence then takes."""

import numpy as np
import pytest

from jaxpaged import scheduler
from jaxpaged.reach import Reach, grouped
from jaxpaged.request import Request, SamplingParams
from jaxpaged.state import Limits

FULL, SLIDING, BLOCK = Reach(), Reach(window=1024), Reach(chunk=8192)
GEMMA_3_27B = ([SLIDING] * 5 + [FULL]) * 10 + [SLIDING] * 2
LONG = 131072


@pytest.mark.parametrize(
    "reaches, groups",
    [
        ([FULL] * 32, (FULL,)),
        ([SLIDING] * 32, (SLIDING,)),
        ([SLIDING, FULL] * 12, (FULL, SLIDING)),
        (GEMMA_3_27B, (FULL, *[SLIDING] * 6)),
        ([BLOCK, BLOCK, BLOCK, FULL] * 12, (FULL, *[BLOCK] * 3)),
        ([FULL] + [SLIDING] * 27, (FULL, *[SLIDING] * 7)),  # not 28 page tables
    ],
)
def test_groups_have_one_size(reaches, groups):
    found, places = grouped(reaches, LONG)
    assert found == groups and len(set(places)) == len(reaches)
    assert all(found[group] == reach for reach, (group, _) in zip(reaches, places))
    size = 1 + max(place for _, place in places)
    assert size * len(groups) - len(reaches) < 2 * size  # little is lost


def test_short_sequences_are_one_group():
    """Where nobody would give a page back, more page tables are good for nothing."""
    assert grouped(GEMMA_3_27B, 1024)[0] == (FULL,)


@pytest.mark.parametrize("reach, seen", [(FULL, [0, 0, 0]), (Reach(window=5), [0, 0, 6]), (Reach(chunk=4), [0, 4, 8])])
def test_the_first_position_that_is_seen(reach, seen):
    assert [reach.first_seen(position) for position in (0, 4, 10)] == seen


def test_pages_before_the_current_chunk_are_given_back():
    """A layer with chunks of 128 positions holds the pages from where its chunk began, one with everything all of them."""
    limits = Limits(max_num_seqs=1, max_num_batched_tokens=32, page_size=16, num_pages=200, max_model_len=1024, vocab_size=9,
                    reaches=(FULL, Reach(chunk=128)))  # fmt: skip
    request = Request("a", (1,) * 900, SamplingParams(temperature=0, max_tokens=100), arrival=0, max_total_tokens=1000)
    state, at = scheduler.add(scheduler.initial(limits), request), 0
    while state.waiting or state.slot_of:
        state, plan = scheduler.schedule(state)
        chunk = at // 128 * 128  # of the step's first token
        at = int(state.seats.num_computed[0])
        pages = -(-at // 16)
        assert 199 - state.pool.num_free == pages + pages - chunk // 16
        state, _ = scheduler.commit(state, plan, np.zeros(1, np.int32), np.ones(1, bool))
    assert at > 900 and state.pool.num_free == 199


def most_running(reaches: tuple[Reach, ...], num_pages: int, asked: int) -> int:
    """Of `asked` sequences of 32k tokens, the most that run at once while none is ever preempted."""
    limits = Limits(max_num_seqs=asked, max_num_batched_tokens=2048, page_size=32, num_pages=num_pages + 1,
                    max_model_len=32768, vocab_size=9, reaches=reaches)  # fmt: skip
    state, most = scheduler.initial(limits), 0
    for i in range(asked):
        prompt = (i % 9,) * 32000
        nothing = SamplingParams(temperature=0, max_tokens=768)
        state = scheduler.add(state, Request(str(i), prompt, nothing, arrival=i, max_total_tokens=32768, cache_salt=str(i)))
    while state.waiting or state.slot_of:
        state, plan = scheduler.schedule(state)
        most = max(most, len(state.slot_of))
        assert not plan.preempted
        state, _ = scheduler.commit(state, plan, np.zeros(asked, np.int32), np.ones(asked, bool))
    return most


def test_gemma_at_32k_holds_more_than_four_times_the_sequences():
    """In the memory that four sequences take, if all is kept in all 62 layers."""
    reaches, places = grouped(GEMMA_3_27B, 32768)
    layers = 1 + max(place for _, place in places)  # of a page
    full, hybrid = 4 * 1024, 4 * 1024 * 62 // layers
    assert most_running((FULL,), full, 6) == 4
    assert most_running(reaches, hybrid, 24) >= 4 * 4
