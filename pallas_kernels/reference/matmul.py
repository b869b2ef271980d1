"""Matrix products with grouped or quantised weights, in plain jnp. Sums are in float32."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int32, Num

ROWS = 32  # of a tile


def grouped_matmul(x: Float[Array, "T E"], w: Float[Array, "X F E"], group_sizes: Int32[Array, " X"]) -> Float[Array, "T F"]:
    """See `pallas_kernels.ops.grouped_matmul`.

    Tile by tile: each is of one group, so that only the weights of groups with rows are read. (`jax.lax.ragged_dot` on CPU
    multiplies every row by every group's matrix.)"""
    (T, _), (X, F, _) = x.shape, w.shape
    rows = min(T, ROWS)
    tiles = -(-group_sizes // rows)
    last_tiles, last_rows = jnp.cumsum(tiles), jnp.cumsum(group_sizes)

    def multiply(out: Array, tile: Array) -> Array:
        g = jnp.sum((last_tiles <= tile).astype(jnp.int32))
        first = last_rows[g] - group_sizes[g] + (tile - last_tiles[g] + tiles[g]) * rows
        at = first + jnp.arange(rows, dtype=jnp.int32)
        found = _product(x.at[at].get(mode="clip"), w[g]).astype(x.dtype)
        return out.at[jnp.where(at < last_rows[g], at, T)].set(found, mode="drop")

    def step(out: Array, tile: Array) -> tuple[Array, None]:
        return lax.cond(tile < last_tiles[-1], multiply, lambda out, _: out, out, tile), None

    most = max_tiles(T, X, rows)
    return lax.scan(step, jnp.zeros((T, F), x.dtype), jnp.arange(most, dtype=jnp.int32))[0]


def max_tiles(T: int, groups: int, rows: int) -> int:
    """How many tiles of `rows` rows T rows can need, when no tile spans two groups."""
    return (T + min(T, groups) * (rows - 1)) // rows


def quantized_matmul(
    x: Float[Array, "T E"], w: Num[Array, "F C"], scales: Float[Array, "F N"], zeros: Float[Array, "F N"] | None = None
) -> Float[Array, "T F"]:
    """See `pallas_kernels.ops.quantized_matmul`."""
    return _product(x.astype(jnp.float32), dequantize(w, scales, zeros)).astype(x.dtype)


def dequantize(w: Num[Array, "F C"], scales: Float[Array, "F N"], zeros: Float[Array, "F N"] | None) -> Float[Array, "F E"]:
    """The float32 matrix that the numbers stand for."""
    F, N = scales.shape
    numbers = w.reshape(F, N, -1)
    zero = jnp.float32(0)
    if w.dtype == jnp.uint8:
        numbers, zero = jnp.concatenate([numbers & 15, numbers >> 4], axis=2), jnp.float32(8)
    offset = zero if zeros is None else zeros.astype(jnp.float32)[:, :, None]
    return ((numbers.astype(jnp.float32) - offset) * scales.astype(jnp.float32)[:, :, None]).reshape(F, -1)


def _product(x: Array, w: Array) -> Array:
    """x [T, E] @ w [F, E] transposed: float32 [T, F]."""
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision="highest", preferred_element_type=jnp.float32)
