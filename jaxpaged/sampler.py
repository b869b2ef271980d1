"""From logits to tokens and logprobs: pure functions on device arrays, for any number of rows.

Floor 5. Dims: R rows, V vocabulary, N history, B bias entries. Nothing here sorts the vocabulary, and nothing draws a
random number a word: both are what makes samplers slow, on a CPU by far, on a GPU still.

- Truncation is a threshold. Which words top-k and top-p keep depends on their values only, so both bisect for the
  threshold; a step of it is one pass that counts or adds.
- Probabilities are whole numbers. Once temperature, min-p and top-k are done, a row's probabilities become integers that
  add up to about 2^30. Integer sums are exact in any order, so top-p and the draw give a row the same token whatever rows
  stand beside it, and an inverse-CDF draw cannot run off the end or hit a word of probability 0. A word's probability is
  off by at most 2^-30 of the row's (float32 probabilities that are added up are no nearer).
- A row's random bits come from fold_in(key(seed), position): two words of threefry.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxpaged.batch import Edits, Sampling, TokenLogprobs

BLOCK = 256  # words that are summed before the draw chooses among them


def greedy(logits: Array) -> Array:
    """The most probable token of each row, int32 [R]; of equals, the lowest id. A row with NaN gives some id in [0, V)."""
    return _first(logits == _highest(logits)[:, None])


def finite(logits: Array) -> Array:
    """bool [R]: the row can be sampled from: no NaN, no +inf, and not -inf everywhere."""
    return jnp.isfinite(_highest(logits))


def sample(logits: Array, sampling: Sampling, positions: Array) -> Array:
    """Draws one token a row: int32 [R].

    logits: float32 [R, V]. sampling: arrays [R]. positions: int32 [R], the index that the new token will have.
    The order is vLLM's: temperature, min-p, top-k, top-p. Temperature 0: the row's argmax. A row that is not `finite` gives
    some id in [0, V).
    """
    is_greedy = sampling.temperature == 0
    highest = _highest(logits)
    floor = jnp.where(is_greedy, highest, _top_k_floor(logits, highest, sampling.top_k))
    weights = _weights(logits, highest, floor, jnp.where(is_greedy, 1.0, sampling.temperature), sampling.min_p)
    level = _top_p_level(weights, sampling.top_p)
    target = jnp.where(is_greedy, jnp.uint32(0), 1)
    return _draw(weights, level, _random_bits(sampling.seed, positions), target)
