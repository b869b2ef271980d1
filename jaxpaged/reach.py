"""How far back layers see, and so how long a sequence keeps their pages.

Layers that see alike form a *group* (models with one kind of layer have one group). Each group has a page table of its own;
all take their pages from one pool. A page of a group that sees a window only comes back as soon as no token to come sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Reach(NamedTuple):
    """A token at position x sees back to x - window + 1, or to the beginning of its block of `chunk` positions, or, with
    neither, to the beginning."""

    window: int | None = None
    chunk: int | None = None

    @property
    def unlimited(self) -> bool:
        return self.window is None and self.chunk is None

    def first_seen(self, position: Any) -> Any:
        """The first position that a token at `position`, or any after it, sees. Numbers or numpy arrays."""
        if self.window is not None:
            first = position - self.window + 1
            return first * (first > 0)
        return position * 0 if self.chunk is None else position // self.chunk * self.chunk

    def columns(self, page_size: int, max_pages: int, max_tokens: int) -> int:
        """The most pages a sequence holds at once, when a step computes at most `max_tokens` of its tokens."""
        if self.unlimited:
            return max_pages
        seen = self.chunk if self.window is None else self.window - 1
        return min(max_pages, -(-((seen or 0) + max_tokens) // page_size) + 1)


EVERYTHING = (Reach(),)


Places = tuple[tuple[int, int], ...]
"""Of each layer: its group, and its place in it."""


def grouped(reaches: Sequence[Reach], max_model_len: int, most: int = 8) -> tuple[tuple[Reach, ...], Places]:
    """Sorts layers into groups of one size, so that a page of any group is as large as that of any other.

    reaches: of each layer. most: groups; more would make page tables long. Returns the reach of each group, and for each layer
    its group and its place in it. Groups are as large as the rarest kind of layer has layers, or larger; places that no layer
    takes are lost. One group that sees everything, if that costs no more for a sequence of `max_model_len` tokens.
    """
    kinds = sorted(set(reaches), key=lambda reach: (not reach.unlimited, reach.window or 0, reach.chunk or 0))
    counts = [sum(reach == kind for reach in reaches) for kind in kinds]
    size = min(counts)
    while sum(-(-count // size) for count in counts) > most:
        size += 1
    tokens = [min(max_model_len, kind.window or kind.chunk or max_model_len) for kind in kinds]
    cost = sum(-(-count // size) * size * n for count, n in zip(counts, tokens))
    if len(kinds) > 1 and cost >= len(reaches) * max_model_len:
        return EVERYTHING, tuple((0, i) for i in range(len(reaches)))
    first = [sum(-(-count // size) for count in counts[:k]) for k in range(len(kinds))]
    seen, places = dict.fromkeys(kinds, 0), []
    for reach in reaches:
        nth, seen[reach] = seen[reach], seen[reach] + 1
        places.append((first[kinds.index(reach)] + nth // size, nth % size))
    groups = [kind for kind, count in zip(kinds, counts) for _ in range(-(-count // size))]
    return tuple(groups), tuple(places)
