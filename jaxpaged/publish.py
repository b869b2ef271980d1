"""Publishing: what makes a sequence's pages findable by their content (see `pages` for keys and tails)."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxpaged import pages
from jaxpaged.state import State, copied, spread


def full_pages(state: State, slots: np.ndarray) -> State:
    """Publishes the pages of `slots` that are full of known tokens and computed or about to be."""
    if not state.limits.enable_prefix_caching:
        return state
    s, K = state.seats, state.limits.page_size
    full = np.minimum(s.num_computed[slots], s.num_known[slots]) // K
    more = full > s.num_published[slots]
    if not np.count_nonzero(more):  # five times as fast as any()
        return state
    slots, full = slots[more], full[more]
    row, column = spread(s.num_published[slots], full)
    tokens = state.tokens.read().reshape(len(s.active), -1, K)[slots[row], column]
    parents: Any = state.parents.read()[slots]
    keys: list[pages.Key] = []
    for i, words in zip(row.tolist(), pages.split(tokens, K)):
        parents[i] = pages.page_key(parents[i], words)
        keys.append(parents[i])
    seats = copied(s, "num_published")
    seats.num_published[slots] = full
    pool, table, M = state.pool, state.page_table.read(), state.limits.max_pages_per_seq
    for g in range(len(state.limits.reaches)):
        there = column >= s.dropped[slots[row], g]
        found = table[slots[row], column + g * M][there].tolist()
        pool = pages.publish(pool, found, [pages.of_group(key, g) for key, is_in in zip(keys, there.tolist()) if is_in])
    return state._replace(pool=pool, seats=seats, parents=state.parents.set(slots, parents))


def tail(state: State, slot: int, upto: int) -> State:
    """Files the partly filled page that ends at position `upto` of a slot whose full pages are published."""
    K = state.limits.page_size
    full = upto // K
    if len(state.limits.reaches) > 1:  # each group has a tail of its own: pages are shared whole
        return state
    if not state.limits.enable_prefix_caching or upto % K == 0 or state.seats.num_published[slot] != full:
        return state
    tokens = tuple(state.tokens.read()[slot, full * K : upto].tolist())
    page = int(state.page_table.read()[slot, full])
    return state._replace(pool=pages.publish_tail(state.pool, page, state.parents.read()[slot], tokens))
