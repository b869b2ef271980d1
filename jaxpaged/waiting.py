"""The queue of waiting requests: a leftist heap (Crane 1972) of immutable nodes, so that adding and taking cost
O(log n) and old states keep theirs. An aborted request's entry stays until it comes up.

Nodes are (rank, entry, left, right), entries (priority, arrival, id).
"""

from __future__ import annotations

from typing import Any

from jaxpaged.request import Request
from jaxpaged.state import Limits, State, Waiting


def _merge(a: Any, b: Any) -> Any:
    if a is None or b is None:
        return a or b
    if b[1] < a[1]:
        a, b = b, a
    left, right = a[2], _merge(a[3], b)
    if left is None or left[0] < right[0]:
        left, right = right, left
    return (1 if right is None else right[0] + 1), a[1], left, right


def key_of(limits: Limits, request: Request) -> tuple[int, int, str]:
    return (request.priority if limits.policy == "priority" else 0), request.arrival, request.id


def push(state: State, waiting: Waiting) -> State:
    node = (1, key_of(state.limits, waiting.request), None, None)
    return state._replace(heap=_merge(state.heap, node), waiting=state.waiting.set(waiting.request.id, waiting))


def peek(state: State) -> tuple[State, Waiting | None]:
    """The next in the queue. Entries of requests that were aborted are dropped on the way."""
    heap = state.heap
    while heap is not None:
        waiting = state.waiting.get(heap[1][2])
        if waiting is not None and waiting.request.arrival == heap[1][1]:
            return state._replace(heap=heap), waiting
        heap = _merge(heap[2], heap[3])
    return state._replace(heap=None), None


def pop(state: State, waiting: Waiting) -> State:
    heap = state.heap
    return state._replace(heap=_merge(heap[2], heap[3]), waiting=state.waiting.delete(waiting.request.id))
