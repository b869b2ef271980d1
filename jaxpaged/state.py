"""The scheduler's values: its limits, its state, the plan of a step and what a step gave.

A slot is the permanent seat of a running sequence: an index into every array of the state. Floor of the control loop:
numpy only.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from jaxpaged import pages, residents
from jaxpaged.adapter import Adapter
from jaxpaged.pages import NULL_PAGE, Pool
from jaxpaged.reach import EVERYTHING, Reach
from jaxpaged.request import FinishReason, Request, SamplingParams
from jaxpaged.residents import Residents
from jaxpaged.versioned import Array, Map

NUM_STOPS = 8  # stop ids of a sequence that are compared for all slots at once; sequences with more are looked at singly
NO_TOKEN = -1

WISH = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("seed", np.uint32, 2),  # high and low word
        ("presence", np.float32),
        ("frequency", np.float32),
        ("repetition", np.float32),
        ("edits_until", np.int32),  # the logits are edited for rows with less output than this
        ("num_logprobs", np.int32),  # alternatives to list; -1: no logprobs
        ("prompt_logprobs", np.bool_),
    ],
    align=True,
)
NEVER, ALWAYS = np.iinfo(np.int32).min, np.iinfo(np.int32).max  # of edits_until


@dataclass(frozen=True)
class Limits:
    """The fixed sizes of a scheduler. num_pages counts the null page. reaches: of the groups of layers (see `reach`).
    max_loras: adapters that are on the device at once. whole_prompts: a prompt is computed in one step, and only to be pooled
    (tokens see those that come after them). pipeline: stages that steps go through, each at another one at a time: so many
    steps are in flight, of other sequences each."""

    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    num_pages: int
    max_model_len: int
    vocab_size: int
    policy: str = "fcfs"
    enable_prefix_caching: bool = True
    long_prefill_token_threshold: int = 0
    reaches: tuple[Reach, ...] = EVERYTHING
    max_loras: int = 0
    whole_prompts: bool = False
    pipeline: int = 1

    @property
    def max_pages_per_seq(self) -> int:
        """Of one group: M."""
        return -(-self.max_model_len // self.page_size)

    @cached_property
    def columns(self) -> tuple[int, ...]:
        """The most pages that a sequence holds at once, of each group."""
        tokens = min(self.max_num_batched_tokens, self.long_prefill_token_threshold or self.max_num_batched_tokens)
        return tuple(reach.columns(self.page_size, self.max_pages_per_seq, tokens) for reach in self.reaches)

    def pages_for(self, num_tokens: int) -> int:
        """The most pages, of all groups, that a sequence of so many tokens holds at once."""
        return sum(min(-(-num_tokens // self.page_size), most) for most in self.columns)

    def tokens_in(self, num_pages: int) -> int:
        """The longest sequence that so many pages are enough for, at most max_model_len."""
        needed = lambda pages: self.pages_for(pages * self.page_size)
        at_most = bisect_right(range(1, self.max_pages_per_seq + 1), num_pages, key=needed)
        return min(at_most * self.page_size, self.max_model_len)


class Waiting(NamedTuple):
    """A request in the queue. `tokens`: its prompt, and what it had generated if it was preempted."""

    request: Request
    tokens: np.ndarray
    preempted: bool


class Seats(NamedTuple):
    """Small per-slot arrays [S], copied when changed."""

    active: np.ndarray  # bool
    generation: np.ndarray  # int64: counts the sequences a slot has had
    num_prompt: np.ndarray  # int32, all below too
    num_tokens: np.ndarray
    num_known: np.ndarray
    num_computed: np.ndarray
    num_pages: np.ndarray
    num_published: np.ndarray  # full pages
    dropped: np.ndarray  # [S, groups]: first pages that are given back: no token to come sees them
    max_total: np.ndarray
    priority: np.ndarray  # int64
    arrival: np.ndarray  # int64
    lagging: np.ndarray  # bool: must not run ahead of what the host knows (bad words of several tokens; a pipeline)
    pooling: np.ndarray  # bool: samples nothing, and ends when its tokens are computed
    adapter: np.ndarray  # int32: the place of its LoRA adapter
    stops: np.ndarray  # int32 [S, NUM_STOPS], padded with NO_TOKEN


class State(NamedTuple):
    """A tuple: making the next one costs a fifth of what `dataclasses.replace` does."""

    limits: Limits
    pool: Pool
    seats: Seats
    requests: Array  # object [S]
    parents: Array  # object [S]: key of the last published page
    tokens: Array  # int32 [S, M K]: whole pages
    page_table: Array  # int32 [S, groups * M]: the first group's pages, the second's, ...
    wishes: Array  # WISH [S + 1]: what a slot's request wants from the sampler; the last one is a padding row's
    slot_of: Map  # request id -> slot
    waiting: Map  # request id -> Waiting
    heap: Any = None
    num_preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    residents: Residents = ()


class Plan(NamedTuple):
    """One step, in batch order: decodes (one token) first, then chunks."""

    slots: np.ndarray  # int64 [n], numpy's own type of index: others are converted whenever they are used
    generations: np.ndarray  # int64
    start: np.ndarray  # first position; int32, as the next
    num_tokens: np.ndarray
    samples: np.ndarray  # bool: reaches the sequence's end
    pools: np.ndarray  # bool: so does this one, of a sequence that is pooled
    num_decode: int
    copies: np.ndarray  # int32 [c, 2]: (source page, destination page)
    requests: tuple[Request, ...]
    admitted: tuple[tuple[str, int], ...]  # (id, tokens found in the cache)
    preempted: tuple[str, ...]
    loads: tuple[tuple[int, Adapter], ...] = ()  # adapters that must be put to a place before the step


class Outputs(NamedTuple):
    """What a step sampled, a live sequence each; a pooled one ends with NO_TOKEN."""

    ids: list[str]
    slots: list[int]
    generations: list[int]
    tokens: list[int]
    reasons: list[FinishReason | None]
    rows: list[int]

    def items(self) -> Iterator[tuple[str, int, int, int, FinishReason | None, int]]:
        return zip(*self)


@dataclass(frozen=True)
class Stats:
    num_running: int
    num_waiting: int
    num_held_pages: int
    num_cached_pages: int
    num_free_pages: int
    num_preemptions: int
    prefix_queries: int
    prefix_hits: int


def initial(limits: Limits) -> State:
    S, M, K = limits.max_num_seqs, limits.max_pages_per_seq, limits.page_size
    ints = lambda: np.zeros(S, np.int32)
    groups = len(limits.reaches)
    seats = Seats(np.zeros(S, bool), np.zeros(S, np.int64), ints(), ints(), ints(), ints(), ints(), ints(),
                  np.zeros((S, groups), np.int32), ints(), np.zeros(S, np.int64), np.zeros(S, np.int64),
                  np.zeros(S, bool), np.zeros(S, bool), np.full(S, residents.NONE, np.int32),
                  np.full((S, NUM_STOPS), NO_TOKEN, np.int32))  # fmt: skip
    nobody = np.full(S + 1, np.array(wish(SamplingParams(temperature=0), limits.vocab_size), WISH))
    return State(limits, pages.create(limits.num_pages, limits.page_size), seats, Array(np.full(S, None, object)),
                 Array(np.full(S, None, object)), Array(np.zeros((S, M * K), np.int32)),
                 Array(np.zeros((S, groups * M), np.int32)),
                 Array(nobody), Map(), Map(),
                 residents=(residents.Resident(),) * limits.max_loras)  # fmt: skip


def wish(p: SamplingParams, vocab_size: int) -> tuple:
    """An entry of `State.wishes`."""
    others = (p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0 or p.logit_bias or p.bad_words
              or p.allowed_token_ids is not None)  # fmt: skip
    edits_until = ALWAYS if others else min(p.min_tokens, ALWAYS) if p.min_tokens else NEVER
    width = -1 if p.logprobs is None else vocab_size if p.logprobs == -1 else p.logprobs
    return (
        p.temperature, min(p.top_k, vocab_size), p.top_p, p.min_p, divmod((p.seed or 0) % 2**64, 2**32),
        p.presence_penalty, p.frequency_penalty, p.repetition_penalty,
        edits_until, width, p.prompt_logprobs is not None,
    )  # fmt: skip


def stats(state: State) -> Stats:
    pool = state.pool
    return Stats(len(state.slot_of), len(state.waiting), pool.num_held, pool.num_cached, pool.num_free,
                 state.num_preemptions, state.prefix_queries, state.prefix_hits)  # fmt: skip


def held_by(state: State, slot: int) -> np.ndarray:
    """The pages that a slot holds, the first group's first."""
    table, M = state.page_table.read()[slot], state.limits.max_pages_per_seq
    end, dropped = int(state.seats.num_pages[slot]), state.seats.dropped[slot].tolist()
    return np.concatenate([table[g * M + first : g * M + end] for g, first in enumerate(dropped)])


def copied(seats: Seats, *names: str) -> Seats:
    return seats._replace(**{name: getattr(seats, name).copy() for name in names})


def spread(first: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row i and column j of every place with first[i] <= j < end[i] in a ragged table, row by row."""
    first, count = first.astype(np.int64), end - first
    if np.count_nonzero(count == 1) == len(count):  # a decode step
        return np.arange(len(first)), first
    row = np.repeat(np.arange(len(first)), count)
    return row, np.arange(len(row)) + (end - np.cumsum(count))[row]


def check(state: State) -> None:
    """Raises AssertionError if an invariant is broken. O(everything): for tests and idle moments."""
    s, pool, K = state.seats, state.pool, state.limits.page_size
    refs = pool.refs.read()
    holders = np.zeros(pool.num_pages, np.int64)
    for slot in np.flatnonzero(s.active).tolist():
        held = held_by(state, slot)
        assert NULL_PAGE not in held and len(set(held.tolist())) == len(held), f"slot {slot} holds {held}"
        np.add.at(holders, held, 1)
        assert s.num_computed[slot] <= s.num_tokens[slot] <= s.max_total[slot], f"slot {slot}: counts {_row(s, slot)}"
        assert s.num_known[slot] <= s.num_tokens[slot], f"slot {slot}: counts {_row(s, slot)}"
        assert s.num_pages[slot] == -(-s.num_computed[slot] // K), f"slot {slot}: pages {_row(s, slot)}"
        for reach, first in zip(state.limits.reaches, s.dropped[slot].tolist()):
            assert first * K <= reach.first_seen(s.num_computed[slot]), f"slot {slot}: pages that are seen were given back"
        request: Any = state.requests.read()[slot]
        assert state.slot_of[request.id] == slot
        there = state.residents[s.adapter[slot]].key if s.adapter[slot] >= 0 else None
        assert there == (request.adapter and request.adapter.key), f"slot {slot}: {there} is where its adapter was"
    wrong = np.flatnonzero(holders != refs)
    assert not len(wrong), f"pages {wrong.tolist()} have {refs[wrong]} references, {holders[wrong]} holders"
    assert pool.num_held == int((refs > 0).sum()), f"{pool.num_held} pages counted as held, {(refs > 0).sum()} are"
    assert len(state.slot_of) == int(s.active.sum())
    pages.check(pool)


def _row(seats: Seats, slot: int) -> dict[str, Any]:
    return {name: getattr(seats, name)[slot].tolist() for name in Seats._fields}
