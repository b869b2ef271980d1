"""Rows with more than one query: a program for each block of queries and each key/value head.

The query heads of a key/value head are packed with the queries into the rows of one matrix, so that keys and values are
read once for all of them. The loop over keys has up to three sections, so that tiles which every query sees whole pay no
mask: those cut by the window or by the beginning of a chunk of positions, the whole ones, those cut by causality.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.triton import tile
from pallas_kernels.triton.blocks import Blocks
from pallas_kernels.triton.tile import Cache, Softmax, Static


def prefill(
    q: Array,
    cache: Cache,
    kv_lens: Array,
    query_start: Array,
    counts: Array,
    sinks: Array | None,
    alibi: Array | None,
    out: Array,
    lse: Array,
    *,
    static: Static,
    blocks: Blocks,
    interpret: bool,
) -> tuple[Array, Array]:
    """Fills the places of chunks' tokens in out [T, H, D] and lse [T, H], and the places of nobody with zeros."""
    (T, H, _), R = q.shape, kv_lens.shape[0]
    G = H // static.ratio
    block_q = blocks.rows // static.ratio
    # A chunk has two queries or more, so there are at most T // 2; each may leave its last block half empty.
    num_blocks = -(-T // block_q) + min(R, T // 2)

    def body(q_ref, *refs):
        names = ("k_pages", "v_pages", "k_scales", "v_scales", "page_table", "lens", "start", "counts", "sinks", "alibi")
        given = dict(zip([n for n, x in zip(names, inputs) if x is not None], refs))
        _program(static, blocks, block_q, num_blocks, q_ref, given, *refs[-2:])

    inputs = (*cache[:4], cache.page_table, kv_lens, query_start, counts, sinks, alibi)
    present = [x for x in inputs if x is not None]
    return pl.pallas_call(
        body,
        # Heads are the fastest axis: those of one block run together and read the same pages.
        grid=(G, num_blocks),
        out_shape=(jax.ShapeDtypeStruct(out.shape, out.dtype), jax.ShapeDtypeStruct(lse.shape, lse.dtype)),
        input_output_aliases={len(present) + 1: 0, len(present) + 2: 1},
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="paged_prefill",
    )(q, *present, out, lse)


def _program(static: Static, blocks: Blocks, block_q: int, num_blocks: int, q_ref: Any, refs: dict[str, Any], out_ref, lse_ref):
    g = pl.program_id(0)
    # The last blocks of a causal chunk are the longest: they start first.
    block = num_blocks - 1 - pl.program_id(1)
    r = jnp.arange(blocks.rows, dtype=jnp.int32)
    query, head = r // static.ratio, r % static.ratio + g * static.ratio  # [B]
    in_block = query < block_q
    _clear(static, refs, block * block_q + query, head, in_block, out_ref, lse_ref)
    row, first = _find(refs, block, block_q)
    start, stop = refs["start"][row], refs["start"][row + 1]

    @pl.when((row >= refs["counts"][0]) & (row < refs["counts"][1]) & (first < stop - start))
    def _():
        n = refs["lens"][row]
        context = n - (stop - start)
        is_query = in_block & (first + query < stop - start)
        token = start + first + query
        at = context + first + query
        d, d_exists = tile.dims(static)
        place = token[:, None], head[:, None], d[None, :]
        mask = tile.both(is_query, d_exists, (blocks.rows, static.padded_dim))
        queries = tile.load(q_ref.at[place], mask)
        slopes = tile.load(refs["alibi"].at[head], in_block) if "alibi" in refs else None
        sinks = tile.load(refs["sinks"].at[head], in_block) if "sinks" in refs else None
        last = jnp.minimum(context + first + block_q, n) - 1  # the last position of the block
        softmax = _attend(static, blocks.tile, refs, row, g, queries, at, slopes, context + first, last, n)
        result, score = tile.finish(softmax, sinks)
        plt.store(out_ref.at[place], result.astype(out_ref.dtype), mask=mask)
        plt.store(lse_ref.at[token, head], score * tile.LN2, mask=is_query)


def _clear(static: Static, refs: dict[str, Any], token: Array, head: Array, mine: Array, out_ref: Any, lse_ref: Any) -> None:
    """Zeros for the tokens of this block's share of the batch that no row owns: what is there may be NaN."""
    T = out_ref.shape[0]
    used = refs["start"][refs["counts"][1]]
    nobody = mine & (token >= used) & (token < T)
    d, d_exists = tile.dims(static)
    mask = tile.both(nobody, d_exists, (token.shape[0], static.padded_dim))
    zeros = jnp.zeros((token.shape[0], static.padded_dim), out_ref.dtype)
    plt.store(out_ref.at[token[:, None], head[:, None], d[None, :]], zeros, mask=mask)
    plt.store(lse_ref.at[token, head], jnp.zeros(token.shape, jnp.float32), mask=nobody)


def _find(refs: dict[str, Any], block: Array, block_q: int) -> tuple[Array, Array]:
    """Which row a block belongs to, and its first query in that row.

    Row r's blocks begin at number start[r] // block_q + r (decodes own none of them): every row begins at least one block
    after the one before, so the numbers rise, and the last row that begins at or before a block owns it."""
    decodes = refs["counts"][0]
    base = refs["start"][decodes]
    first_block = lambda row: (refs["start"][row] - base) // block_q + row - decodes
    R = refs["lens"].shape[0]

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        left = first_block(middle) <= block
        return jnp.where(left, middle, low), jnp.where(left, high, middle)

    low, _ = lax.fori_loop(0, R.bit_length(), halve, (decodes, jnp.int32(R)))
    row = jnp.minimum(low, R - 1)  # R: there are only decodes
    return row, (block - first_block(row)) * block_q


def _attend(
    static: Static, N: int, refs: dict[str, Any], row: Array, g: Array, q: Array, at: Array, slopes: Array | None,
    lowest: Array, highest: Array, n: Array,
) -> Softmax:  # fmt: skip
    """All keys, N at a time, that queries at positions lowest .. highest see."""
    cache = Cache(refs["k_pages"], refs["v_pages"], refs.get("k_scales"), refs.get("v_scales"), refs["page_table"])
    low = tile.first_seen(static, at)
    oldest = tile.first_seen(static, lowest)

    def section(whole: bool):
        def one(i: Array, softmax: Softmax) -> Softmax:
            within, seen = (None, None) if whole else ((oldest, n), (low, at))
            return tile.step(static, N, cache, row, g, q, at, slopes, softmax, i * N, within, seen)

        return one

    stop = highest // N + 1
    whole_stop = (lowest + 1) // N  # before it, every key is at or before the first query
    softmax = Softmax.start(q.shape[0], static.padded_dim)
    begin = jnp.int32(0)
    if static.span is not None:
        begin = oldest // N
        whole_begin = (tile.first_seen(static, highest) + N - 1) // N
        whole_begin = jnp.clip(whole_begin, begin, stop)
        softmax = lax.fori_loop(begin, whole_begin, section(False), softmax)
        begin, whole_stop = whole_begin, jnp.maximum(whole_stop, whole_begin)
    softmax = lax.fori_loop(begin, whole_stop, section(True), softmax)
    return lax.fori_loop(whole_stop, stop, section(False), softmax)
