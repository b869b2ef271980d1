"""Truncated sampling in plain jnp. No sort of the vocabulary and no random number for each of its words.

- Truncation is a threshold: what top-k and top-p keep depends on values only, so both bisect for the value from which on
  words are kept. One probe is one pass over [R, V] that counts or adds.
- Probabilities are whole numbers: after temperature, min-p and top-k a row becomes integers that add up to about 2^30.
  Integer sums are exact in any order. So a row's token does not depend on the rows beside it, and a draw from the
  cumulative sum can neither run off its end nor hit a word of probability 0. The price: probabilities below 2^-31 are 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float32, Int32, UInt32

TOTAL_BITS = 30  # a row's weights add up to (2^29, 2^30], and a little for rounding: below 2^31 for any V < 2^30
BLOCK = 256  # the draw picks a block of this many words, then a word of it


def sample(
    logits: Float32[Array, "R V"],
    temperature: Float32[Array, " R"],
    top_k: Int32[Array, " R"],
    top_p: Float32[Array, " R"],
    min_p: Float32[Array, " R"],
    bits: UInt32[Array, "R 2"],
) -> Int32[Array, " R"]:
    """See `pallas_kernels.ops.sample`."""
    weights = _weights(logits, temperature, top_k, min_p)
    weights = jnp.where(weights >= _top_p_level(weights, top_p)[:, None], weights, 0)
    return _draw(weights, bits)


# -- truncation ------------------------------------------------------------------------------------------------------------


def _weights(logits: Float32[Array, "R V"], temperature: Array, top_k: Array, min_p: Array) -> Int32[Array, "R V"]:
    """Whole numbers int32 [R, V] in proportion to the probabilities after temperature, min-p and top-k.

    Greedy rows keep the highest words only. The scale is a power of two, so that scaling rounds nothing."""
    is_greedy = temperature == 0
    highest = jnp.max(logits, axis=1)
    floor = jnp.where(is_greedy, highest, _top_k_floor(logits, highest, top_k))
    temperature = jnp.where(is_greedy, jnp.float32(1), temperature)
    odds = jnp.exp((logits - highest[:, None]) / temperature[:, None])  # relative to the most probable word
    odds = jnp.where((logits >= floor[:, None]) & (odds >= min_p[:, None]), odds, 0)  # NaN: 0
    exponent = lax.shift_right_logical(bits_of(jnp.sum(odds, axis=1)), 23) - 127  # of the sum, which is in [1, V]
    scale = floats_of(lax.shift_left(127 + TOTAL_BITS - 1 - exponent, 23))
    return jnp.round(odds * scale[:, None]).astype(jnp.int32)


def bits_of(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def floats_of(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.float32)


def ordered(x: Array) -> Array:
    """Float bits <-> integers in the order of the floats (its own inverse). int32 -> int32."""
    return jnp.where(x < 0, x ^ 0x7FFFFFFF, x)


class _Search(NamedTuple):
    """Bisection state [R]: `measure(low) >= need > measure(high)`. `above_*`: the measures."""

    low: Array
    high: Array
    above_low: Array
    above_high: Array


def _bisect(start: _Search, need: Array, measure: Callable[[Array], Array], settled: Callable[[_Search], Array]) -> Array:
    """The largest t [R] with measure(t) >= need (or one that keeps the same words, once `settled` says so).

    Rows stop the loop together, but what a row keeps does not depend on when: a probe more does not change the set."""

    def probe(s: _Search) -> _Search:
        middle = (s.low & s.high) + ((s.low ^ s.high) >> 1)  # the mean, without overflow
        above = measure(middle)
        enough = above >= need
        pick = lambda yes, no: jnp.where(enough, yes, no)
        return _Search(pick(middle, s.low), pick(s.high, middle), pick(above, s.above_low), pick(s.above_high, above))

    def open_rows(s: _Search) -> Array:
        width = (s.high - s.low).astype(jnp.uint32)  # rows with NaN, which no probe finds, may come down to 0
        return (width > 1) & ~settled(s)

    return lax.while_loop(lambda s: jnp.any(open_rows(s)), probe, start).low


def _top_k_floor(logits: Array, highest: Array, top_k: Array) -> Array:
    """The k-th highest logit of each row, or a value just below that keeps the same words; -inf where top_k is off."""
    V = logits.shape[1]
    need = jnp.where((top_k > 0) & (top_k < V), top_k, V)
    lowest = jnp.full_like(highest, -jnp.inf)

    def count(t: Array) -> Array:
        return jnp.sum((logits >= floats_of(ordered(t))[:, None]).astype(jnp.int32), axis=1)

    def search() -> Array:
        low = ordered(bits_of(lowest))
        high = jnp.maximum(ordered(bits_of(highest)), low) + 1  # NaN may be below
        start = _Search(low, high, jnp.full_like(need, V), jnp.zeros_like(need))
        return floats_of(ordered(_bisect(start, need, count, lambda s: s.above_low == need)))

    return lax.cond(jnp.any(need < V), search, lambda: lowest)


def _top_p_level(weights: Int32[Array, "R V"], top_p: Float32[Array, " R"]) -> Int32[Array, " R"]:
    """The weight from which on words are in the smallest set of most probable ones with a mass >= top_p. int32 [R]."""

    def mass(t: Array) -> Array:
        return jnp.sum(jnp.where(weights >= t[:, None], weights, 0), axis=1)

    def search() -> Array:
        total = jnp.sum(weights, axis=1)
        need = jnp.where(top_p < 1, jnp.ceil(top_p * total.astype(jnp.float32)).astype(jnp.int32), total)
        zeros = jnp.zeros_like(total)
        start = _Search(zeros, jnp.max(weights, axis=1) + 1, total, zeros)
        one_word = lambda s: s.above_low - s.above_high < 2 * s.low  # lies between low and high
        return _bisect(start, need, mass, lambda s: (top_p >= 1) | one_word(s))

    return lax.cond(jnp.any(top_p < 1), search, lambda: jnp.zeros_like(weights[:, 0]))


# -- the draw ------------------------------------------------------------------------------------------------------------


def _draw(weights: Int32[Array, "R V"], bits: UInt32[Array, "R 2"]) -> Int32[Array, " R"]:
    """The id at a place of each row's cumulative sum that `bits` choose uniformly: weights int32 [R, V] -> int32 [R]."""
    R, V = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -V % BLOCK))).reshape(R, -1, BLOCK)
    sums = jnp.sum(blocks, axis=2)
    ends = jnp.cumsum(sums, axis=1)
    place = scaled(bits[:, 0], bits[:, 1], ends[:, -1])
    block = _first_past(ends, place)
    before = jnp.take_along_axis(ends - sums, block[:, None], axis=1)
    chosen = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return jnp.minimum(block * BLOCK + _first_past(jnp.cumsum(chosen, axis=1), place - before[:, 0]), V - 1)


def _first_past(ends: Array, place: Array) -> Array:
    """The first index whose end is past the place (the last one, if none is)."""
    return jnp.minimum(jnp.sum((ends <= place[:, None]).astype(jnp.int32), axis=1), ends.shape[1] - 1)


def scaled(high: Array, low: Array, total: Array) -> Array:
    """floor(b / 2^64 * total), where b is the 64-bit number of two uint32 words: uniform in [0, total), int32."""
    total = total.astype(jnp.uint32)
    product = high * total
    carry = (product + _high_product(low, total) < product).astype(jnp.uint32)
    return (_high_product(high, total) + carry).astype(jnp.int32)


def _high_product(a: Array, b: Array) -> Array:
    """The high word of the 64-bit product of two uint32 (there may be no 64-bit integers here)."""
    a_high, a_low, b_high, b_low = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    middle = a_high * b_low + (a_low * b_low >> 16)
    return a_high * b_high + (middle >> 16) + ((middle & 0xFFFF) + a_low * b_high >> 16)
