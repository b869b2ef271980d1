"""Ragged paged attention in plain jnp, fast enough to carry the engine on CPU.

Work is proportional to what the sequences hold, not to the width of the page table: loops with trip counts known only at
run time, over groups of decode rows and over tiles of each chunk's queries, and inside both the same walk over blocks of
keys with an online softmax. A block is gathered from its pages just before it is used, so that it is still in the cache
of the CPU: on 32 sequences of 256 tokens this takes a quarter of the time of gathering each whole sequence first.

A group is as slow as its longest row: decode rows are walked in the order of their lengths, so that those of a group are
alike.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Float32, Int32, Num

BLOCK = 128  # keys a step of the walk
DECODE_ROWS = 4  # decode rows walked together: their trip count is the longest one's
TILE = 32  # queries of a chunk walked together: 64 is a little faster for long chunks, and half idle for short ones
MASKED = -1e30  # finite: exp(MASKED - MASKED) must not be NaN

Walk = Callable[[Array, Array, Array], tuple[Array, Array]]
"""Queries [N, Q, H, D], their positions [N, Q] (-1: no query), their rows [N] -> out [N, Q, H, D], lse [N, Q, H]."""


# A jit of its own: a step calls this once a layer, and tracing it thirty times is most of the time a warm start takes.
@partial(jax.jit, static_argnames=("scale", "window", "chunk", "soft_cap"))
def paged_attention(
    q: Float[Array, "T H D"],
    k_pages: Num[Array, "P K G D"],
    v_pages: Num[Array, "P K G D"],
    page_table: Int32[Array, "R M"],
    kv_lens: Int32[Array, " R"],
    query_start: Int32[Array, " R+1"],
    counts: Int32[Array, " 2"],
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    alibi: Float[Array, " H"] | None = None,
    k_scales: Float32[Array, "P K G"] | None = None,
    v_scales: Float32[Array, "P K G"] | None = None,
) -> tuple[Float[Array, "T H D"], Float32[Array, "T H"]]:
    """See `pallas_kernels.ops.paged_attention`."""
    T = q.shape[0]
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % _pages_a_block(k_pages.shape[1]))))
    keys, values = _reader(k_pages, k_scales), _reader(v_pages, v_scales)
    page_size = k_pages.shape[1]

    first_seen = None if window is None and chunk is None else partial(_first_seen, window=window, chunk=chunk)

    def walk(queries: Array, positions: Array, rows: Array) -> tuple[Array, Array]:
        pages = page_table.at[rows].get(mode="clip")
        return _walk(queries, positions, pages, keys, values, page_size, scale, first_seen, soft_cap, sinks, alibi)

    out, lse = _decodes(q, kv_lens, counts, walk)
    if T == 1:  # a chunk has at least two tokens
        return out, lse
    chunk_out, chunk_lse = _chunks(q, kv_lens, query_start, counts, walk)
    is_decode = jnp.arange(T)[:, None] < counts[0]
    return jnp.where(is_decode[..., None], out, chunk_out), jnp.where(is_decode, lse, chunk_lse)


def _first_seen(positions: Array, window: int | None, chunk: int | None) -> Array:
    """The first place that each position sees; it never falls as positions rise. -1, of no query, gives anything."""
    first = jnp.zeros_like(positions) if window is None else jnp.maximum(positions - window + 1, 0)
    return first if chunk is None else jnp.maximum(first, positions // chunk * chunk)


def _decodes(q: Array, kv_lens: Array, counts: Array, walk: Walk) -> tuple[Array, Array]:
    """Rows of one query; row r's query is token r. Other tokens get 0."""
    (T, H, D), R = q.shape, kv_lens.shape[0]
    group = min(DECODE_ROWS, R)
    lengths = jnp.where(jnp.arange(R) < counts[0], kv_lens, 0)
    order = jnp.pad(jnp.argsort(-lengths), (0, -R % group), constant_values=R)  # R: nobody

    def one_group(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        rows = lax.dynamic_slice_in_dim(order, i * group, group)
        queries = q.at[rows].get(mode="clip")[:, None]  # [group, 1, H, D]
        positions = lengths.at[rows].get(mode="fill", fill_value=0)[:, None] - 1
        out, lse = walk(queries, positions, rows)
        return _put(carry, i * group, out[:, 0], lse[:, 0])

    n = order.shape[0]
    carry = jnp.zeros((n, H, D), q.dtype), jnp.zeros((n, H), jnp.float32)
    out, lse = lax.fori_loop(0, (counts[0] + group - 1) // group, one_group, carry)
    put = lambda whole, sorted_: whole.at[order].set(sorted_, mode="drop")
    return put(jnp.zeros_like(q), out), put(jnp.zeros((T, H), jnp.float32), lse)


def _chunks(q: Array, kv_lens: Array, query_start: Array, counts: Array, walk: Walk) -> tuple[Array, Array]:
    """Rows of more than one query, row by row, a tile of queries at a time. Other tokens get values of no meaning."""
    T, H, _ = q.shape
    tile = min(TILE, T)
    q = jnp.pad(q, ((0, tile), (0, 0), (0, 0)))  # room for the last tile, so that no slice is moved back by clamping

    def chunk_row(row: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        start, stop = query_start[row], query_start[row + 1]
        shift = kv_lens[row] - stop  # position of a token = its place in the batch + shift

        def chunk_tile(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            first = start + i * tile
            queries = lax.dynamic_slice_in_dim(q, first, tile, 0)[None]  # [1, tile, H, D]
            # Queries past the row's end are recomputed by the next row, which comes later; here they must be finite.
            positions = jnp.minimum(first + jnp.arange(tile), stop - 1)[None] + shift
            out, lse = walk(queries, positions, row[None])
            return _put(carry, first, out[0], lse[0])

        return lax.fori_loop(0, (stop - start + tile - 1) // tile, chunk_tile, carry)

    carry = jnp.zeros_like(q), jnp.zeros((T + tile, H), jnp.float32)
    out, lse = lax.fori_loop(counts[0], counts[1], chunk_row, carry)
    return out[:T], lse[:T]


def _pages_a_block(page_size: int) -> int:
    return max(1, BLOCK // page_size)


def _reader(pages: Array, scales: Array | None) -> Callable[[Array], Array]:
    """Places [N, n] in the cache, taken as [P * K, G, D] -> the float32 numbers there, [N, n, G, D]."""
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    read = lambda x, places: flat(x).at[places].get(mode="promise_in_bounds").astype(jnp.float32)
    if scales is None:
        return lambda places: read(pages, places)
    return lambda places: read(pages, places) * read(scales, places)[..., None]


def _put(carry: tuple[Array, Array], first: Array, out: Array, lse: Array) -> tuple[Array, Array]:
    outs, lses = carry
    outs = lax.dynamic_update_slice_in_dim(outs, out.astype(outs.dtype), first, 0)
    return outs, lax.dynamic_update_slice_in_dim(lses, lse, first, 0)


def _walk(
    queries: Float[Array, "N Q H D"],
    positions: Int32[Array, "N Q"],
    pages: Int32[Array, "N M"],
    keys: Callable[[Array], Array],
    values: Callable[[Array], Array],
    K: int,
    scale: float,
    first_seen: Callable[[Array], Array] | None,
    soft_cap: float | None,
    sinks: Array | None,
    alibi: Array | None,
) -> tuple[Array, Array]:
    """Attention of N rows with Q queries each. queries [N, Q, H, D], positions [N, Q] (-1: an unused row), pages
    [N, M] of K tokens; first_seen: of positions, None: they see all before them. Returns out [N, Q, H, D] and lse [N, Q, H]."""
    N, Q, H, D = queries.shape
    G = jax.eval_shape(keys, pages).shape[-2]
    per_block = _pages_a_block(K)
    size = per_block * K
    per_head = lambda x: jnp.tile(x.astype(jnp.float32).reshape(1, G, 1, H // G), (1, 1, Q, 1)).reshape(1, G, -1)
    # The queries of one kv head together: [N, G, Q * H/G, D], so that each block is one matrix product a head.
    x = queries.reshape(N, Q, G, H // G, D).transpose(0, 2, 1, 3, 4).reshape(N, G, -1, D).astype(jnp.float32) * scale
    last = jnp.repeat(positions, H // G, axis=1)[:, None]  # [N, 1, Q * H/G]
    first_block = 0 if first_seen is None else jnp.maximum(first_seen(jnp.min(positions)), 0) // size
    num_blocks = jnp.max(positions) // size + 1
    longest = jnp.max(positions, axis=1)[:, None]
    oldest = jnp.zeros_like(longest) if first_seen is None else first_seen(jnp.min(positions, axis=1)[:, None])

    def block(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        m, l, acc = carry
        ids = lax.dynamic_slice_in_dim(pages, i * per_block, per_block, 1)
        at_tokens = (ids[:, :, None] * K + jnp.arange(K)[None, None]).reshape(N, size)  # by token, not by page: a tenth faster
        k, v = keys(at_tokens), values(at_tokens)  # [N, size, G, D]
        at = i * size + jnp.arange(size)
        # What no query of a row sees may be anything, also NaN that a failed request has left: 0 * NaN is NaN.
        v = jnp.where(((at[None] >= oldest) & (at[None] <= longest))[..., None, None], v, 0.0)
        s = jnp.einsum("ngqd,ntgd->ngqt", x, k)
        if soft_cap is not None:
            s = soft_cap * jnp.tanh(s / soft_cap)
        if alibi is not None:
            s += per_head(alibi)[..., None] * (at[None, None, None] - last[..., None]).astype(jnp.float32)
        seen = at[None, None, None] <= last[..., None]
        if first_seen is not None:
            seen &= at[None, None, None] >= first_seen(last)[..., None]
        s = jnp.where(seen, s, MASKED)
        m_new = jnp.maximum(m, s.max(-1))
        shrink = jnp.exp(m - m_new)
        p = jnp.where(seen, jnp.exp(s - m_new[..., None]), 0.0)
        acc = acc * shrink[..., None] + jnp.einsum("ngqt,ntgd->ngqd", p, v)
        return m_new, l * shrink + p.sum(-1), acc

    rows = (N, G, x.shape[2])
    start = jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros((*rows, D))
    m, l, acc = lax.fori_loop(first_block, num_blocks, block, start)
    if sinks is not None:
        sink = per_head(sinks)
        m_new = jnp.maximum(m, sink)
        shrink = jnp.exp(m - m_new)
        m, l, acc = m_new, l * shrink + jnp.exp(sink - m_new), acc * shrink[..., None]
    l = jnp.maximum(l, jnp.finfo(jnp.float32).tiny)  # unused rows: 0 / tiny, not 0 / 0
    out, lse = acc / l[..., None], m + jnp.log(l)
    out = out.reshape(N, G, Q, H // G, D).transpose(0, 2, 1, 3, 4).reshape(N, Q, H, D)
    return out, lse.reshape(N, G, Q, H // G).transpose(0, 2, 1, 3).reshape(N, Q, H)
