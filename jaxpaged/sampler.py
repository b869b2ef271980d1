"""From logits to tokens and logprobs: pure functions on device arrays, for any number of rows.

Floor 5. Dims: R rows, V vocabulary, N history, B bias entries, k alternatives. No sort of the vocabulary and no random
number for each of its words: these are what makes a sampler slow.

- Truncation is a threshold: what top-k and top-p keep depends on values only, so both bisect for the value from which on
  words are kept. One probe is one pass over [R, V] that counts or adds.
- Probabilities are whole numbers: after temperature, min-p and top-k a row becomes integers that add up to about 2^30.
  Integer sums are exact in any order. So a row's token does not depend on the rows beside it, and a draw from the
  cumulative sum can neither run off its end nor hit a word of probability 0. The price: probabilities below 2^-31 are 0.
- A row's random bits are a function of (seed, position) alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Float32, Int32, UInt32

from jaxpaged.batch import Edits, Sampling, TokenLogprobs

TOTAL_BITS = 30  # a row's weights add up to (2^29, 2^30], and a little for rounding: below 2^31 for any V < 2^30
BLOCK = 256  # the draw picks a block of this many words, then a word of it


def greedy(logits: Float[Array, "R V"]) -> Int32[Array, " R"]:
    """The most probable id of each row, the lowest one of equals: int32 [R]. Rows with NaN: some id in [0, V)."""
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    is_highest = logits == _highest(logits)[:, None]
    return jnp.minimum(jnp.min(jnp.where(is_highest, ids, logits.shape[1]), axis=1), logits.shape[1] - 1)


def finite(logits: Float[Array, "R V"]) -> Bool[Array, " R"]:
    """Whether a row can be sampled from: no NaN, no +inf, and not -inf throughout. bool [R]."""
    return jnp.isfinite(_highest(logits))


def sample(logits: Float32[Array, "R V"], sampling: Sampling, positions: Int32[Array, " R"]) -> Int32[Array, " R"]:
    """Draws one id a row: int32 [R].

    logits: float32 [R, V]. sampling: arrays [R] (temperature 0: the row's argmax). positions: int32 [R], the index that
    the new token will have. The order is vLLM's: temperature, min-p, top-k, top-p; min-p and top-k commute, as both keep
    words above a value. Ties at the k-th value, or at the edge of top-p, are all kept. Rows that are not `finite`: some id
    in [0, V).
    """
    weights = _weights(logits, sampling)
    weights = jnp.where(weights >= _top_p_level(weights, sampling.top_p)[:, None], weights, 0)
    bits = jnp.where(sampling.temperature[:, None] == 0, jnp.uint32(0), _random_bits(sampling.seed, positions))
    return _draw(weights, bits)


# -- truncation ------------------------------------------------------------------------------------------------------------


def _highest(logits: Array) -> Array:
    return jnp.max(logits, axis=1)


def _weights(logits: Float32[Array, "R V"], sampling: Sampling) -> Int32[Array, "R V"]:
    """Whole numbers int32 [R, V] in proportion to the probabilities after temperature, min-p and top-k.

    Greedy rows keep the highest words only. The scale is a power of two, so that scaling rounds nothing."""
    is_greedy = sampling.temperature == 0
    highest = _highest(logits)
    floor = jnp.where(is_greedy, highest, _top_k_floor(logits, highest, sampling.top_k))
    temperature = jnp.where(is_greedy, jnp.float32(1), sampling.temperature)
    odds = jnp.exp((logits - highest[:, None]) / temperature[:, None])  # relative to the most probable word
    odds = jnp.where((logits >= floor[:, None]) & (odds >= sampling.min_p[:, None]), odds, 0)  # NaN: 0
    exponent = lax.shift_right_logical(_bits(jnp.sum(odds, axis=1)), 23) - 127  # of the sum, which is in [1, V]
    scale = _floats(lax.shift_left(127 + TOTAL_BITS - 1 - exponent, 23))
    return jnp.round(odds * scale[:, None]).astype(jnp.int32)


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _floats(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.float32)


def _ordered(x: Array) -> Array:
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
        return (s.high - s.low != 1) & ~settled(s)

    return lax.while_loop(lambda s: jnp.any(open_rows(s)), probe, start).low


def _top_k_floor(logits: Array, highest: Array, top_k: Array) -> Array:
    """The k-th highest logit of each row, or a value just below that keeps the same words; -inf where top_k is off."""
    V = logits.shape[1]
    need = jnp.where((top_k > 0) & (top_k < V), top_k, V)
    lowest = jnp.full_like(highest, -jnp.inf)

    def count(t: Array) -> Array:
        return jnp.sum((logits >= _floats(_ordered(t))[:, None]).astype(jnp.int32), axis=1)

    def search() -> Array:
        high = _ordered(_bits(highest)) + 1
        start = _Search(_ordered(_bits(lowest)), high, jnp.full_like(need, V), jnp.zeros_like(need))
        return _floats(_ordered(_bisect(start, need, count, lambda s: s.above_low == need)))

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


# -- the draw --------------------------------------------------------------------------------------------------------------


def _random_bits(seed: UInt32[Array, "R 2"], positions: Int32[Array, " R"]) -> UInt32[Array, "R 2"]:
    """uint32 [R, 2] from seeds uint32 [R, 2] (high word first, as jax.random.key has it)."""

    def row(words: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), position)
        return jax.random.bits(key, (2,), jnp.uint32)

    return jax.vmap(row)(seed, positions)


def _draw(weights: Int32[Array, "R V"], bits: UInt32[Array, "R 2"]) -> Int32[Array, " R"]:
    """The id at a place of each row's cumulative sum that `bits` choose uniformly: weights int32 [R, V] -> int32 [R]."""
    R, V = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -V % BLOCK))).reshape(R, -1, BLOCK)
    sums = jnp.sum(blocks, axis=2)
    ends = jnp.cumsum(sums, axis=1)
    place = _scaled(bits, ends[:, -1])
    block = _first_past(ends, place)
    before = jnp.take_along_axis(ends - sums, block[:, None], axis=1)
    chosen = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return jnp.minimum(block * BLOCK + _first_past(jnp.cumsum(chosen, axis=1), place - before[:, 0]), V - 1)


def _first_past(ends: Array, place: Array) -> Array:
    """The first index whose end is past the place (the last one, if none is)."""
    return jnp.minimum(jnp.sum((ends <= place[:, None]).astype(jnp.int32), axis=1), ends.shape[1] - 1)


def _scaled(bits: Array, total: Array) -> Array:
    """floor(b / 2^64 * total), where b is the 64-bit number of two words [R, 2]: uniform in [0, total), int32 [R]."""
    total = total.astype(jnp.uint32)
    low = bits[:, 0] * total
    carry = (low + _high_product(bits[:, 1], total) < low).astype(jnp.uint32)
    return (_high_product(bits[:, 0], total) + carry).astype(jnp.int32)


def _high_product(a: Array, b: Array) -> Array:
    """The high word of the 64-bit product of two uint32 (there may be no 64-bit integers here)."""
    a_high, a_low, b_high, b_low = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    middle = a_high * b_low + (a_low * b_low >> 16)
    return a_high * b_high + (middle >> 16) + ((middle & 0xFFFF) + a_low * b_high >> 16)


# -- edits -----------------------------------------------------------------------------------------------------------------


def edit(
    logits: Float32[Array, "R V"], edits: Edits, last_token: Int32[Array, " R"], carried: Bool[Array, " R"]
) -> Float32[Array, "R V"]:
    """What requests change about their logits: float32 [R, V] -> [R, V]; words that are not allowed become -inf.

    The order is vLLM's (vllm/v1/sample/sampler.py, apply_logits_processors): allowed ids, bad words, min_tokens (one mask,
    made by the host), logit_bias, then penalties. carried bool [R]: the host's history lacks the row's last output token,
    it is last_token int32 [R]. History and bias ids >= V are padding.
    """
    logits = jnp.where(_unpack(edits.allowed, logits.shape[1]), logits, -jnp.inf)
    logits = lax.cond(jnp.any(edits.bias_ids < logits.shape[1]), _add_bias, lambda x, _: x, logits, edits)
    plain = (edits.presence == 0) & (edits.frequency == 0) & (edits.repetition == 1)
    penalise = lambda x: _penalise(x, edits, last_token, carried)
    return lax.cond(jnp.all(plain), lambda x: x, penalise, logits)


def _unpack(words: Array, size: int) -> Array:
    """bool [R, size] of uint32 [R, W]: bit i % 32 of word i // 32."""
    bits = words[:, :, None] >> lax.broadcasted_iota(jnp.uint32, (1, 1, 32), 2) & 1
    return bits.reshape(len(words), -1)[:, :size] == 1


def _add_bias(logits: Array, edits: Edits) -> Array:
    rows = lax.broadcasted_iota(jnp.int32, edits.bias_ids.shape, 0)
    return logits.at[rows, edits.bias_ids].add(edits.bias, mode="drop")


def _penalise(logits: Array, edits: Edits, last_token: Array, carried: Array) -> Array:
    """Repetition (prompt and output), then frequency and presence (output): vllm/model_executor/layers/utils.py."""
    (R, V), (_, N) = logits.shape, edits.history.shape
    ids = jnp.concatenate([edits.history, jnp.where(carried, last_token, V)[:, None]], axis=1)
    row, column = (lax.broadcasted_iota(jnp.int32, ids.shape, axis) for axis in (0, 1))
    is_output = ((column >= edits.num_prompt[:, None]) | (column == N)).astype(jnp.int32)
    counts = jnp.zeros((2, R, V), jnp.int32).at[is_output, row, ids].add(1, mode="drop")
    in_prompt, count = counts[0] > 0, counts[1]
    factor = jnp.where(in_prompt | (count > 0), edits.repetition[:, None], jnp.float32(1))
    logits = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = logits - edits.frequency[:, None] * count.astype(jnp.float32)
    return logits - edits.presence[:, None] * (count > 0).astype(jnp.float32)


# -- logprobs --------------------------------------------------------------------------------------------------------------


def logprobs(logits: Float[Array, "N V"], tokens: Int32[Array, " N"], k: int) -> TokenLogprobs:
    """Log-softmax in float32 of logits [N, V] at tokens int32 [N], and the k (static; at most V are given) most probable
    ids, of equals the lower ones first.

    rank: how many words are at least as probable as the token, itself included (vLLM's; it counts after the log-softmax,
    where rounding makes more ties). On a GPU lax.top_k sorts the row for k > 16.
    """
    logits = logits.astype(jnp.float32)
    highest = _highest(logits)
    log_total = jnp.log(jnp.sum(jnp.exp(logits - highest[:, None]), axis=1))
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)
    rank = jnp.sum((logits >= chosen).astype(jnp.int32), axis=1)
    top, top_ids = lax.top_k(logits, min(k, logits.shape[1]))
    normal = lambda x: x - highest[:, None] - log_total[:, None]
    return TokenLogprobs(normal(chosen)[:, 0], rank, top_ids, normal(top))


def prompt_logprobs(
    hidden: Float[Array, "T E"], head: Callable, targets: Int32[Array, " T"], k: int, chunk: int = 64
) -> TokenLogprobs:
    """`logprobs` of targets int32 [T] from hidden rows [T, E], `chunk` rows at a time: logits of all rows at once would
    be [T, V]. head: hidden rows [C, E] -> logits [C, V]."""
    T = len(targets)
    chunk = min(chunk, T)
    rows = jnp.pad(hidden, ((0, -T % chunk), (0, 0))).reshape(-1, chunk, hidden.shape[1])
    wanted = jnp.pad(targets, (0, -T % chunk)).reshape(-1, chunk)
    parts = lax.map(lambda part: logprobs(head(part[0]), part[1], k), (rows, wanted))
    return TokenLogprobs(*(part.reshape(-1, *part.shape[2:])[:T] for part in parts))
