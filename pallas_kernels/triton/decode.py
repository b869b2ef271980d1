"""Rows with one query: split-KV decoding over a work list, and the merge of the splits.

A row's keys are cut at fixed positions, every `split` tokens: how a row is computed depends on its own length alone, never
on its neighbours. A fixed number of programs walks the list of (row, split, key/value head); a long row keeps many of them
busy, and rows or splits that are not there cost nothing. The list is not stored: a program finds its item in the running
count of splits, which XLA computes once a step for all layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.triton import tile
from pallas_kernels.triton.blocks import Blocks
from pallas_kernels.triton.tile import Cache, Softmax, Static

PROGRAMS = 528  # four for each of the 132 multiprocessors of a Hopper GPU; as a multiple it fits the others well enough
MAX_SPLITS = 64  # of a row: bounds the memory for partial results, [R, 64, H, D] float32
MIN_SPLIT = 512  # tokens: shorter ones are merged more than computed


class Splits(NamedTuple):
    """How rows are cut. size, most: static; the rest [R] int32 on the device."""

    size: int  # tokens of a split
    most: int  # splits that a row can have
    first: Array  # the number of the first split that a row's query sees
    ends: Array  # splits of rows 0 .. r together
    merged_ends: Array  # rows among 0 .. r that have several


def plan(num_tokens: int, static: Static, kv_lens: Array, num_decode: Array) -> Splits:
    """num_tokens: the longest sequence that the page table can hold (static)."""
    size, most = MIN_SPLIT, _splits(num_tokens, static.span, MIN_SPLIT)
    while most > MAX_SPLITS:
        size *= 2
        most = _splits(num_tokens, static.span, size)
    R = kv_lens.shape[0]
    lengths = jnp.where(jnp.arange(R) < num_decode, kv_lens, 0)
    first = tile.first_seen(static, jnp.maximum(lengths - 1, 0)) // size
    number = (lengths + size - 1) // size - first
    total = lambda x: jnp.cumsum(x, dtype=jnp.int32)
    return Splits(size, most, first, total(number), total((number > 1).astype(jnp.int32)))


def _splits(num_tokens: int, span: int | None, size: int) -> int:
    """How many splits a row may have; those that a window touches are one more than it would fill."""
    most = -(-num_tokens // size)
    return most if span is None else min(most, (span + size - 2) // size + 1)


def decode(
    q: Array,
    cache: Cache,
    kv_lens: Array,
    splits: Splits,
    sinks: Array | None,
    alibi: Array | None,
    *,
    static: Static,
    blocks: Blocks,
    interpret: bool,
) -> tuple[Array, Array]:
    """out [T, H, D] and lse [T, H] of the rows of one query each; row r's is token r. Other places hold nothing yet."""
    (T, H, D), R = q.shape, kv_lens.shape[0]
    G = H // static.ratio
    names = ("k_pages", "v_pages", "k_scales", "v_scales", "page_table", "lens", "first", "ends", "sinks", "alibi")
    inputs = (*cache[:4], cache.page_table, kv_lens, splits.first, splits.ends, sinks, alibi)
    present = {name: x for name, x in zip(names, inputs) if x is not None}
    several = splits.most > 1
    out_shape = [jax.ShapeDtypeStruct((T, H, D), q.dtype), jax.ShapeDtypeStruct((T, H), jnp.float32)]
    if several:
        out_shape += [jax.ShapeDtypeStruct((R, splits.most, H, D), jnp.float32),
                      jax.ShapeDtypeStruct((R, splits.most, H), jnp.float32)]  # fmt: skip

    def body(q_ref, *refs):
        given = dict(zip(present, refs))
        _programs(static, blocks, splits.size, G, q_ref, given, refs[len(present) :])

    out, lse, *partial = pl.pallas_call(
        body,
        grid=(min(PROGRAMS, R * splits.most * G),),
        out_shape=out_shape,
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="paged_decode",
    )(q, *present.values())
    return _merge(static, splits, sinks, out, lse, *partial, interpret=interpret) if several else (out, lse)


def _heads(static: Static, g: Array, least: int) -> tuple[Array, Array]:
    """The query heads of key/value head g as a padded range, and which of them are its own. The others must be masked,
    and are not clamped: an interpreter writes masked places back, and would undo what an equal place has got."""
    h = jnp.arange(max(least, 1 << (static.ratio - 1).bit_length()), dtype=jnp.int32)
    return h + g * static.ratio, h < static.ratio


def _locate(ends_ref: Any, item: Array) -> tuple[Array, Array]:
    """(row, number within the row) of an item of a list of which row r has ends[r] - ends[r - 1]."""
    R = ends_ref.shape[0]
    r = jnp.arange(max(16, 1 << (R - 1).bit_length()), dtype=jnp.int32)
    ends = tile.load(ends_ref.at[r], r < R)
    before = (ends <= item) & (r < R)
    return jnp.sum(before.astype(jnp.int32)), item - jnp.max(jnp.where(before, ends, 0))


def _programs(
    static: Static, blocks: Blocks, split: int, G: int, q_ref: Any, refs: dict[str, Any], outs: tuple[Any, ...]
) -> None:
    cache = Cache(refs["k_pages"], refs["v_pages"], refs.get("k_scales"), refs.get("v_scales"), refs["page_table"])
    num_items = refs["ends"][refs["ends"].shape[0] - 1] * G
    d, d_exists = tile.dims(static)

    def item(i: Array) -> Array:
        # Heads are the fastest: programs beside each other read the same pages.
        g = i % G
        row, nth = _locate(refs["ends"], i // G)
        n, first = refs["lens"][row], refs["first"][row]
        begin = (first + nth) * split
        end = jnp.minimum(begin + split, n)
        heads, exist = _heads(static, g, blocks.rows)
        B = heads.shape[0]
        mask = tile.both(exist, d_exists, (B, static.padded_dim))
        q = tile.load(q_ref.at[row, heads[:, None], d[None, :]], mask)
        at = jnp.zeros_like(heads) + n - 1
        slopes = tile.load(refs["alibi"].at[heads], exist) if "alibi" in refs else None
        low = tile.first_seen(static, at)
        start = begin if static.span is None else jnp.maximum(begin, tile.first_seen(static, n - 1))

        def one(j: Array, softmax: Softmax) -> Softmax:
            return tile.step(
                static, blocks.tile, cache, row, g, q, at, slopes, softmax, j * blocks.tile, (start, end), (low, at)
            )

        stop = (end + blocks.tile - 1) // blocks.tile
        softmax = lax.fori_loop(start // blocks.tile, stop, one, Softmax.start(B, static.padded_dim))
        whole = (nth == 0) & (end == n)
        _store(static, refs, outs, softmax, (row, nth, heads, exist, d, mask), whole)
        return i + pl.num_programs(0)

    lax.while_loop(lambda i: i < num_items, item, pl.program_id(0))


def _store(static: Static, refs: dict[str, Any], outs: tuple[Any, ...], softmax: Softmax, where: tuple, whole: Array) -> None:
    """A row of one split is done; other splits wait to be merged."""
    row, nth, heads, exist, d, mask = where
    out_ref, lse_ref, *partial = outs

    @pl.when(whole)
    def _():
        sinks = tile.load(refs["sinks"].at[heads], exist) if "sinks" in refs else None
        result, score = tile.finish(softmax, sinks)
        plt.store(out_ref.at[row, heads[:, None], d[None, :]], result.astype(out_ref.dtype), mask=mask)
        plt.store(lse_ref.at[row, heads], score * tile.LN2, mask=exist)

    if not partial:
        return

    @pl.when(~whole)
    def _():
        result, score = tile.finish(softmax, None)
        plt.store(partial[0].at[row, nth, heads[:, None], d[None, :]], result, mask=mask)
        plt.store(partial[1].at[row, nth, heads], score, mask=exist)


def _merge(
    static: Static,
    splits: Splits,
    sinks: Array | None,
    out: Array,
    lse: Array,
    partial: Array,
    scores: Array,
    *,
    interpret: bool,
) -> tuple[Array, Array]:
    """Adds up the rows of several splits, in float32."""
    _, H, D = out.shape
    R, G = splits.first.shape[0], H // static.ratio
    present = [splits.ends, splits.merged_ends, partial, scores, *([] if sinks is None else [sinks])]

    def body(ends, merged_ends, partial, scores, *rest):
        sinks_ref = rest[0] if sinks is not None else None
        out_ref, lse_ref = rest[-2:]
        d, d_exists = tile.dims(static)
        num_items = merged_ends[R - 1] * G

        def item(i: Array) -> Array:
            g = i % G
            row, _ = _locate(merged_ends, i // G)
            number = ends[row] - jnp.where(row > 0, ends[jnp.maximum(row - 1, 0)], 0)
            heads, exist = _heads(static, g, 1)
            mask = tile.both(exist, d_exists, (heads.shape[0], static.padded_dim))

            def add(s: Array, softmax: Softmax) -> Softmax:
                x = tile.load(partial.at[row, s, heads[:, None], d[None, :]], mask)
                score = tile.load(scores.at[row, s, heads], exist)
                m = jnp.maximum(softmax.m, score)
                shrink, weight = jnp.exp2(softmax.m - m), jnp.exp2(score - m)
                return Softmax(softmax.acc * shrink[:, None] + x * weight[:, None], m, softmax.l * shrink + weight)

            softmax = lax.fori_loop(0, number, add, Softmax.start(heads.shape[0], static.padded_dim))
            sinks = None if sinks_ref is None else tile.load(sinks_ref.at[heads], exist)
            result, score = tile.finish(softmax, sinks)
            plt.store(out_ref.at[row, heads[:, None], d[None, :]], result.astype(out_ref.dtype), mask=mask)
            plt.store(lse_ref.at[row, heads], score * tile.LN2, mask=exist)
            return i + pl.num_programs(0)

        lax.while_loop(lambda i: i < num_items, item, pl.program_id(0))

    return pl.pallas_call(
        body,
        grid=(min(PROGRAMS, R * G),),
        out_shape=(jax.ShapeDtypeStruct(out.shape, out.dtype), jax.ShapeDtypeStruct(lse.shape, lse.dtype)),
        input_output_aliases={len(present): 0, len(present) + 1: 1},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="merge_splits",
    )(*present, out, lse)
