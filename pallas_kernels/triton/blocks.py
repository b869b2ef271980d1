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


def decode_blocks(capability: Capability, D: int, itemsize: int) -> Blocks:
    """D: head dim, padded. itemsize: of the queries: bytes of what is multiplied."""
    if D > 128 or itemsize == 4:
        return Blocks(16, 32, 4, 3)
    return Blocks(16, 64, 4, 3)


def prefill_blocks(capability: Capability, D: int, itemsize: int) -> Blocks:
    """The same for chunks. Hopper multiplies 64 rows at once (wgmma), with the sums in registers of 128 threads."""
    narrow = D > 128 or itemsize == 4
    if capability >= HOPPER:
        return Blocks(64 if itemsize == 4 else 128, 32 if narrow else 64, 8, 2)
    return Blocks(64, 32, 8, 2) if narrow else Blocks(64, 64, 8, 3)
