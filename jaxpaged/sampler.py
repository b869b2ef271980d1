"""From logits to tokens and logprobs: pure functions on device arrays, for any number of rows.

Dims: R rows, V vocabulary, N history, B bias entries, k alternatives. Truncation and the draw are `pallas_kernels.ops.sample`.
A row's random bits are a function of (seed, position) alone, so its token does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Float32, Int32, UInt32

from jaxpaged.batch import Edits, Sampling, TokenLogprobs
from pallas_kernels import ops


def greedy(logits: Float[Array, "R V"]) -> Int32[Array, " R"]:
    """The most probable id of each row, the lowest one of equals: int32 [R]. Rows with NaN: some id in [0, V)."""
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    is_highest = logits == jnp.max(logits, axis=1)[:, None]
    return jnp.minimum(jnp.min(jnp.where(is_highest, ids, logits.shape[1]), axis=1), logits.shape[1] - 1)


def finite(logits: Float[Array, "R V"]) -> Bool[Array, " R"]:
    """Whether a row can be sampled from: no NaN, no +inf, and not -inf throughout. bool [R]."""
    return jnp.isfinite(jnp.max(logits, axis=1))


def sample(
    logits: Float32[Array, "R V"], sampling: Sampling, positions: Int32[Array, " R"], draw: Callable[..., Array] = ops.sample
) -> Int32[Array, " R"]:
    """Draws one id a row: int32 [R].

    logits: float32 [R, V]. sampling: arrays [R] (temperature 0: the row's argmax). positions: int32 [R], the index that
    the new token will have. The order is vLLM's: temperature, min-p, top-k, top-p; min-p and top-k commute, as both keep
    words above a value. Ties at the k-th value, or at the edge of top-p, are all kept. Rows that are not `finite`: some id
    in [0, V).
    """
    bits = jnp.where(sampling.temperature[:, None] == 0, jnp.uint32(0), _random_bits(sampling.seed, positions))
    return draw(logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, bits)


def _random_bits(seed: UInt32[Array, "R 2"], positions: Int32[Array, " R"]) -> UInt32[Array, "R 2"]:
    """uint32 [R, 2] from seeds uint32 [R, 2] (high word first, as jax.random.key has it)."""

    def row(words: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), position)
        return jax.random.bits(key, (2,), jnp.uint32)

    return jax.vmap(row)(seed, positions)


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
    highest = jnp.max(logits, axis=1)
    log_total = jnp.log(jnp.sum(jnp.exp(logits - highest[:, None]), axis=1))
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)
    rank = jnp.sum((logits >= chosen).astype(jnp.int32), axis=1)
    top, top_ids = lax.top_k(logits, min(k, logits.shape[1]))
    normal = lambda x: x - highest[:, None] - log_total[:, None]
    return TokenLogprobs(normal(chosen)[:, 0], rank, top_ids, normal(top))


def prompt_logprobs(
    hidden: Float[Array, "T E"], targets: Int32[Array, " T"], score: Callable[[Array, Array], TokenLogprobs], chunk: int = 64
) -> TokenLogprobs:
    """Logprobs of targets int32 [T] from hidden rows [T, E], `chunk` rows at a time: logits of all rows at once would
    be [T, V]. score: hidden rows [C, E] and targets [C] -> `logprobs`."""
    T = len(targets)
    chunk = min(chunk, T)
    rows = jnp.pad(hidden, ((0, -T % chunk), (0, 0))).reshape(-1, chunk, hidden.shape[1])
    wanted = jnp.pad(targets, (0, -T % chunk)).reshape(-1, chunk)
    parts = lax.map(lambda part: score(*part), (rows, wanted))
    return TokenLogprobs(*(part.reshape(-1, *part.shape[2:])[:T] for part in parts))
