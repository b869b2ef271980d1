"""Admission: a waiting request gets a place for its adapter, what it shares with others, pages of its own and a seat."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from jaxpaged import pages, publish, residents
from jaxpaged import waiting as queue
from jaxpaged.adapter import Adapter
from jaxpaged.request import Request
from jaxpaged.state import NO_TOKEN, NUM_STOPS, Seats, State, Waiting, copied, wish


@dataclass
class Draft:
    """A plan in the making."""

    slots: np.ndarray
    counts: np.ndarray
    budget: int
    preempted: list[str]
    copies: list[tuple[int, int]] = field(default_factory=list)
    borrowed: list[int] = field(default_factory=list)  # held until the end: a copy's source must not be given away
    admitted: list[tuple[str, int]] = field(default_factory=list)
    loads: list[tuple[int, Adapter]] = field(default_factory=list)


def place(state: State, request: Request) -> int | None:
    """Where its adapter is or may be put, residents.NONE if it has none; None if every place is taken."""
    if request.adapter is None:
        return residents.NONE
    return residents.place(state.residents, state.seats.adapter[state.seats.active], request.adapter)


def lodge(state: State, slot: int, place: int, request: Request, draft: Draft) -> State:
    """The request's adapter is at its place, or will be when the step runs."""
    adapter = request.adapter
    if state.seats.adapter[slot] != place:
        seats = copied(state.seats, "adapter")
        seats.adapter[slot] = place
        state = state._replace(seats=seats)
    if adapter is None:
        return state
    if state.residents[place].key != adapter.key:
        draft.loads.append((place, adapter))
    return state._replace(residents=residents.moved_in(state.residents, place, adapter.key, request.arrival))


def match(state: State, waiting: Waiting) -> pages.Match:
    if not state.limits.enable_prefix_caching or waiting.request.params.skip_reading_prefix_cache:
        return pages.Match([], tuple([] for _ in state.limits.reaches))
    return pages.match(state.pool, waiting.tokens, waiting.request.salt, state.limits.reaches)


def has_room(state: State, waiting: Waiting, found: pages.Match) -> bool:
    """All pages of the known tokens, counting those that sharing would take out of the free ones."""
    refs, limits = state.pool.refs.read(), state.limits
    shared = _shared(found)
    revived = sum(1 for page in shared if refs[page] == 0)
    rest = -(-len(waiting.tokens) // limits.page_size) - len(found.keys)
    own = sum(min(rest, most - len(group)) for most, group in zip(limits.columns, found.pages))
    return own + revived <= state.pool.num_free


def _shared(found: pages.Match) -> list[int]:
    return [*(page for group in found.pages for page in group), *([found.tail] if found.tail >= 0 else [])]


def seat(state: State, slot: int, waiting: Waiting, found: pages.Match, draft: Draft) -> tuple[State, int]:
    """Gives a request a slot, its pages, and its first chunk. Returns how many tokens that has."""
    limits, tokens, groups = state.limits, waiting.tokens, len(state.limits.reaches)
    cached = len(found.keys) * limits.page_size + found.tail_tokens
    count = min(len(tokens) - cached, draft.budget, limits.long_prefill_token_threshold or len(tokens))
    own = -(-(cached + count) // limits.page_size) - len(found.keys)
    pool = pages.hold(state.pool, _shared(found))
    pool, fresh = pages.take(pool, own * groups)
    if found.tail >= 0:  # a tail is shared by copying it: its sharer writes into it at once
        draft.copies.append((found.tail, int(fresh[0])))
        draft.borrowed.append(found.tail)
    draft.budget -= count
    draft.admitted.append((waiting.request.id, cached))
    state = state._replace(pool=pool, prefix_queries=state.prefix_queries + len(tokens), prefix_hits=state.prefix_hits + cached)
    state = _sit_down(state, slot, waiting, cached + count, found, fresh.reshape(groups, own))
    return publish.full_pages(state, np.array([slot])), count


def _sit_down(state: State, slot: int, waiting: Waiting, num_computed: int, found: pages.Match, fresh: np.ndarray) -> State:
    """fresh: its own pages, [groups, n]."""
    request, tokens, full = waiting.request, waiting.tokens, len(found.keys)
    held = [[*shared, *own] for shared, own in zip(found.pages, fresh.tolist())]
    dropped = [full - len(shared) for shared in found.pages]
    columns = [g * state.limits.max_pages_per_seq + first + np.arange(len(held[g])) for g, first in enumerate(dropped)]
    seats = Seats(*(array.copy() for array in state.seats))
    seats.active[slot] = True
    seats.num_prompt[slot], seats.num_tokens[slot], seats.num_known[slot] = len(request.prompt), len(tokens), len(tokens)
    seats.num_computed[slot], seats.num_pages[slot], seats.num_published[slot] = num_computed, full + fresh.shape[1], full
    seats.dropped[slot] = dropped
    seats.max_total[slot] = request.max_total_tokens
    seats.priority[slot], seats.arrival[slot], _ = queue.key_of(state.limits, request)
    seats.lagging[slot] = state.limits.pipeline > 1 or any(len(word) > 1 for word in request.bad_words_ids)
    seats.pooling[slot] = request.pooling is not None
    seats.stops[slot] = (sorted(request.stop_ids) + [NO_TOKEN] * NUM_STOPS)[:NUM_STOPS]
    parent = found.keys[-1] if found.keys else pages.root(request.salt)
    return state._replace(
        seats=seats, page_table=state.page_table.set((slot, np.concatenate(columns)), np.concatenate(held)),
        tokens=state.tokens.set((slot, slice(0, len(tokens))), tokens), requests=state.requests.set(slot, request),
        parents=state.parents.set(slot, parent), slot_of=state.slot_of.set(request.id, slot),
        wishes=state.wishes.set(slot, wish(request.params, state.limits.vocab_size)),
    )  # fmt: skip
