"""Publishing: what makes a sequence's pages findable by their content (see `pages` for keys and tails)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from jaxpaged import pages
from jaxpaged.state import State, copied


def full_pages(state: State, slots: Sequence[int]) -> State:
    """Publishes the pages of `slots` that are full of known tokens and computed or about to be."""
    if not state.limits.enable_prefix_caching or not len(slots):
        return state
    K, seats, pool = state.limits.page_size, copied(state.seats, "num_published"), state.pool
    parents = {}
    for slot in slots:
        full = int(min(seats.num_computed[slot], seats.num_known[slot])) // K
        parent, tokens, table = state.parents.read()[slot], state.tokens.read()[slot], state.page_table.read()[slot]
        for i in range(int(seats.num_published[slot]), full):
            parent = pages.page_key(parent, tokens[i * K : (i + 1) * K])
            pool = pages.publish(pool, int(table[i]), parent)
        seats.num_published[slot], parents[slot] = full, parent
    index = np.fromiter(parents, np.int64, len(parents))
    values = np.empty(len(parents), object)
    values[:] = list(parents.values())
    return replace(state, pool=pool, seats=seats, parents=state.parents.set(index, values))


def tail(state: State, slot: int, upto: int) -> State:
    """Files the partly filled page that ends at position `upto` of a slot whose full pages are published."""
    K = state.limits.page_size
    full = upto // K
    if not state.limits.enable_prefix_caching or upto % K == 0 or state.seats.num_published[slot] != full:
        return state
    tokens = tuple(state.tokens.read()[slot, full * K : upto].tolist())
    page = int(state.page_table.read()[slot, full])
    return replace(state, pool=pages.publish_tail(state.pool, page, state.parents.read()[slot], tokens))


def with_full_pages(state: State, slots: np.ndarray) -> np.ndarray:
    """Those of `slots` that have pages to publish."""
    s = state.seats
    full = np.minimum(s.num_computed[slots], s.num_known[slots]) // state.limits.page_size
    return slots[full > s.num_published[slots]]
