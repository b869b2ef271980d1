"""Matrix products with grouped or quantised weights: a program a tile, sums in float32 registers.

Order of a sum: a program adds up its inputs block by block. The size of these blocks depends on dtypes and on the shape of
the weights only, not on how many rows there are or how they are grouped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.reference.matmul import max_tiles


class _Blocks(NamedTuple):
    """Of a program: rows of x, outputs and, at a time, inputs; warps; blocks of inputs on their way at a time."""

    T: int
    F: int
    E: int
    warps: int
    stages: int

    def params(self) -> plt.CompilerParams:
        return plt.CompilerParams(num_warps=self.warps, num_stages=self.stages)


def _dot(a: Array, b: Array) -> Array:
    """a [M, E] @ b [N, E] transposed: float32 [M, N]; of float32 without rounding to tf32."""
    return plt.dot(a, b, trans_b=True, precision=lax.Precision.HIGHEST)


# -- grouped ---------------------------------------------------------------------------------------------------------------

NEIGHBOURS = 8  # row tiles that walk over the outputs together, so that they share weights in the L2 cache


def grouped_matmul(x: Array, w: Array, group_sizes: Array, *, interpret: bool) -> Array:
    """See `pallas_kernels.ops.grouped_matmul`.

    Rows per tile are chosen by T / X. Between calls with different T a row's numbers are summed in the same order, but
    tiles of 64 rows and more use other tensor core instructions on Hopper, which may round differently."""
    (T, _), (X, F, _) = x.shape, w.shape
    blocks = _grouped_blocks(T, X, x.dtype)
    tiles = max_tiles(T, X + 1, blocks.T)  # rows of no group are one more
    return pl.pallas_call(
        partial(_grouped_tile, tiles=tiles, blocks=blocks),
        out_shape=jax.ShapeDtypeStruct((T, F), x.dtype),
        grid=(tiles * pl.cdiv(F, blocks.F),),
        interpret=interpret,
        compiler_params=blocks.params(),
        name="grouped_matmul",
    )(x, w, group_sizes)


def _grouped_blocks(T: int, X: int, dtype: Any) -> _Blocks:
    if dtype == jnp.float32:  # no tensor cores
        return _Blocks(16, 32, 32, warps=4, stages=2) if T < 32 * X else _Blocks(32, 64, 32, warps=4, stages=2)
    if T < 32 * X:
        return _Blocks(16, 64, 64, warps=4, stages=4)
    return _Blocks(64, 128, 64, warps=4, stages=3) if T < 256 * X else _Blocks(128, 128, 64, warps=8, stages=3)


def _grouped_tile(x_ref, w_ref, sizes_ref, out_ref, *, tiles: int, blocks: _Blocks):
    (T, E), (X, F, _) = x_ref.shape, w_ref.shape
    tile, f_tile = _neighbourly(pl.program_id(0), tiles, pl.cdiv(F, blocks.F))
    group, first, last = _rows_of_tile(sizes_ref, tile, blocks.T, T)
    rows = first + jnp.arange(blocks.T, dtype=jnp.int32)
    outputs = f_tile * blocks.F + jnp.arange(blocks.F, dtype=jnp.int32)
    row_mask, output_mask = (rows < last)[:, None], (outputs < F)[:, None]
    matrix = jnp.minimum(group, X - 1)

    def step(i: Array, sums: Array) -> Array:
        inputs = i * blocks.E + jnp.arange(blocks.E, dtype=jnp.int32)
        inside = (inputs < E)[None, :] if E % blocks.E else jnp.bool_(True)
        x = plt.load(x_ref.at[rows[:, None], inputs[None, :]], mask=row_mask & inside, other=0)
        w = plt.load(w_ref.at[matrix, outputs[:, None], inputs[None, :]], mask=output_mask & inside, other=0)
        return sums + _dot(x, w)

    @pl.when(first < last)
    def _():
        steps = jnp.where(group < X, jnp.int32(pl.cdiv(E, blocks.E)), 0)
        sums = lax.fori_loop(0, steps, step, jnp.zeros((blocks.T, blocks.F), jnp.float32))
        place = out_ref.at[rows[:, None], outputs[None, :]]
        plt.store(place, sums.astype(out_ref.dtype), mask=row_mask & (outputs < F)[None, :])


def _neighbourly(program: Array, row_tiles: int, output_tiles: int) -> tuple[Array, Array]:
    """(row tile, output tile) of a program: the outputs of NEIGHBOURS row tiles come before the next row tiles."""
    band, within = lax.div(program, NEIGHBOURS * output_tiles), lax.rem(program, NEIGHBOURS * output_tiles)
    height = jnp.minimum(row_tiles - band * NEIGHBOURS, NEIGHBOURS)
    return band * NEIGHBOURS + lax.rem(within, height), lax.div(within, height)


def _rows_of_tile(sizes_ref: Any, tile: Array, rows: int, T: int) -> tuple[Array, Array, Array]:
    """(group, first row, end of the rows) of a tile. Past the groups' tiles: rows of no group, then nothing (first >= end)."""
    X = sizes_ref.shape[0]
    groups = jnp.arange(pl.next_power_of_2(X), dtype=jnp.int32)
    sizes = plt.load(sizes_ref.at[groups], mask=groups < X, other=0)
    tiles = lax.div(sizes + (rows - 1), jnp.full_like(sizes, rows))
    is_before = jnp.cumsum(tiles) <= tile
    total = lambda of: jnp.sum(jnp.where(is_before, of, 0))
    group, row, first_tile = total(jnp.ones_like(sizes)), total(sizes), total(tiles)
    end = jnp.where(group < X, row + jnp.sum(jnp.where(groups == group, sizes, 0)), T)
    return group, row + (tile - first_tile) * rows, jnp.minimum(end, T)


# -- quantised -------------------------------------------------------------------------------------------------------------

INPUTS = 128  # at a time, at most


def quantized_matmul(x: Array, w: Array, scales: Array, zeros: Array | None = None, *, interpret: bool) -> Array:
    """See `pallas_kernels.ops.quantized_matmul`.

    Weights become x's dtype in registers, which is exact, as they are small whole numbers; each group's sum is scaled in
    float32. Zero points stay out of the products: they are taken off as zero * sum of the group's inputs."""
    (T, E), (F, N) = x.shape, scales.shape
    blocks = _quantized_blocks(T, E // N, w.dtype, x.dtype)
    if 1 << 31 <= w.size <= 1 << 32:  # above, it counts in 64 bits
        raise NotImplementedError(f"triton quantized_matmul: Pallas would count {w.size} weights in 31 bits; reference can")
    operands = [x, w, scales]
    if zeros is not None:
        operands += [zeros, jnp.sum(x.reshape(T, N, -1).astype(jnp.float32), axis=2)]
    return pl.pallas_call(
        partial(_quantized_tile, blocks=blocks),
        out_shape=jax.ShapeDtypeStruct((T, F), x.dtype),
        grid=(pl.cdiv(T, blocks.T), pl.cdiv(F, blocks.F)),
        interpret=interpret,
        compiler_params=blocks.params(),
        name="quantized_matmul",
    )(*operands)


def _quantized_blocks(T: int, size: int, weights: Any, dtype: Any) -> _Blocks:
    """size: inputs that share a scale. `E` counts columns of the weights: two inputs each if of 4 bits."""
    halves = 2 if weights == jnp.uint8 else 1
    columns = size // halves
    inputs = min(columns & -columns, INPUTS // halves)  # a power of two that divides
    if inputs < 16:
        raise NotImplementedError(
            f"triton quantized_matmul needs groups of a multiple of {16 * halves} inputs, these are of {size}; "
            "reference can do any"
        )
    if dtype == jnp.float32:  # no tensor cores
        return _Blocks(16, 32, min(inputs, 32), warps=4, stages=2)
    if T <= 16:
        return _Blocks(16, 32, inputs, warps=4, stages=8)
    return _Blocks(64, 64, inputs, warps=4, stages=3) if T <= 64 else _Blocks(128, 128, inputs, warps=8, stages=3)


def _quantized_tile(x_ref, w_ref, scales_ref, *refs, blocks: _Blocks):
    """Computes the transposed tile [F, T]: the weights, which come from registers, must be the left factor on Hopper."""
    *zero_refs, out_ref = refs
    (T, _), (F, N) = x_ref.shape, scales_ref.shape
    halves = 2 if w_ref.dtype == jnp.uint8 else 1
    columns = w_ref.shape[1] // N  # of a group
    rows = pl.program_id(0) * blocks.T + jnp.arange(blocks.T, dtype=jnp.int32)
    outputs = pl.program_id(1) * blocks.F + jnp.arange(blocks.F, dtype=jnp.int32)
    row_mask, output_mask = (rows < T)[:, None], (outputs < F)[:, None]
    nothing = jnp.zeros((blocks.F, blocks.T), jnp.float32)

    def inputs(at: Array) -> Array:
        return plt.load(x_ref.at[rows[:, None], at[None, :]], mask=row_mask, other=0)

    def group(g: Array, sums: Array) -> Array:
        def step(i: Array, part: Array) -> Array:
            at = i * blocks.E + jnp.arange(blocks.E, dtype=jnp.int32)
            w = plt.load(w_ref.at[outputs[:, None], (g * columns + at)[None, :]], mask=output_mask, other=0)
            for half, numbers in enumerate(_numbers(w, x_ref.dtype)):
                part += _dot(numbers, inputs((g * halves + half) * columns + at))
            return part

        scale = plt.load(scales_ref.at[outputs, g], mask=outputs < F, other=0).astype(jnp.float32)
        part = _loop(columns // blocks.E, step, nothing) * scale[:, None]
        if zero_refs:
            zeros_ref, sums_ref = zero_refs
            zero = plt.load(zeros_ref.at[outputs, g], mask=outputs < F, other=0).astype(jnp.float32)
            zero = zero - 8 if halves == 2 else zero
            part -= (zero * scale)[:, None] * plt.load(sums_ref.at[rows, g], mask=rows < T, other=0)[None, :]
        return sums + part

    def several(i: Array, sums: Array) -> Array:
        for j in range(together):
            sums = group(i * together + j, sums)
        return sums

    # Small groups, so that enough bytes are on their way; large tiles need the registers.
    together = math.gcd(N, max(INPUTS // (halves * columns), 1)) if blocks.T == 16 else 1
    out = _loop(N // together, several, nothing).astype(out_ref.dtype)
    plt.store(out_ref.at[rows[None, :], outputs[:, None]], out, mask=(rows < T)[None, :] & output_mask)


def _loop(count: int, body: Callable[[Any, Array], Array], start: Array) -> Array:
    """A loop, and none where it would run once: only innermost loops have their loads sent ahead."""
    return body(jnp.int32(0), start) if count == 1 else lax.fori_loop(0, count, body, start)


def _numbers(w: Array, dtype: Any) -> list[Array]:
    """The whole numbers of 8 bits; or of 4 bits less 8, of the low halves and of the high ones. Exact in `dtype`."""
    if w.dtype == jnp.int8:
        return [w.astype(dtype)]
    return [_four_bits(w & 15, dtype), _four_bits(w >> 4, dtype)]


def _four_bits(w: Array, dtype: Any) -> Array:
    """Numbers 0..15 less 8. Set into the mantissa of a power of two they need no conversion, which is slow."""
    power = {"bfloat16": (0x4300, 128), "float16": (0x6400, 1024)}.get(str(dtype))
    if power is None:
        return w.astype(jnp.int32).astype(dtype) - 8
    pattern, value = power
    return lax.bitcast_convert_type(w.astype(jnp.uint16) | pattern, dtype) - (value + 8)
