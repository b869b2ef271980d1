"""The Hopper prefill kernel: FlashAttention-3's structure over pages, in Pallas Mosaic GPU.

Two compute warpgroups with 64 rows of queries each and one that fetches, in a persistent CTA an SM. While one compute
warpgroup works on its softmax, the other's matrix products run: they take turns (`turn`), and a turn is the product of the
last block's probabilities with the values and that of the queries with the next block's keys, one behind the other.

Rows are (query, head of a group) pairs, n = H/G of them a query, so a block of keys is fetched once for the whole group.
Alternative: one query head a CTA. The bytes fetched a product are the same, as a tile has 128 rows either way. But a packed
tile spans only 128/n queries: fewer products lie above the diagonal, and chunks shorter than 128 queries fill their tiles.

Blocks are walked from a tile's last key to its first, so that the diagonal and the sequence's end come first: a row whose keys
of a block are all masked has seen none before or has its maximum already, and either makes what it adds there vanish.
Source: Shah et al. 2024 (FlashAttention-3); Milakov & Gimelshein 2018 (online softmax).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.interpret import interpreter
from pallas_kernels.mosaic_gpu.tuning import SHARED_MEMORY, PrefillConfig

# Finite, so that MASKED - MASKED is not NaN, and a power of two, so that it is 0 also if a multiply-add computes it.
MASKED = -(2.0**100)
LOG2E = math.log2(math.e)
WARPGROUPS = 2  # that compute
OVERHEAD = 3072  # bytes of shared memory beside queries, keys, values and outputs
TAIL = 16  # tokens: pages are multiples of it
GRANULE = 8  # rows: TMA and swizzled shared memory know places in multiples of it
ROW, KV_LEN, FIRST, LAST, QUERIES, TILE = range(6)  # columns of the list of work
_ACC: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
_WARPGROUP = plgpu.LoweringSemantics.Warpgroup
# No scratch for reductions: sums along rows are among threads of a warp.
_PARAMS = plgpu.CompilerParams(lowering_semantics=_WARPGROUP, approx_math=True, reduction_scratch_bytes=0)


class Problem(NamedTuple):
    """What is static. n: rows a query; per_tile: queries a tile; tile_rows: its rows in packed queries, padding included."""

    G: int
    D: int
    n: int
    per_tile: int
    tile_rows: int
    block: int  # keys
    piece: int  # tokens a TMA
    page_size: int
    stages: int
    scale: float
    window: int | None
    soft_cap: float | None
    sinks: bool
    alibi: bool
    dtype: Any


class Inputs(NamedTuple):
    """q: packed queries [A * 8, G, D]. k, v: the cache by tokens [P * K, G, D]. tails: [(R + 1) * 16, G, D]: of each row the 16
    values that its sequence ends among, 0 past its end; then 16 zeros. page_table: int32 [R, M], as wide as whole blocks.
    work: int32 [N, 6], a tile a row: (row of the batch, its kv_len, positions of the first and the last query, its first
    granule in the packed queries, its number), those with the most keys first. num_used: int32 [1]: how many mean something.
    per_row: float32 [1 or 2, G, 128]: sinks and then ALiBi's slopes of a tile's rows, base 2; None: neither."""

    q: Any
    k: Any
    v: Any
    tails: Any
    page_table: Any
    work: Any
    num_used: Any
    per_row: Any


class _Buffers(NamedTuple):
    """Shared memory and barriers of a CTA. Barriers `*_full` say that a buffer was filled, `*_free` that it may be."""

    q: Any  # [2, 64, D]
    out: Any  # alike; None: there is no room, a warpgroup puts its output where its queries were, and the next ones wait for it
    k: Any  # [stages, block, D]
    v: Any
    lse: Any  # [2, 64]
    per_row: Any  # [.., 128]: sinks and ALiBi's slopes of the rows, as far as there are any
    q_full: Any
    q_free: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any
    turn: Any  # a barrier a compute warpgroup


class _Tile(NamedTuple):
    """An item of work: a tile of queries and a head of keys and values. Scalars."""

    get: Any  # what else the list of work has, by column: read where it is needed, as registers are scarce
    first: Any
    last: Any
    g: Any
    low: Any  # its blocks of keys
    high: Any


def run(p: Problem, config: PrefillConfig, inputs: Inputs, interpret: Any) -> tuple[Array, Array]:
    """Outputs and log-sum-exps of the tiles' rows, by the tiles' numbers: [N * 128, G, D] and float32 [G, N * 128]. What is
    not a query's row, and what is of no tile in use, may hold anything."""
    num_tiles, rows = inputs.work.shape[0], config.block_q
    ctas = num_tiles * p.G if _is_large(p) else min(config.num_ctas, num_tiles * p.G)
    # A compute and the memory warpgroup's; 65,536 in all. The latter has the places of a block's pages in registers.
    registers = (240, 24) if _is_large(p) else (232, 40) if p.block // p.piece <= 4 else (224, 56)
    tiled = (plgpu.TilingTransform((GRANULE, 64)), plgpu.SwizzleTransform(128))
    has_room = 2 * (2 * WARPGROUPS * rows + 2 * p.stages * p.block) * p.D + OVERHEAD <= SHARED_MEMORY
    buffers = _Buffers(
        q=plgpu.SMEM((WARPGROUPS, rows, p.D), p.dtype, transforms=tiled),
        out=plgpu.SMEM((WARPGROUPS, rows, p.D), p.dtype, transforms=tiled) if has_room else None,
        k=plgpu.SMEM((p.stages, p.block, p.D), p.dtype, transforms=tiled),
        v=plgpu.SMEM((p.stages, p.block, p.D), p.dtype, transforms=tiled),
        lse=plgpu.SMEM((WARPGROUPS, rows), jnp.float32),
        per_row=plgpu.SMEM((max(1, p.sinks + p.alibi), WARPGROUPS * rows), jnp.float32),
        q_full=plgpu.Barrier(num_arrivals=WARPGROUPS + p.sinks + p.alibi),
        q_free=plgpu.Barrier(num_arrivals=WARPGROUPS),
        k_full=plgpu.Barrier(num_arrivals=p.block // p.piece, num_barriers=p.stages),
        v_full=plgpu.Barrier(num_arrivals=p.block // TAIL, num_barriers=p.stages),
        k_free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=p.stages),
        v_free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=p.stages),
        turn=plgpu.Barrier(num_barriers=WARPGROUPS),
    )
    scratch, structure = jax.tree.flatten(buffers)
    num_inputs = len(jax.tree.leaves(inputs))

    def body(*refs):
        given = jax.tree.unflatten(jax.tree.structure(inputs), refs[:num_inputs])
        out, lse, *rest = refs[num_inputs:]
        b = jax.tree.unflatten(structure, rest)
        warpgroup = lax.axis_index("warpgroup")
        my_tiles = partial(_my_tiles, p, ctas, given)

        @pl.when(warpgroup < WARPGROUPS)
        def _():
            plgpu.set_max_registers(registers[0], action="increase")
            _compute(p, b, warpgroup, my_tiles, out, lse, bool(interpret))

        @pl.when(warpgroup == WARPGROUPS)
        def _():
            plgpu.set_max_registers(registers[1], action="decrease")
            _fetch(p, b, my_tiles, given)

    rows_out = num_tiles * WARPGROUPS * rows
    kernel = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((rows_out, p.G, p.D), p.dtype), jax.ShapeDtypeStruct((p.G, rows_out), jnp.float32)),
        scratch_types=scratch, grid=(ctas,), grid_names=("cta",), num_threads=WARPGROUPS + 1, thread_name="warpgroup",
        compiler_params=_PARAMS, interpret=interpreter() if interpret is True else interpret, kernel_name="paged_prefill",
    )  # fmt: skip
    return kernel(*jax.tree.leaves(inputs))


def _is_large(p: Problem) -> bool:
    """At head dim 256 accumulators leave no registers for what a persistent kernel keeps: a CTA has one item of work."""
    return p.D > 192


def _my_tiles(p: Problem, ctas: int, given: Inputs, visit: Any) -> tuple[Any, Any]:
    """visit(tile, items so far, blocks so far) for each item of this CTA. Returns the numbers of its blocks and items.

    Items are dealt out longest first and to and fro, so that no CTA gets the longer one every time. Neighbours have one tile
    and different heads, so the tiles at work at a time are few, and read the same keys at about the same time."""
    cta = lax.axis_index("cta")
    work, total = given.work, given.num_used[0] * p.G
    deals, rest = lax.div(total, jnp.int32(ctas)), lax.rem(total, jnp.int32(ctas))
    seat = lambda deal: jnp.where(lax.rem(deal, jnp.int32(2)) == 0, cta, ctas - 1 - cta)

    def one(deal, steps):
        item = deal * ctas + seat(deal)
        at = lax.div(item, jnp.int32(p.G))
        first, last = work[at, FIRST], work[at, LAST]
        high = lax.div(last, jnp.int32(p.block)) + 1
        low = jnp.int32(0) if p.window is None else lax.div(jnp.maximum(first - (p.window - 1), 0), jnp.int32(p.block))
        tile = _Tile(lambda column: work[at, column], first, last, lax.rem(item, jnp.int32(p.G)), low, high)
        visit(tile, deal, steps)
        return steps + (high - low)

    if ctas == work.shape[0] * p.G:  # without a loop the compiler keeps no addresses in registers from tile to tile
        has_one = cta < total
        return lax.cond(has_one, lambda: one(jnp.int32(0), jnp.int32(0)), lambda: jnp.int32(0)), has_one.astype(jnp.int32)
    mine = deals + (seat(deals) < rest).astype(jnp.int32)
    return lax.fori_loop(0, mine, one, jnp.int32(0)), mine


def _fetch(p: Problem, b: _Buffers, my_tiles: Any, given: Inputs) -> None:
    """The memory warpgroup: a tile's queries, and its keys and values a block at a time, last block first."""
    stages = jnp.int32(p.stages)
    rows = b.q.shape[1]
    pieces = range(p.block // p.piece)

    def fetch_tile(tile, deal, steps):
        row, kv_len = tile.get(ROW), tile.get(KV_LEN)

        def places(i):
            """Where the pieces of the i-th block are, in pieces."""
            at = jnp.maximum(tile.high - 1 - i, 0)
            if p.page_size <= p.block:
                return tuple(given.page_table[row, at * len(pieces) + piece] for piece in pieces)
            blocks = jnp.int32(p.page_size // p.block)  # a page
            return (given.page_table[row, lax.div(at, blocks)] * blocks + lax.rem(at, blocks),)

        def copy(tokens, found, buffer, slot, full):
            for piece in pieces:
                # The compiler must see a multiple of 8, so the factor stands here.
                source = tokens.at[pl.ds(found[piece] * p.piece, p.piece), tile.g]
                plgpu.copy_gmem_to_smem(source, buffer.at[slot, pl.ds(piece * p.piece, p.piece)], full)

        oldest = 0 if p.window is None else jnp.maximum(tile.first - (p.window - 1), 0)

        def copy_edge(i, slot, full):
            """Values of a block that the sequence ends in, or the first query's window begins in. What nobody sees may be NaN,
            against which a probability of 0 does not help: the part with the end in it, and those beyond, are of `tails`."""

            @pl.loop(0, p.block // TAIL)
            def _(x):
                here, tail = b.v.at[slot, pl.ds(x * TAIL, TAIL)], (tile.high - 1 - i) * (p.block // TAIL) + x
                token = tail * TAIL
                is_whole = (token + TAIL <= kv_len) & (token + TAIL > oldest)

                @pl.when(is_whole)
                def _():
                    tails_a_page = jnp.int32(p.page_size // TAIL)
                    at = given.page_table[row, lax.div(tail, tails_a_page)] * tails_a_page + lax.rem(tail, tails_a_page)
                    plgpu.copy_gmem_to_smem(given.v.at[pl.ds(at * TAIL, TAIL), tile.g], here, full)

                @pl.when(jnp.logical_not(is_whole))
                def _():
                    has_end = (token < kv_len) & (token + TAIL > kv_len)
                    tail_row = jnp.where(has_end, row, given.tails.shape[0] // TAIL - 1)
                    plgpu.copy_gmem_to_smem(given.tails.at[pl.ds(tail_row * TAIL, TAIL), tile.g], here, full)

        def fetch_block(i, found):
            slot = lax.rem(steps + i, stages)

            def wait_for(free):
                @pl.when(steps + i >= p.stages)
                def _():
                    plgpu.barrier_wait(free.at[slot])

            wait_for(b.k_free)
            copy(given.k, found, b.k, slot, b.k_full.at[slot])

            @pl.when(i == 0)  # the keys first: their buffer is free before the last tile's queries are
            def _():
                @pl.when(deal > 0)
                def _():
                    plgpu.barrier_wait(b.q_free)

                for w in range(WARPGROUPS):
                    here = pl.ds(tile.get(QUERIES) * GRANULE + w * rows, rows)
                    plgpu.copy_gmem_to_smem(given.q.at[here, tile.g], b.q.at[w], b.q_full)
                for x in range(p.sinks + p.alibi):
                    plgpu.copy_gmem_to_smem(given.per_row.at[x, tile.g], b.per_row.at[x], b.q_full)

            ahead = places(i + 1)  # read a block ahead and before a wait, so that nobody waits for it
            wait_for(b.v_free)
            at_edge = (i == 0) & (tile.high * p.block > kv_len)
            if p.window is not None:
                at_edge |= (tile.high - 1 - i) * p.block < oldest
            full = b.v_full.at[slot]

            @pl.when(at_edge)
            def _():
                copy_edge(i, slot, full)

            @pl.when(jnp.logical_not(at_edge))
            def _():
                copy(given.v, found, b.v, slot, full)
                for _more in range(p.block // TAIL - len(pieces)):  # the barrier counts tails
                    plgpu.barrier_arrive(full)

            return ahead

        lax.fori_loop(0, tile.high - tile.low, fetch_block, places(0))

    steps, deals = my_tiles(fetch_tile)

    # Every completion of a barrier must have been waited for before the CTA ends.
    for slot in range(p.stages):

        @pl.when(steps > slot)
        def _(slot=slot):
            plgpu.barrier_wait(b.k_free.at[slot])
            plgpu.barrier_wait(b.v_free.at[slot])

    @pl.when(deals > 0)
    def _():
        plgpu.barrier_wait(b.q_free)


def _compute(p: Problem, b: _Buffers, w: Any, my_tiles: Any, out: Any, lse: Any, interpret: bool) -> None:
    """A compute warpgroup: 64 rows of each tile."""
    rows, stages = b.q.shape[1], jnp.int32(p.stages)
    shape = (rows, p.block)
    across = lambda x, shape: lax.broadcast_in_dim(x, shape, [0])  # [64] -> [64, ...]
    # The softmax works in base 2: exp2 is one instruction. Where nothing comes between the scores and it, scale is a factor of
    # the multiply-add that subtracts the maximum; that needs a scale that keeps the order and does not let MASKED overflow.
    factor = p.scale * LOG2E
    is_plain = p.soft_cap is None and not p.alibi and 1e-6 < factor < 1e6
    to_base_2 = jnp.float32(factor if is_plain else 1.0)

    take_turn = lambda: plgpu.barrier_wait(b.turn.at[w])
    pass_turn = lambda: plgpu.barrier_arrive(b.turn.at[1 - w])

    pl.when(w == 1)(pass_turn)  # the first warpgroup begins

    def compute_tile(tile, deal, steps):
        row = lax.broadcasted_iota(jnp.int32, (rows,), 0) + w * rows
        position = jnp.minimum(tile.first + lax.div(row, jnp.int32(p.n)), tile.last)  # rows beyond the last: padding
        slot_of = lambda i: lax.rem(steps + i, stages)

        def softmax(s, i, m, causal, windowed):
            """s [64, block]: scores of the i-th block. Returns p in the values' dtype, its sums, the new maxima m (base 2) and
            the factors [64] of all that was added up so far."""
            first_key = (tile.high - 1 - i) * p.block
            if not is_plain:
                s = s * jnp.float32(factor)
            if p.soft_cap is not None:
                # tanh(x) = 1 - 2 / (1 + e^2x). The hardware's own tanh has 11 bits: times a cap of 50 that is 0.02 in the
                # exponent. 1 / y is rsqrt(y)^2: a division would be a dozen instructions.
                cap = p.soft_cap * LOG2E
                r = lax.rsqrt(1.0 + jnp.exp2(s * jnp.float32(2 * LOG2E / cap)))
                s = jnp.float32(cap) - jnp.float32(2 * cap) * (r * r)
            if p.alibi or causal or windowed:
                # Two ways to write it: of each, the registers that the compiler runs out of are the other's. Found by trying.
                origin = first_key if _is_large(p) else jnp.int32(0)
                key, here = lax.broadcasted_iota(jnp.int32, shape, 1) + origin, across(position - (first_key - origin), shape)
                if p.alibi:  # read each time: registers are scarcer
                    slope = b.per_row[int(p.sinks), pl.ds(w * rows, rows)]
                    s = s + across(slope, shape) * (key - here).astype(jnp.float32)
                if windowed:  # keys after the query wrap around
                    s = jnp.where((here - key).astype(jnp.uint32) < jnp.uint32(p.window), s, MASKED)
                elif causal:
                    s = jnp.where(key <= here, s, MASKED)
            new_m = jnp.maximum(m, s.max(axis=1) * to_base_2)
            shrink = jnp.exp2(m - new_m)
            e = jnp.exp2(s * to_base_2 - across(new_m, shape))
            return e.astype(p.dtype), e.sum(axis=1), new_m, shrink

        # The last block: nothing to multiply with values yet.
        slot = slot_of(0)
        plgpu.barrier_wait(b.q_full)
        plgpu.barrier_wait(b.k_full.at[slot])
        take_turn()
        if interpret:
            s = jnp.dot(b.q[w], b.k[slot].T, preferred_element_type=jnp.float32)
            pass_turn()
        else:

            def first_scores(s_ref):
                plgpu.wgmma(s_ref, b.q.at[w], b.k.at[slot].T)
                pass_turn()
                return s_ref[...]

            s = pl.run_scoped(first_scores, _ACC(shape, jnp.float32))
        plgpu.barrier_arrive(b.k_free.at[slot])
        m = jnp.full((rows,), MASKED, jnp.float32)
        e, l, m, _ = softmax(s, 0, m, True, p.window is not None)
        acc = jnp.zeros((rows, p.D), jnp.float32)

        def step(i, carry, *, causal, windowed):
            acc, m, l, e = carry
            slot, v_slot = slot_of(i), slot_of(i - 1)
            plgpu.barrier_wait(b.v_full.at[v_slot])
            plgpu.barrier_wait(b.k_full.at[slot])
            take_turn()
            if interpret:
                acc = acc + jnp.dot(e, b.v[v_slot], preferred_element_type=jnp.float32)
                s = jnp.dot(b.q[w], b.k[slot].T, preferred_element_type=jnp.float32)
                pass_turn()
            else:

                def products(refs):
                    acc_ref, s_ref = refs
                    plgpu.wgmma(acc_ref, e, b.v.at[v_slot])
                    plgpu.wgmma(s_ref, b.q.at[w], b.k.at[slot].T)
                    pass_turn()

                acc, s = pl.run_state(products)((_ACC.init(acc), _ACC.init(jnp.zeros(shape, jnp.float32))))
            plgpu.barrier_arrive(b.v_free.at[v_slot])
            plgpu.barrier_arrive(b.k_free.at[slot])
            e, sums, m, shrink = softmax(s, i, m, causal, windowed)
            return acc * across(shrink, acc.shape), m, l * shrink + sums, e

        # Sections: keys that some query may not see yet, keys that all see, keys that have left some query's window.
        num_blocks = tile.high - tile.low
        seen_by_all = lax.div(tile.first + 1, jnp.int32(p.block))  # this block is the first that is not
        masked = jnp.minimum(jnp.maximum(tile.high - seen_by_all, 1), num_blocks)
        carry = lax.fori_loop(1, masked, partial(step, causal=True, windowed=p.window is not None), (acc, m, l, e))
        if p.window is None:
            carry = lax.fori_loop(masked, num_blocks, partial(step, causal=False, windowed=False), carry)
        else:
            # The first block whose keys are all in the last query's window.
            inside = lax.div(jnp.maximum(tile.last - p.window + p.block, 0), jnp.int32(p.block))
            clear = jnp.minimum(jnp.maximum(tile.high - inside, masked), num_blocks)
            carry = lax.fori_loop(masked, clear, partial(step, causal=False, windowed=False), carry)
            carry = lax.fori_loop(clear, num_blocks, partial(step, causal=False, windowed=True), carry)
        acc, m, l, e = carry

        sink = b.per_row[0, pl.ds(w * rows, rows)] if p.sinks else None
        if b.out is not None:
            plgpu.barrier_arrive(b.q_free)
        slot = slot_of(num_blocks - 1)
        plgpu.barrier_wait(b.v_full.at[slot])
        take_turn()
        if interpret:
            acc = acc + jnp.dot(e, b.v[slot], preferred_element_type=jnp.float32)
            pass_turn()
        else:

            def last_product(acc_ref):
                plgpu.wgmma(acc_ref, e, b.v.at[slot])
                pass_turn()

            acc = pl.run_state(last_product)(_ACC.init(acc))
        plgpu.barrier_arrive(b.v_free.at[slot])

        if sink is not None:
            new_m = jnp.maximum(m, sink)
            shrink = jnp.exp2(m - new_m)
            acc, l, m = acc * across(shrink, acc.shape), l * shrink + jnp.exp2(sink - new_m), new_m
        staged = b.q if b.out is None else b.out
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last tile's
        staged[w] = (acc * across(1.0 / l, acc.shape)).astype(p.dtype)
        b.lse[w] = m * jnp.float32(1 / LOG2E) + jnp.log(l)
        plgpu.commit_smem()
        at = tile.get(TILE) * (WARPGROUPS * rows) + w * rows
        plgpu.copy_smem_to_gmem(staged.at[w], out.at[pl.ds(at, rows), tile.g])
        plgpu.copy_smem_to_gmem(b.lse.at[w], lse.at[tile.g, pl.ds(at, rows)])
        if b.out is None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(b.q_free)

    my_tiles(compute_tile)
    plgpu.wait_smem_to_gmem(0)

    pl.when(w == 0)(take_turn)  # the one that nobody needed
