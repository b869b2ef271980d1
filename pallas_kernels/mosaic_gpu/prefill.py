"""Attention of chunks on Hopper: FlashAttention-3's structure over pages, in Pallas Mosaic GPU.

Two compute warpgroups with 64 rows of queries each and one that fetches, in a persistent CTA an SM. While one compute
warpgroup works on its softmax, the other's matrix products run: they take turns (`turn`), and a turn is the product of the
last block's probabilities with the values and that of the queries with the next block's keys, one behind the other.

Rows are (query, head of a group) pairs, n = H/G of them a query, so a block of keys is fetched once for the whole group.
Alternative: one query head a CTA. The bytes fetched a product are the same, as a tile has 128 rows either way. But a packed
tile spans only 128/n queries: fewer products lie above the diagonal, and chunks shorter than 128 queries fill their tiles.

Blocks are walked from a tile's last key to its first: what needs masks and care, the diagonal and the sequence's end, comes
at the start, where the warpgroups do not take turns yet.
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

from pallas_kernels.mosaic_gpu.decode import interpreter
from pallas_kernels.mosaic_gpu.tuning import SHARED_MEMORY, PrefillConfig

# Finite, so that MASKED - MASKED is not NaN, and a power of two, so that it is 0 also if a multiply-add computes it.
MASKED = -(2.0**100)
LOG2E = math.log2(math.e)
WARPGROUPS = 2  # that compute
OVERHEAD = 3072  # bytes of shared memory beside queries, keys, values and outputs
TAIL = 16  # tokens: pages are multiples of it
GRANULE = 8  # rows: TMA and swizzled shared memory know places in multiples of it
ROW, KV_LEN, FIRST, LAST, QUERIES, TILE = range(6)  # columns of the list of work


class _Problem(NamedTuple):
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


# A jit of its own: a step calls this once a layer, and traces it once.
@partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "config", "interpret"))
def prefill(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    kv_lens: Array,
    query_start: Array,
    counts: Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    alibi: Array | None = None,
    config: PrefillConfig,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """`ops.paged_attention` of the rows counts[0] <= r < counts[1], which have one query or more; other tokens get 0.

    interpret: False, True, or parameters of JAX's interpreter of GPU kernels.
    Raises: NotImplementedError for head dims, page sizes and dtypes that the kernel does not have.
    """
    T, H, D = q.shape
    problem = _problem(q, k_pages, scale, window, soft_cap, sinks, alibi, config)
    plan = _plan(problem, T, page_table.shape[0], config.block_q, kv_lens, query_start, counts)
    per_row = [_per_row(x, problem, config.block_q) for x in (sinks, alibi) if x is not None]
    tiles = _call(problem, plan, config, interpret)(
        _packed_queries(q, problem, plan), *map(_by_token, (k_pages, v_pages)), _tails(v_pages, page_table, kv_lens),
        _whole_blocks(page_table, problem), plan.work, plan.num_used,
        *([jnp.stack(per_row)] if per_row else []),
    )  # fmt: skip
    return tuple(_unpacked(x, plan, H) for x in tiles)


def _problem(
    q: Array, k_pages: Array, scale: float, window: int | None, soft_cap: float | None, sinks: Array | None, alibi: Array | None,
    config: PrefillConfig,
) -> _Problem:  # fmt: skip
    (_, H, D), (_, K, G, _), block = q.shape, k_pages.shape, config.block_kv
    if jnp.dtype(k_pages.dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)) or q.dtype != k_pages.dtype:
        raise NotImplementedError(f"mosaic_gpu's prefill needs queries and a cache of one dtype, bfloat16 or float16, not "
                                  f"{q.dtype} and {k_pages.dtype}; triton has others")  # fmt: skip
    if D not in (64, 128, 192, 256) or H // G > config.block_q:
        raise NotImplementedError(f"mosaic_gpu's prefill has head dims 64, 128, 192 and 256 and up to {config.block_q} query heads "
                                  f"a group, not {D} and {H // G}; triton has others")  # fmt: skip
    if K % TAIL or (block % K and K % block):
        raise NotImplementedError(f"mosaic_gpu's prefill needs pages of a multiple of {TAIL} tokens that divide {block} or are "
                                  f"a multiple of it, not of {K}; triton has others")  # fmt: skip
    n = H // G
    per_tile = WARPGROUPS * config.block_q // n
    return _Problem(G, D, n, per_tile, _round_up(per_tile * n, GRANULE), block, min(K, block), K, config.stages,
                    scale, window, soft_cap, sinks is not None, alibi is not None, q.dtype)  # fmt: skip


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to


# -- around the kernel: plain jnp, alike for every layer of a step, so that XLA does it once -------------------------------------


class _Plan(NamedTuple):
    """work: int32 [N, 6], a tile a row: (row of the batch, its kv_len, positions of the first and the last query, its first
    granule in the packed queries, its number), those with the most keys first; num_used: int32 [1], how many mean something.
    packed: the query and the head in its group of each row of the packed queries, int32 [A * 8]. places: int32 [T, n]: where
    among the tiles' rows the kernel puts a token's heads; is_ours: [T]."""

    work: Array
    num_used: Array
    packed: tuple[Array, Array]
    places: Array
    is_ours: Array


def _plan(p: _Problem, T: int, R: int, block_q: int, kv_lens: Array, query_start: Array, counts: Array) -> _Plan:
    """Tiles never span two rows of the batch: what a row gets does not depend on its neighbours. The packed queries have no
    gaps but those that round a tile up to a granule: tiles are fetched at full size and hold rows of the next one too, which
    is cheaper than to write padding; the outputs' tiles have room for them, which costs nothing as nobody writes there."""
    numbers = jnp.arange(R, dtype=jnp.int32)
    is_chunk = (numbers >= counts[0]) & (numbers < counts[1])
    start = query_start[:-1]
    queries = jnp.where(is_chunk, query_start[1:] - start, 0)
    tile_ends = jnp.cumsum(-(-queries // p.per_tile))
    granules = queries // p.per_tile * (p.tile_rows // GRANULE) - (-(queries % p.per_tile * p.n) // GRANULE)
    granule_ends = jnp.cumsum(granules)
    first_tile, first_granule = (jnp.pad(ends[:-1], (1, 0)) for ends in (tile_ends, granule_ends))

    # Every tile but the last of a row is full; every tile has a query.
    num_tiles = min(T, (T + (p.per_tile - 1) * min(R, T)) // p.per_tile)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    row = _owner(tile_ends, tile)
    number = tile - first_tile[row]
    first = kv_lens[row] - queries[row] + number * p.per_tile
    last = jnp.minimum(first + p.per_tile, kv_lens[row]) - 1
    at = first_granule[row] + number * (p.tile_rows // GRANULE)
    keys = last + 1 if p.window is None else last + 1 - jnp.maximum(first - p.window + 1, 0)
    order = jnp.argsort(jnp.where(tile < tile_ends[-1], -keys, 1)).astype(jnp.int32)
    work = jnp.stack([row, kv_lens[row], first, last, at, tile], axis=1)[order]

    # A token of a full tile takes tile_rows / per_tile rows, one of the row's last tile n; that is rounded up to a granule.
    num_granules = -(-T * p.tile_rows // (GRANULE * p.per_tile)) + min(R, T) + WARPGROUPS * block_q // GRANULE
    granule = jnp.arange(num_granules, dtype=jnp.int32)
    row = _owner(granule_ends, granule)
    within = ((granule - first_granule[row]) * GRANULE)[:, None] + jnp.arange(GRANULE, dtype=jnp.int32)[None]
    place = within % p.tile_rows
    token = start[row][:, None] + within // p.tile_rows * p.per_tile + place // p.n
    packed = jnp.clip(token, 0, T - 1).reshape(-1), (place % p.n).reshape(-1)

    token = jnp.arange(T, dtype=jnp.int32)
    row = _owner(query_start[1:], token)
    is_ours = is_chunk[row] & (token < query_start[-1])
    number = jnp.where(is_ours, token - start[row], 0)
    place = (first_tile[row] + number // p.per_tile) * (WARPGROUPS * block_q) + number % p.per_tile * p.n
    places = jnp.where(is_ours, place, 0)[:, None] + jnp.arange(p.n, dtype=jnp.int32)[None]
    return _Plan(work, tile_ends[-1:], packed, places, is_ours)


def _owner(ends: Array, of: Array) -> Array:
    """The row in whose share each number lies. One fusion: a binary search would be a loop of small kernels."""
    return jnp.minimum(jnp.sum((ends[None] <= of[:, None]).astype(jnp.int32), axis=1), ends.shape[0] - 1)


def _packed_queries(q: Array, p: _Problem, plan: _Plan) -> Array:
    """[T, H, D] -> [A * 8, G, D]. Rows without a query hold some token's."""
    token, head = plan.packed
    return q.reshape(q.shape[0], p.G, p.n, p.D).at[token, :, head].get(mode="promise_in_bounds")


def _unpacked(tiles: Array, plan: _Plan, H: int) -> Array:
    """[N * 128, G, ...] -> [T, H, ...]. Rows that nobody wrote may hold anything."""
    x = tiles.at[plan.places].get(mode="promise_in_bounds").swapaxes(1, 2)  # [T, G, n, ...]
    x = x.reshape(x.shape[0], H, *x.shape[3:])
    return jnp.where(jnp.expand_dims(plan.is_ours, range(1, x.ndim)), x, jnp.zeros((), x.dtype))


def _by_token(pages: Array) -> Array:
    """[P, K, G, D] -> [P * K, G, D]: tiled, this has the five dims that a TMA descriptor may have."""
    return pages.reshape(-1, *pages.shape[2:])


def _tails(v_pages: Array, page_table: Array, kv_lens: Array) -> Array:
    """[(R + 1) * 16, G, D]: of each row the 16 values that its sequence ends among, 0 past its end; then 16 zeros."""
    K = v_pages.shape[1]
    at = jnp.maximum(kv_lens - 1, 0) // TAIL * TAIL
    page = jnp.take_along_axis(page_table, (at // K)[:, None], axis=1, mode="clip")[:, 0]
    tails = v_pages.reshape(-1, TAIL, *v_pages.shape[2:])[page * (K // TAIL) + at % K // TAIL]
    is_past = at[:, None] + jnp.arange(TAIL, dtype=jnp.int32)[None] >= kv_lens[:, None]
    tails = jnp.where(is_past[..., None, None], jnp.zeros((), tails.dtype), tails)
    return _by_token(jnp.pad(tails, ((0, 1), (0, 0), (0, 0), (0, 0))))


def _whole_blocks(page_table: Array, p: _Problem) -> Array:
    """Wide enough for the last block of the longest sequence, which may be longer than the table is."""
    return jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % (p.block // p.piece))))


def _per_row(x: Array, p: _Problem, block_q: int) -> Array:
    """A number a head -> float32 [G, 128]: that of each row of a tile, in base 2."""
    head = jnp.arange(WARPGROUPS * block_q) % p.n
    return (x.astype(jnp.float32) * LOG2E).reshape(p.G, p.n)[:, head]


# -- the kernel ------------------------------------------------------------------------------------------------------------


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
    """An item of work: scalars, and `[64]` numbers of a warpgroup's rows."""

    get: Any  # what else the list of work has, by column: read where it is needed, as registers are scarce
    first: Any
    last: Any
    g: Any
    low: Any  # its blocks of keys
    high: Any


def _call(p: _Problem, plan: _Plan, config: PrefillConfig, interpret: Any):
    num_tiles, rows = plan.work.shape[0], config.block_q
    # At head dim 256 the accumulators leave no registers for a persistent kernel, and none for queries to be fetched early.
    is_persistent = p.D <= 192
    ctas = min(config.num_ctas, num_tiles * p.G) if is_persistent else num_tiles * p.G
    # A compute and the memory warpgroup's; 65,536 in all. The latter has the places of a block's pages in registers.
    registers = ((232, 40) if p.block // p.piece <= 4 else (224, 56)) if is_persistent else (240, 24)
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

    def body(q, k, v, tails, table, work, num_used, *refs):
        per_row = refs[0] if p.sinks or p.alibi else None
        out, lse, *scratch = refs if per_row is None else refs[1:]
        b = jax.tree.unflatten(structure, scratch)
        warpgroup = lax.axis_index("warpgroup")
        my_tiles = partial(_my_tiles, p, ctas, work, num_used)

        @pl.when(warpgroup < WARPGROUPS)
        def _():
            plgpu.set_max_registers(registers[0], action="increase")
            _compute(p, b, warpgroup, my_tiles, out, lse, bool(interpret))

        @pl.when(warpgroup == WARPGROUPS)
        def _():
            plgpu.set_max_registers(registers[1], action="decrease")
            _fetch(p, b, my_tiles, q, k, v, tails, table, per_row)

    rows_out = num_tiles * WARPGROUPS * rows
    kernel = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((rows_out, p.G, p.D), p.dtype), jax.ShapeDtypeStruct((p.G, rows_out), jnp.float32)),
        scratch_types=scratch,
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True, reduction_scratch_bytes=0),
        interpret=interpreter() if interpret is True else interpret,
        kernel_name="paged_prefill",
    )

    def call(*arguments):
        out, lse = kernel(*arguments)
        return out, lse.T

    return call


def _my_tiles(p: _Problem, ctas: int, work: Any, num_used: Any, visit: Any) -> Any:
    """visit(tile, number of blocks so far) for each item of this CTA. Returns the number of its blocks.

    Items are dealt out longest first and to and fro, so that no CTA gets the longer one every time. Neighbours have one tile
    and different heads, so the tiles at work at a time are few, and read the same keys at about the same time."""
    cta = lax.axis_index("cta")
    total = num_used[0] * p.G
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


def _fetch(
    p: _Problem, b: _Buffers, my_tiles: Any, q: Any, k: Any, v: Any, tails: Any, table: Any, per_row: Any
) -> None:
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
                return tuple(table[row, at * len(pieces) + piece] for piece in pieces)
            blocks = jnp.int32(p.page_size // p.block)  # a page
            return (table[row, lax.div(at, blocks)] * blocks + lax.rem(at, blocks),)

        def copy(tokens, found, buffer, slot, full):
            for piece in pieces:
                # The compiler must see a multiple of 8, so the factor stands here.
                source = tokens.at[pl.ds(found[piece] * p.piece, p.piece), tile.g]
                plgpu.copy_gmem_to_smem(source, buffer.at[slot, pl.ds(piece * p.piece, p.piece)], full)

        def copy_end(slot, full):
            """Values of a block that the sequence ends in. What lies past the end may be NaN, and a probability of 0 does not help
            against that: the part with the end in it, and those behind, come from `tails`."""

            @pl.loop(0, p.block // TAIL)
            def _(x):
                here, tail = b.v.at[slot, pl.ds(x * TAIL, TAIL)], (tile.high - 1) * (p.block // TAIL) + x
                token = tail * TAIL

                @pl.when(token + TAIL <= kv_len)
                def _():
                    tails_a_page = jnp.int32(p.page_size // TAIL)
                    at = table[row, lax.div(tail, tails_a_page)] * tails_a_page + lax.rem(tail, tails_a_page)
                    plgpu.copy_gmem_to_smem(v.at[pl.ds(at * TAIL, TAIL), tile.g], here, full)

                @pl.when(token + TAIL > kv_len)
                def _():
                    tail_row = jnp.where(token < kv_len, row, tails.shape[0] // TAIL - 1)
                    plgpu.copy_gmem_to_smem(tails.at[pl.ds(tail_row * TAIL, TAIL), tile.g], here, full)

        def fetch_block(i, found):
            slot = lax.rem(steps + i, stages)

            def wait_for(free):
                @pl.when(steps + i >= p.stages)
                def _():
                    plgpu.barrier_wait(free.at[slot])

            wait_for(b.k_free)
            copy(k, found, b.k, slot, b.k_full.at[slot])

            @pl.when(i == 0)  # the keys first: their buffer is free before the last tile's queries are
            def _():
                @pl.when(deal > 0)
                def _():
                    plgpu.barrier_wait(b.q_free)

                for w in range(WARPGROUPS):
                    plgpu.copy_gmem_to_smem(q.at[pl.ds(tile.get(QUERIES) * GRANULE + w * rows, rows), tile.g], b.q.at[w], b.q_full)
                for x in range(p.sinks + p.alibi):
                    plgpu.copy_gmem_to_smem(per_row.at[x, tile.g], b.per_row.at[x], b.q_full)

            ahead = places(i + 1)  # read a block ahead and before a wait, so that nobody waits for it
            wait_for(b.v_free)
            has_end = (i == 0) & (tile.high * p.block > kv_len)
            full = b.v_full.at[slot]

            @pl.when(has_end)
            def _():
                copy_end(slot, full)

            @pl.when(jnp.logical_not(has_end))
            def _():
                copy(v, found, b.v, slot, full)
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


def _compute(p: _Problem, b: _Buffers, w: Any, my_tiles: Any, out: Any, lse: Any, interpret: bool) -> None:
    """A compute warpgroup: 64 rows of each tile."""
    rows = b.q.shape[1]
    stages = jnp.int32(p.stages)
    shape = (rows, p.block)
    across = lambda x, shape: lax.broadcast_in_dim(x, shape, [0])  # [64] -> [64, ...]
    # The softmax works in base 2: exp2 is one instruction. Where nothing comes between the scores and it, scale is a factor of
    # the multiply-add that subtracts the maximum; that needs a scale that keeps the order and does not let MASKED overflow.
    factor = p.scale * LOG2E
    is_plain = p.soft_cap is None and not p.alibi and 1e-6 < factor < 1e6
    to_base_2 = jnp.float32(factor if is_plain else 1.0)

    def take_turn():
        plgpu.barrier_wait(b.turn.at[w])

    def pass_turn():
        plgpu.barrier_arrive(b.turn.at[1 - w])

    @pl.when(w == 1)
    def _():
        pass_turn()  # the first warpgroup begins

    def compute_tile(tile, deal, steps):
        row = lax.broadcasted_iota(jnp.int32, (rows,), 0) + w * rows
        position = jnp.minimum(tile.first + lax.div(row, jnp.int32(p.n)), tile.last)  # rows beyond the last: padding

        def slot_of(i):
            return lax.rem(steps + i, stages)

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
                key, here = lax.broadcasted_iota(jnp.int32, shape, 1), across(position - first_key, shape)
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

            s = pl.run_scoped(first_scores, plgpu.ACC(shape, jnp.float32))
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

                acc, s = pl.run_state(products)((plgpu.ACC.init(acc), plgpu.ACC.init(jnp.zeros(shape, jnp.float32))))
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

            acc = pl.run_state(last_product)(plgpu.ACC.init(acc))
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

    @pl.when(w == 0)
    def _():
        take_turn()  # the one that nobody needed
