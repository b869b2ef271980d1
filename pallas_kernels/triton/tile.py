"""One tile of keys and values: what the decode and the prefill kernel do in each step of their loops."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plt

LOG2E, LN2 = math.log2(math.e), math.log(2)
MASKED = -1e30  # finite: exp2(MASKED - MASKED) must not be NaN


class Static(NamedTuple):
    """What a kernel is compiled for."""

    ratio: int  # query heads a key/value head
    D: int
    page_size: int
    scale: float
    window: int | None
    chunk: int | None
    soft_cap: float | None

    @property
    def span(self) -> int | None:
        """The most keys that a query sees; None: all before it."""
        return min((n for n in (self.window, self.chunk) if n is not None), default=None)

    @property
    def padded_dim(self) -> int:
        """D as a power of two, and enough for a tensor core: Triton's ranges know no other sizes."""
        return max(16, 1 << (self.D - 1).bit_length())


class Cache(NamedTuple):
    """Refs of one layer's cache. Scales: [P, K, G] or None."""

    k_pages: Any  # [P, K, G, D]
    v_pages: Any
    k_scales: Any
    v_scales: Any
    page_table: Any  # [R, M]


class Softmax(NamedTuple):
    """The running softmax of B query rows, in base 2."""

    acc: Array  # float32 [B, D]
    m: Array  # [B] highest score so far
    l: Array  # [B] sum of exp2(score - m)

    @staticmethod
    def start(B: int, D: int) -> Softmax:
        return Softmax(jnp.zeros((B, D), jnp.float32), jnp.full((B,), MASKED, jnp.float32), jnp.zeros((B,), jnp.float32))


def dims(static: Static) -> tuple[Array, Array | None]:
    """Indices of the head dim, and which of them exist (None: all)."""
    d = jnp.arange(static.padded_dim, dtype=jnp.int32)
    return d, None if static.padded_dim == static.D else d < static.D


def divide(t: Array, size: int) -> tuple[Array, Array]:
    """(t // size, t % size) of t >= 0: Python's rounding of negative numbers would cost instructions in the inner loop."""
    if size & (size - 1) == 0:
        return t >> (size.bit_length() - 1), t & (size - 1)
    whole = jnp.full_like(t, size)
    return lax.div(t, whole), lax.rem(t, whole)


def first_seen(static: Static, at: Array) -> Array:
    """The first key that a query at a position >= 0 sees; it never falls as positions rise."""
    first = jnp.zeros_like(at) if static.window is None else jnp.maximum(at - (static.window - 1), 0)
    return first if static.chunk is None else jnp.maximum(first, at - divide(at, static.chunk)[1])


def both(rows: Array | None, columns: Array | None, shape: tuple[int, int]) -> Array | None:
    """The mask [rows, columns] of two masks; None: nothing is masked."""
    if rows is None and columns is None:
        return None
    mask = jnp.ones(shape, jnp.bool_)
    if rows is not None:
        mask &= rows[:, None]
    return mask if columns is None else mask & columns[None, :]


def load(ref: Any, mask: Array | None) -> Array:
    return plt.load(ref) if mask is None else plt.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def step(
    static: Static, N: int, cache: Cache, row: Array, g: Array, q: Array, at: Array, slopes: Array | None, softmax: Softmax,
    first: Array, within: tuple[Array, Array] | None, seen_from_to: tuple[Array, Array] | None,
) -> Softmax:  # fmt: skip
    """Attends to the N keys of a sequence from `first` on.

    q: [B, Dp], at: positions [B], slopes [B] or None. within: the first key that any query sees, and the end of the sequence;
    others are not loaded. seen_from_to: per query the first and last key it sees. None: all of the tile.
    """
    t = first + jnp.arange(N, dtype=jnp.int32)  # [N]
    exists = None if within is None else (t >= within[0]) & (t < within[1])
    pages, offsets = _places(static, cache, row, first, t, exists)
    k = _numbers(cache.k_pages, static, pages, offsets, g, exists).astype(q.dtype)  # [N, Dp]
    v = _numbers(cache.v_pages, static, pages, offsets, g, exists).astype(q.dtype)
    s = _dot(q, k, 1)  # [B, N]
    if cache.k_scales is not None:
        s *= load(cache.k_scales.at[pages, offsets, g], exists)[None, :]
    s = _score(static, s, at, slopes, t)
    if seen_from_to is not None:
        low, high = seen_from_to
        s = jnp.where((t[None, :] >= low[:, None]) & (t[None, :] <= high[:, None]), s, MASKED)
    m = jnp.maximum(softmax.m, jnp.max(s, axis=1))
    shrink = jnp.exp2(softmax.m - m)
    p = jnp.exp2(s - m[:, None])
    l = softmax.l * shrink + jnp.sum(p, axis=1)
    if cache.v_scales is not None:
        p *= load(cache.v_scales.at[pages, offsets, g], exists)[None, :]
    return Softmax(softmax.acc * shrink[:, None] + _dot(p.astype(q.dtype), v, 0), m, l)


def _places(static: Static, cache: Cache, row: Array, first: Array, t: Array, exists: Array | None) -> tuple[Array, Array]:
    """Page and offset of each key: [N]. Where a tile lies within one page, one number is read instead of N equal ones."""
    if static.page_size % t.shape[0] == 0:
        page, offset = divide(first, static.page_size)
        zeros = jnp.zeros_like(t)
        return zeros + plt.load(cache.page_table.at[row, page]), offset + t - first
    nth, offsets = divide(t, static.page_size)
    return load(cache.page_table.at[row, nth], exists), offsets


def _numbers(ref: Any, static: Static, pages: Array, offsets: Array, g: Array, exists: Array | None) -> Array:
    """[N, Dp] of a cache, as it is stored; 0 where nothing exists: there may be NaN, and 0 * NaN is NaN."""
    d, d_exists = dims(static)
    mask = both(exists, d_exists, (offsets.shape[0], static.padded_dim))
    return load(ref.at[pages[:, None], offsets[:, None], g, d[None, :]], mask)


def _dot(a: Array, b: Array, contract_b: int) -> Array:
    """a [B, N] with b, over a's last axis; sums in float32. float32 products are float32's, not tf32's."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = (((1,), (contract_b,)), ((), ()))
    return lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)


def _score(static: Static, s: Array, at: Array, slopes: Array | None, t: Array) -> Array:
    """Scores in base 2 from products."""
    if static.soft_cap is None:
        s *= static.scale * LOG2E
    else:
        s = (static.soft_cap * LOG2E) * jnp.tanh(s * (static.scale / static.soft_cap))
    if slopes is not None:
        s += slopes[:, None] * LOG2E * (t[None, :] - at[:, None]).astype(jnp.float32)
    return s


def finish(softmax: Softmax, sinks: Array | None) -> tuple[Array, Array]:
    """out float32 [B, D] and lse [B] (base 2); sinks [B]: what else takes part in the sum."""
    acc, m, l = softmax
    if sinks is not None:
        highest = jnp.maximum(m, sinks * LOG2E)
        shrink = jnp.exp2(m - highest)
        acc, m, l = acc * shrink[:, None], highest, l * shrink + jnp.exp2(sinks * LOG2E - highest)
    return acc / l[:, None], m + jnp.log2(l)
