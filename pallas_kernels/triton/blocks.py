"""Block sizes of the attention kernels: what compiles without spilling registers and fits shared memory on each generation.

Chosen by compiling for an H200, an A100 and an L40S (docs/kernels.md has the table). None of it has been timed.
"""

from __future__ import annotations

from typing import NamedTuple

Capability = tuple[int, int]
HOPPER: Capability = (9, 0)


class Blocks(NamedTuple):
    """rows: of queries x heads in a program. tile: keys a step of its loop. stages: of the software pipeline; reading the
    page ids takes one of them."""

    rows: int
    tile: int
    warps: int
    stages: int


def decode_blocks(D: int, itemsize: int) -> Blocks:
    """D: head dim, padded. itemsize: of the queries: bytes of what is multiplied."""
    return Blocks(16, 32 if D > 128 or itemsize == 4 else 64, 4, 3)


def prefill_blocks(D: int, itemsize: int, capability: Capability) -> Blocks:
    """The same for chunks. Hopper multiplies 64 rows at once (wgmma), with the sums in registers of 128 threads."""
    if D > 128 or itemsize == 4:
        return Blocks(64, 32, 8, 2)
    return Blocks(128, 64, 8, 2) if capability >= HOPPER else Blocks(64, 64, 8, 3)
