"""The journal: what happens to the scheduler's value, as plain values in their order.

Whoever applies the same records to the same first `State` has the same states, plans and batches after each of them (`replay`):
the followers of an engine on many hosts, or a reader of a log. An engine tells its `journal` of

    Added       a request came in: its n sequences (`sequences`) are put into the queue
    Aborted     sequences ended because somebody wished so
    Reset       cached pages were forgotten
    Scheduled   the next step was planned: from here on a plan is in flight, if it computes anything
    Committed   the oldest plan in flight ended with these tokens; and sequences that stop strings ended with them
    Failed      every plan in flight was undone, and if the cache was lost every running sequence ended

in the order in which they happened; Scheduled comes before the step is planned and sent to the device, so that others can plan
it at the same time. Values of a record are never changed afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxpaged.request import Request

VERSION = 1  # of the records' meaning and of how the scheduler treats them: who replays must have the same


@dataclass(frozen=True)
class Added:
    """request: as the engine has admitted it: with its number (arrival), its seed and the ids that stop it."""

    request: Request


@dataclass(frozen=True)
class Aborted:
    """ids: of sequences."""

    ids: tuple[str, ...]


@dataclass(frozen=True)
class Reset:
    pass


@dataclass(frozen=True)
class Scheduled:
    pass


@dataclass(frozen=True, eq=False)
class Committed:
    """tokens int32 [n], finite bool [n]: of the plan's rows, in order. ended: (slot, generation) of those that stop strings
    ended."""

    tokens: np.ndarray
    finite: np.ndarray
    ended: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Failed:
    cache_lost: bool


Record = Added | Aborted | Reset | Scheduled | Committed | Failed
Journal = Callable[[Record], None]


def sequences(request: Request) -> Sequence[Request]:
    """n requests of one sequence each; they share the prompt's pages through the prefix cache."""
    n, params = request.params.n, request.params
    if n == 1:
        return [request]
    seed = params.seed or 0
    return [replace(request, id=f"{request.id}/{i}", params=params.clone(n=1, seed=(seed + i) % 2**64)) for i in range(n)]
