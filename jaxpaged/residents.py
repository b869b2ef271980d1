"""Which LoRA adapters are on the device: a few places, taken over from the one used longest ago. Pure functions.

A sequence that runs keeps its adapter where it is. One that waits for a place waits in the queue, and those behind it too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxpaged.adapter import Adapter

NONE = -1  # the place of a sequence without an adapter


class Resident(NamedTuple):
    """What is at a place: an adapter's key ("": nothing), and the arrival of the last request that came for it."""

    key: str = ""
    last_used: int = 0


Residents = tuple[Resident, ...]


def place(residents: Residents, in_use: np.ndarray, adapter: Adapter) -> int | None:
    """Where an adapter is or may be put; None if every place is taken by one that is in use. in_use: places of the running
    sequences."""
    for i, resident in enumerate(residents):
        if resident.key == adapter.key:
            return i
    taken = set(in_use.tolist())
    free = [i for i in range(len(residents)) if i not in taken]
    return min(free, key=lambda i: residents[i].last_used) if free else None


def moved_in(residents: Residents, at: int, key: str, arrival: int) -> Residents:
    return (*residents[:at], Resident(key, arrival), *residents[at + 1 :])


def forget(residents: Residents, in_use: np.ndarray) -> Residents:
    """After a failed step nobody knows what was written; sequences that still run had theirs before it."""
    return tuple(resident if i in in_use else Resident() for i, resident in enumerate(residents))
