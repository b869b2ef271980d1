"""Truncated sampling in one kernel: a program a row. No sort, no temporaries as large as the logits.

The algorithm and its whole-number weights are those of `pallas_kernels.reference.sampling`. A program passes over its row
block by block as often as it has to: for the highest logit, for the sum of odds, then for the thresholds of top-k and
top-p, and last for the drawn word. A row of 262144 float32 is 1 MB: after the first pass it is in the L2 cache. Weights
are computed anew in each pass. Integer sums are exact in any order, so that blocks and warps change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.reference.sampling import TOTAL_BITS, bits_of, floats_of, ordered, scaled

BLOCK, WARPS = 2048, 16
LOADS = 4  # blocks on their way at a time
WAYS = 8  # a pass of a search cuts what is left to an eighth; more thresholds a pass cost more than the passes they save
MINUS_INFINITY, ONE = ~0x7F800000, 0x3F800000  # bits of float32, in the order of floats
NEAR = (64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0)  # first thresholds for top-k, below the highest logit: WAYS - 1


def sample(
    logits: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array, bits: Array, *, interpret: bool
) -> Array:
    """See `pallas_kernels.ops.sample`."""
    R, V = logits.shape
    return pl.pallas_call(
        partial(_sample_row, V=V),
        out_shape=jax.ShapeDtypeStruct((R,), jnp.int32),
        grid=(R,),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        name="sample",
    )(logits, temperature, top_k, top_p, min_p, bits)


class _Row(NamedTuple):
    """The row of a program: its logits in memory, and what makes weights of them (scalars)."""

    logits: Any  # ref [R, V]
    index: Array
    V: int
    highest: Array
    floor: Array  # words below it have weight 0
    temperature: Array
    min_p: Array

    def load(self, block: Array) -> Array:
        """[BLOCK] logits, -inf past the end."""
        words = block * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
        return plt.load(self.logits.at[self.index, words], mask=words < self.V, other=-jnp.inf)

    def reduce(self, step: Callable[[Array, Any], Any], start: Any) -> Any:
        """A pass over the row: step(logits [BLOCK], carry) -> carry, block after block."""

        def several(i: Array, carry: Any) -> Any:
            for logits in [self.load(i * LOADS + j) for j in range(LOADS)]:
                carry = step(logits, carry)
            return carry

        return lax.fori_loop(0, pl.cdiv(self.V, BLOCK * LOADS), several, start)

    def odds(self, logits: Array) -> Array:
        """Probabilities relative to the highest; 0 for what min-p and top-k cut, and for NaN."""
        odds = jnp.exp((logits - self.highest) / self.temperature)
        return jnp.where((logits >= self.floor) & (odds >= self.min_p), odds, 0.0)


def _sample_row(logits_ref, temperature_ref, top_k_ref, top_p_ref, min_p_ref, bits_ref, out_ref, *, V: int):
    r = pl.program_id(0)
    temperature, top_k, top_p = temperature_ref[r], top_k_ref[r], top_p_ref[r]
    is_greedy = temperature == 0
    row = _Row(logits_ref, r, V, jnp.float32(0), jnp.float32(-jnp.inf),
               jnp.where(is_greedy, 1.0, temperature), min_p_ref[r])  # fmt: skip
    lowest = jnp.full((BLOCK,), -jnp.inf, jnp.float32)
    row = row._replace(highest=jnp.max(row.reduce(jnp.maximum, lowest)))
    row = row._replace(floor=jnp.where(is_greedy, row.highest, _top_k_floor(row, jnp.where(is_greedy, 0, top_k))))
    scale = _scale(jnp.sum(row.reduce(lambda logits, sums: sums + row.odds(logits), jnp.zeros((BLOCK,), jnp.float32))))
    total = jnp.sum(row.reduce(lambda logits, sums: sums + _weights(row, scale, logits), jnp.zeros((BLOCK,), jnp.int32)))
    level, total = _top_p_level(row, scale, total, jnp.where(is_greedy, 1.0, top_p))
    place = scaled(bits_ref[r, 0], bits_ref[r, 1], total)
    out_ref[r] = _word_at(row, scale, level, place)


# -- weights ---------------------------------------------------------------------------------------------------------------


def _scale(odds: Array) -> Array:
    """The power of two that brings the sum of the odds, which is in [1, V], to (2^29, 2^30]."""
    exponent = lax.shift_right_logical(bits_of(odds), 23) - 127
    return floats_of(lax.shift_left(127 + TOTAL_BITS - 1 - exponent, 23))


def _weights(row: _Row, scale: Array, logits: Array) -> Array:
    """Whole numbers int32 [BLOCK]."""
    return _round(row.odds(logits) * scale).astype(jnp.int32)


def _round(x: Array) -> Array:
    """x >= 0 to the nearest whole number, halves to the even one. (Pallas-Triton has no `round`.)"""
    whole = jnp.float32(1 << 23)  # from here on, all float32 are whole
    return jnp.where(x < whole, (x + whole) - whole, x)


# -- thresholds ------------------------------------------------------------------------------------------------------------


class _Search(NamedTuple):
    """A bracket of float bits in the order of floats: measure(low) >= need > measure(high). `above_*`: the measures."""

    low: Array
    high: Array
    above_low: Array
    above_high: Array


def _narrow(
    s: _Search, thresholds: Sequence[Array], need: Array, measure: Callable[[Sequence[Array]], Sequence[Array]]
) -> _Search:
    """The part of the bracket between two neighbours of the rising thresholds, of which all are in the bracket."""
    low, high, above_low, above_high = s
    above = measure(thresholds)
    for t, a in zip(thresholds, above):
        low, above_low = jnp.where(a >= need, t, low), jnp.where(a >= need, a, above_low)
    for t, a in zip(thresholds[::-1], above[::-1]):
        high, above_high = jnp.where(a >= need, high, t), jnp.where(a >= need, above_high, a)
    return _Search(low, high, above_low, above_high)


def _find(
    s: _Search, need: Array, measure: Callable[[Sequence[Array]], Sequence[Array]], settled: Callable[[_Search], Array]
) -> _Search:
    """Narrows until the bracket is one value wide, or narrow enough as `settled` says."""
    width = lambda s: (s.high - s.low).astype(jnp.uint32)  # 0 in rows with NaN, which no threshold finds

    def step(s: _Search) -> _Search:
        part = (width(s) + (WAYS - 1)) // WAYS
        inside = [jnp.minimum(part * i, width(s) - 1).astype(jnp.int32) for i in range(1, WAYS)]
        return _narrow(s, [s.low + i for i in inside], need, measure)

    return lax.while_loop(lambda s: (width(s) > 1) & ~settled(s), step, s)


def _top_k_floor(row: _Row, top_k: Array) -> Array:
    """The k-th highest logit, or a value just below that keeps the same words; -inf where top_k is off."""

    def count(thresholds: Sequence[Array]) -> Sequence[Array]:
        values = [floats_of(ordered(t)) for t in thresholds]

        def step(logits: Array, counts: Sequence[Array]) -> Sequence[Array]:
            return tuple(c + (logits >= t).astype(jnp.int32) for c, t in zip(counts, values))

        return _sums(row, step)

    is_on = (top_k > 0) & (top_k < row.V)
    need = jnp.where(is_on, top_k, row.V)
    s = _Search(jnp.int32(MINUS_INFINITY), ordered(bits_of(row.highest)) + 1, jnp.int32(row.V), jnp.int32(0))
    near = [jnp.maximum(ordered(bits_of(row.highest - d)), MINUS_INFINITY) for d in NEAR]
    s = lax.fori_loop(0, is_on.astype(jnp.int32), lambda _, s: _narrow(s, near, need, count), s)  # an `if`
    return floats_of(ordered(_find(s, need, count, lambda s: s.above_low == need).low))


def _top_p_level(row: _Row, scale: Array, total: Array, top_p: Array) -> tuple[Array, Array]:
    """The weight from which on words are in the smallest set of most probable ones with a mass >= top_p; their mass.

    Searches among the bits of floats, which are near to logarithms: an eighth of them holds about as many words as the
    next. A weight is exact in float32: below 2^24 any whole number is, and above, it came from one."""

    def mass(thresholds: Sequence[Array]) -> Sequence[Array]:
        values = [floats_of(t) for t in thresholds]

        def step(logits: Array, sums: Sequence[Array]) -> Sequence[Array]:
            weights = _weights(row, scale, logits)
            floats = weights.astype(jnp.float32)
            return tuple(s + jnp.where(floats >= t, weights, 0) for s, t in zip(sums, values))

        return _sums(row, step)

    need = jnp.ceil(top_p * total.astype(jnp.float32)).astype(jnp.int32)
    s = _Search(jnp.int32(ONE - 1), bits_of(scale) + 1, total, jnp.int32(0))  # the highest word weighs `scale`
    one_word = lambda s: (s.above_low - s.above_high).astype(jnp.float32) < 2 * floats_of(s.low)  # lies in the bracket
    found = _find(s, need, mass, lambda s: (top_p >= 1) | one_word(s))
    return floats_of(found.low), found.above_low


def _sums(row: _Row, step: Callable[[Array, Sequence[Array]], Sequence[Array]]) -> Sequence[Array]:
    return [jnp.sum(s) for s in row.reduce(step, (jnp.zeros((BLOCK,), jnp.int32),) * (WAYS - 1))]


# -- the draw --------------------------------------------------------------------------------------------------------------


def _word_at(row: _Row, scale: Array, level: Array, place: Array) -> Array:
    """The word whose part of the row's cumulative sum holds the place."""

    def kept(block: Array) -> Array:
        weights = _weights(row, scale, row.load(block))
        return jnp.where(weights.astype(jnp.float32) >= level, weights, 0)

    def skip(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        block, before, inside = state
        return block + 1, before + inside, jnp.sum(kept(block + 1))

    last = pl.cdiv(row.V, BLOCK) - 1
    start = (jnp.int32(0), jnp.int32(0), jnp.sum(kept(jnp.int32(0))))
    block, before, _ = lax.while_loop(lambda s: (s[0] < last) & (s[1] + s[2] <= place), skip, start)
    past = jnp.sum((jnp.cumsum(kept(block)) <= place - before).astype(jnp.int32))
    return jnp.minimum(block * BLOCK + past, row.V - 1)
