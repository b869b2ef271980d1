"""Where leaves go: the devices that hold each, and which region of it.

A leaf is never on the host as a whole if it is cut and its parts can be read by themselves; one part is under way at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

Leaves = Mapping[str, jax.ShapeDtypeStruct]
"""Dotted path -> shape, dtype and, if it has one, sharding."""

Region = tuple[tuple[int, int], ...]
"""[begin, end) along each axis."""

ALIGNMENT = 64  # bytes: XLA on CPU takes such a buffer as it is, without a copy


class Piece(NamedTuple):
    """What a device holds of a leaf: an array of `shape`, made of regions of the leaf that lie one behind the other along
    `axis`; zeros where they end before it does."""

    device: jax.Device | None  # None: JAX's default
    regions: tuple[Region, ...]
    axis: int
    shape: tuple[int, ...]


class Home(Protocol):
    """Where leaves go."""

    def pieces(self, path: str, shape: tuple[int, ...], sharding: Any) -> Sequence[Piece]:
        """Those of this process's devices. sharding: what the leaf itself says about it, None: nothing."""
        ...

    def join(self, path: str, shape: tuple[int, ...], sharding: Any, parts: Sequence[jax.Array]) -> jax.Array:
        """One array of the pieces, in their order."""
        ...


class AsLeavesSay:
    """Leaves have a sharding, or go to JAX's default device."""

    def pieces(self, path: str, shape: tuple[int, ...], sharding: Any) -> Sequence[Piece]:
        if sharding is None:
            return [Piece(None, (whole(shape),), 0, shape)]
        found = []
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            slices: tuple[slice, ...] = index or ()
            region = tuple(s.indices(n)[:2] for s, n in zip(slices, shape))
            found.append(Piece(device, (region,), 0, tuple(end - begin for begin, end in region)))
        return found

    def join(self, path: str, shape: tuple[int, ...], sharding: Any, parts: Sequence[jax.Array]) -> jax.Array:
        return parts[0] if sharding is None else jax.make_array_from_single_device_arrays(shape, sharding, list(parts))


AS_LEAVES_SAY = AsLeavesSay()


def whole(shape: Sequence[int]) -> Region:
    return tuple((0, n) for n in shape)


def put(home: Home, path: str, array: Any, sharding: Any = None) -> jax.Array:
    """A whole leaf, on the host or a device, goes where it belongs."""
    shape = tuple(array.shape)
    pieces = home.pieces(path, shape, sharding)
    if all(piece.regions == (whole(shape),) and piece.shape == shape for piece in pieces):
        return home.join(path, shape, sharding, [_there(array, piece.device) for piece in pieces])
    array = np.asarray(array)

    def fill(region: Region, out: np.ndarray) -> None:
        out[...] = array[tuple(slice(*pair) for pair in region)]

    return _filled(home, path, shape, array.dtype, sharding, pieces, fill)


def read(home: Home, path: str, leaf: jax.ShapeDtypeStruct, fill: Callable[[Region, np.ndarray], None]) -> jax.Array:
    """A leaf whose regions `fill` writes into arrays on the host, one piece at a time."""
    shape = tuple(leaf.shape)
    return _filled(home, path, shape, leaf.dtype, leaf.sharding, home.pieces(path, shape, leaf.sharding), fill)


def _filled(home: Home, path: str, shape: tuple[int, ...], dtype: Any, sharding: Any, pieces: Sequence[Piece],
            fill: Callable[[Region, np.ndarray], None]) -> jax.Array:  # fmt: skip
    """Each different piece is made once, for all devices that hold it."""
    same: dict[Any, list[int]] = {}
    for i, piece in enumerate(pieces):
        same.setdefault(piece[1:], []).append(i)
    parts: dict[int, jax.Array] = {}
    for numbers in same.values():
        out = _made(pieces[numbers[0]], dtype, fill)
        parts |= {i: _there(out, pieces[i].device) for i in numbers}
    return home.join(path, shape, sharding, [parts[i] for i in range(len(pieces))])


def _made(piece: Piece, dtype: Any, fill: Callable[[Region, np.ndarray], None]) -> np.ndarray:
    out, at = empty(piece.shape, dtype), 0
    for region in piece.regions:
        size = region[piece.axis][1] - region[piece.axis][0] if region else 0
        fill(region, out[(slice(None),) * piece.axis + (slice(at, at + size),)] if region else out)
        at += size
    if piece.shape and at < piece.shape[piece.axis]:
        out[(slice(None),) * piece.axis + (slice(at, None),)] = 0
    return out


def _there(array: Any, device: jax.Device | None) -> jax.Array:
    """On the device: a transfer that is under way would keep the host's copy alive."""
    return jax.block_until_ready(jax.device_put(array, device))


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """As np.empty, aligned so that a CPU device takes it over without a copy."""
    dtype = np.dtype(dtype)
    raw = np.empty(math.prod(shape) * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + len(raw) - ALIGNMENT].view(dtype).reshape(shape)
