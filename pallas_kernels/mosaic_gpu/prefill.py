"""Attention of chunks on Hopper: what surrounds the kernel of prefill_kernel.py, in plain jnp.

Queries are packed into tiles, a list of work is made of them, and the outputs are put back where the tokens are. All but the
moving of data depends on the step alone and is alike for every layer, so that XLA does it once.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.mosaic_gpu.prefill_kernel import GRANULE, LOG2E, TAIL, WARPGROUPS, Inputs, Problem, run
from pallas_kernels.mosaic_gpu.tuning import PrefillConfig


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
    T, H, _ = q.shape
    problem = _problem(q, k_pages, scale, window, soft_cap, sinks, alibi, config)
    plan = _plan(problem, T, page_table.shape[0], config.block_q, kv_lens, query_start, counts)
    per_row = [_per_row(x, problem, config.block_q) for x in (sinks, alibi) if x is not None]
    inputs = Inputs(
        q=_packed_queries(q, problem, plan),
        k=_by_token(k_pages),
        v=_by_token(v_pages),
        tails=_tails(v_pages, page_table, kv_lens),
        page_table=_whole_blocks(page_table, problem),
        work=plan.work,
        num_used=plan.num_used,
        per_row=jnp.stack(per_row) if per_row else None,
    )
    out, lse = run(problem, config, inputs, interpret)
    return _unpacked(out, plan, H), _unpacked(lse.T, plan, H)


def _problem(
    q: Array,
    k_pages: Array,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Array | None,
    alibi: Array | None,
    config: PrefillConfig,
) -> Problem:
    (_, H, D), (_, K, G, _), block = q.shape, k_pages.shape, config.block_kv
    if jnp.dtype(k_pages.dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)) or q.dtype != k_pages.dtype:
        raise NotImplementedError(
            "mosaic_gpu's prefill needs queries and a cache of one dtype, bfloat16 or float16, not "
            f"{q.dtype} and {k_pages.dtype}; triton has others"
        )
    if D not in (64, 128, 192, 256) or H // G > config.block_q:
        raise NotImplementedError(
            f"mosaic_gpu's prefill has head dims 64, 128, 192 and 256 and up to {config.block_q} query heads a group, "
            f"not {D} and {H // G}; triton has others"
        )
    if K % TAIL or (block % K and K % block):
        raise NotImplementedError(
            f"mosaic_gpu's prefill needs pages of a multiple of {TAIL} tokens that divide {block} or are a multiple of it, "
            f"not of {K}; triton has others"
        )
    n = H // G
    per_tile = WARPGROUPS * config.block_q // n
    return Problem(G, D, n, per_tile, _round_up(per_tile * n, GRANULE), block, min(K, block), K, config.stages,
                    scale, window, soft_cap, sinks is not None, alibi is not None, q.dtype)  # fmt: skip


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to


class _Plan(NamedTuple):
    """work and num_used: see `Inputs`. packed: the query and the head in its group of each row of the packed queries, int32
    [A * 8]. places: int32 [T, n]: where among the tiles' rows the kernel puts a token's heads; is_ours: [T]."""

    work: Array
    num_used: Array
    packed: tuple[Array, Array]
    places: Array
    is_ours: Array


def _plan(p: Problem, T: int, R: int, block_q: int, kv_lens: Array, query_start: Array, counts: Array) -> _Plan:
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


def _packed_queries(q: Array, p: Problem, plan: _Plan) -> Array:
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
    """See `Inputs`. This way no warpgroup has to write to shared memory, where addresses take registers that nobody has."""
    K = v_pages.shape[1]
    at = jnp.maximum(kv_lens - 1, 0) // TAIL * TAIL
    page = jnp.take_along_axis(page_table, (at // K)[:, None], axis=1, mode="clip")[:, 0]
    tails = v_pages.reshape(-1, TAIL, *v_pages.shape[2:])[page * (K // TAIL) + at % K // TAIL]
    is_past = at[:, None] + jnp.arange(TAIL, dtype=jnp.int32)[None] >= kv_lens[:, None]
    tails = jnp.where(is_past[..., None, None], jnp.zeros((), tails.dtype), tails)
    return _by_token(jnp.pad(tails, ((0, 1), (0, 0), (0, 0), (0, 0))))


def _whole_blocks(page_table: Array, p: Problem) -> Array:
    """Wide enough for the last block of the longest sequence, which may be longer than the table is."""
    return jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % (p.block // p.piece))))


def _per_row(x: Array, p: Problem, block_q: int) -> Array:
    """A number a head -> float32 [G, 128]: that of each row of a tile, in base 2."""
    head = jnp.arange(WARPGROUPS * block_q) % p.n
    return (x.astype(jnp.float32) * LOG2E).reshape(p.G, p.n)[:, head]
