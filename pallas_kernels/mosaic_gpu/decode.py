"""Attention of rows with one query each, for Hopper: split over the keys, TMA into a ring, wgmma, partial results in float32.

A row's keys are cut into splits of a fixed number of tokens, at multiples of it, so that what a row gets does not depend on
which rows it is batched with. Every (row, split, kv head) is an item of work; as many CTAs as there are SMs walk over the
list of items. A second kernel adds up a row's partial results and rounds once. Rows of one split go through it too: it has
to be launched in any case, it is the one that knows the output's layout and writes the zeros of unused rows, and 4 bytes a
number instead of 2 on the way are little beside the keys and values that were read (3 % with a group of 8 and 128 tokens).

What a CTA looks like: one or two pairs of warpgroups, each pair with items of its own. A pair's producer reads page ids and
has the TMA unit fetch a tile of keys and of values at a time into a ring of stages, and runs ahead over the borders of items,
so that the memory is busy while the consumer finishes one. The consumer multiplies with wgmma; the heads of a group are
padded to its 64 rows. That wastes tensor cores, of which there is plenty, as memory is what decode waits for: a tile of 64
tokens of 128 dims, 32 KB, takes an SM's share of 4.3 TB/s 1.0 us and a consumer about 0.7 us (counted, not measured: 256
cycles a product, 480 of softmax, latencies). That alone is too close, with the end of each item on top: hence two pairs, of
which each has twice the time, where shared memory allows. With wider heads it does not, but there products are more of the
work and latencies less. One CTA an SM either way: the accumulators leave no registers for a second.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.mosaic_gpu.interpret import interpreter
from pallas_kernels.mosaic_gpu.tuning import OUT_COLUMNS, DecodeConfig, check_shared_memory, decode_shared_memory
from pallas_kernels.mosaic_gpu.tuning import M as ROWS

MASKED = -1e30  # finite: exp(MASKED - MASKED) must not be NaN
MAX_SPLITS = 32  # of a row: bounds the memory for partial results, [R, 32, G, padded heads, D] float32
CTAS_AT_ONCE = 16 * 132  # of one warpgroup: what SMs hold
_LOG2E = math.log2(math.e)
_PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
_TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # of 16-bit numbers, as wgmma and TMA want them
_TILED_F32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))


class _Splits(NamedTuple):
    """How rows are cut. size: tokens a split. most: splits a row can have."""

    size: int
    most: int
    window: int | None

    def first(self, kv_len: Any) -> Any:
        """The first token a row's query sees."""
        return 0 * kv_len if self.window is None else jnp.maximum(kv_len - self.window, 0)

    def count(self, kv_len: Any) -> Any:
        """How many splits a row of kv_len tokens has; 0 for an empty one."""
        last = lax.div(kv_len + (self.size - 1), jnp.int32(self.size))
        return last - lax.div(self.first(kv_len), jnp.int32(self.size))


def decode(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    kv_lens: Array,
    num_decode: Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    alibi: Array | None = None,
    config: DecodeConfig,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """The equation of `pallas_kernels.ops.paged_attention` for rows of one query, the last token of the row.

    Args:
      q: [R, H, D], bfloat16 or float16, like k_pages and v_pages [P, K, G, D].
      page_table: int32 [R, M]. kv_lens: int32 [R]. num_decode: int32 []: rows from there on are unused.
      interpret: in JAX's interpreter, which simulates warpgroups and barriers but not the tensor cores.
    Returns: out [R, H, D] in q's dtype and lse float32 [R, H]; 0 in unused rows (those of kv_len 0 too).
    Raises: NotImplementedError for shapes and dtypes that this kernel cannot take.
    """
    (R, H, D), (_, page_size, G, _), pages = q.shape, k_pages.shape, page_table.shape[1]
    check(q, k_pages, page_size, config)
    if not R:
        return q, jnp.zeros((R, H), jnp.float32)
    group = H // G
    padded = -(-group // 8) * 8  # TMA moves tiles of 8 rows
    splits = _cut(config, pages * page_size, window)
    used_lens = jnp.where(jnp.arange(R, dtype=jnp.int32) < num_decode, kv_lens, 0)
    places, num_units = _work_list(splits, used_lens)
    grouped = jnp.pad(q.reshape(R, G, group, D), ((0, 0), (0, 0), (0, padded - group), (0, 0)))
    slopes = jnp.zeros((H,), jnp.float32) if alibi is None else alibi.astype(jnp.float32) * _LOG2E
    slopes = jnp.pad(slopes.reshape(G, group), ((0, 0), (0, ROWS - group)))

    kernel = _walk_kernel(config, splits, grouped.shape, page_size, q.dtype, scale, soft_cap, alibi is not None, interpret)
    partial_out, partial_lse = kernel(grouped, k_pages, v_pages, page_table, used_lens, places, num_units, slopes)

    per_vector = 1 if D % 128 == 0 else 2  # heads that are merged in one vector: it must fill 128 lanes
    heads = -(-group // per_vector) * per_vector
    merge = _merge_kernel(splits, R, G, heads, D, per_vector, q.dtype, sinks is not None, interpret)
    sink = jnp.zeros((H,), jnp.float32) if sinks is None else sinks.astype(jnp.float32)
    sink = jnp.pad(sink.reshape(G, group), ((0, 0), (0, heads - group)))
    vectors = partial_out.reshape(R * splits.most, G, padded // per_vector, per_vector * D)
    out, lse = merge(vectors, partial_lse, used_lens, sink)
    return out.reshape(R, G, heads, D)[:, :, :group].reshape(R, H, D), lse[:, :, :group].reshape(R, H)


def check(q: Array, k_pages: Array, page_size: int, config: DecodeConfig) -> None:
    """Raises NotImplementedError for what `decode` cannot take."""
    (_, H, D), G, tile = q.shape, k_pages.shape[2], config.tile
    limits = {
        f"q and pages in bfloat16 or float16, the same; not {q.dtype} and {k_pages.dtype}": q.dtype == k_pages.dtype
        and q.dtype in (jnp.bfloat16, jnp.float16),
        f"a head dim of 64, 128, 192 or 256, not {D}": D in (64, 128, 192, 256),
        f"at most 64 query heads a key/value head, not {H // G}": H // G <= 64,
        f"pages of a multiple of 8 tokens that divide the tile of {tile} or are a multiple of it, not {page_size}": not (
            page_size % 8 or (page_size % tile and tile % page_size)
        ),
    }
    broken = [limit for limit, holds in limits.items() if not holds]
    if broken:
        raise NotImplementedError(f"mosaic_gpu's decode kernel needs {'; '.join(broken)}. triton can")
    check_shared_memory("decode", decode_shared_memory(config, D))


# -- the list of work ------------------------------------------------------------------------------------------------------


def _cut(config: DecodeConfig, longest: int, window: int | None) -> _Splits:
    """The configured split, doubled until a sequence of `longest` tokens has at most MAX_SPLITS. It depends on the width of
    the page table only: a row gets the same in a small and in a large batch."""
    size = config.split_size
    while True:
        most = max(1, -(-longest // size))
        if window is not None:  # `window` tokens lie in one split more than they would fill, at most
            most = min(most, (window + size - 2) // size + 1)
        if most <= MAX_SPLITS:
            return _Splits(size, most, window)
        size *= 2


def _work_list(splits: _Splits, kv_lens: Array) -> tuple[Array, Array]:
    """places [R * most]: row * most + split (counted from the row's first) of every split there is, then zeros; and their
    number [1]. Small integer work that XLA does once a step, as all layers of one window have the same."""
    R = kv_lens.shape[0]
    counts = splits.count(kv_lens)
    ends = jnp.cumsum(counts)
    i = jnp.arange(R * splits.most, dtype=jnp.int32)
    rows = jnp.searchsorted(ends, i, side="right", method="scan_unrolled").astype(jnp.int32)
    places = rows * splits.most + i - (ends - counts).at[rows].get(mode="clip")
    return jnp.where(i < ends[-1], places, 0), ends[-1:]


# -- the walk over the keys --------------------------------------------------------------------------------------------------


class _Item(NamedTuple):
    """Tokens [start, stop) of a row, in tiles [first, last)."""

    row: Array
    start: Array
    stop: Array
    first: Array
    last: Array
    final_page: Array


def _walk_kernel(
    config: DecodeConfig,
    splits: _Splits,
    q_shape: tuple[int, ...],
    page_size: int,
    dtype: Any,
    scale: float,
    soft_cap: float | None,
    has_alibi: bool,
    interpret: bool,
) -> Any:
    """(q [R, G, padded, D], k, v, page_table, kv_lens, places, number of them, slopes [G, 64]) ->
    (out float32 [R * most, G, padded, D], lse in base 2 [R * most, G, padded]), at the places of the list only."""
    (R, G, padded, D), tile, stages, pairs = q_shape, config.tile, config.stages, config.pairs
    pages_a_tile, tiles_a_page = max(1, tile // page_size), max(1, page_size // tile)
    num_ctas = min(config.num_ctas, R * splits.most * G)  # more could never have anything to do
    div, rem = (lambda x, n: lax.div(x, jnp.int32(n))), (lambda x, n: lax.rem(x, jnp.int32(n)))

    def body(q_ref, k_ref, v_ref, table_ref, len_ref, place_ref, number_ref, slope_ref, out_ref, lse_ref,
             q_smem, slope_smem, k_smem, v_smem, out_smem, lse_smem, q_full, k_full, v_full, k_free, v_free):  # fmt: skip
        thread = lax.axis_index("warpgroup")
        pair = rem(thread, pairs)
        worker = pair * num_ctas + lax.axis_index("cta")  # the first items go to different SMs
        stride = pairs * num_ctas
        number = number_ref[0] * G
        trips = lax.div(jnp.maximum(number - worker + (stride - 1), 0), jnp.int32(stride))
        # Heads of one split lie side by side in the list: they read the same pages, at the same time.
        item_of = lambda i: worker + i * stride
        place_of = lambda i: place_ref[div(jnp.minimum(item_of(i), R * splits.most * G - 1), G)]
        stage_of = lambda step: pair * stages + rem(step, stages)

        def locate(place: Array) -> _Item:
            row = div(place, splits.most)
            kv_len = len_ref[row]
            seen = splits.first(kv_len)
            split = div(seen, splits.size) + rem(place, splits.most)
            start = jnp.maximum(split * splits.size, seen)
            stop = jnp.minimum((split + 1) * splits.size, kv_len)
            return _Item(row, start, stop, div(start, tile), div(stop + (tile - 1), tile), div(kv_len - 1, page_size))

        @pl.when(thread >= pairs)
        def producer():
            if pairs == 2:
                plgpu.set_max_registers(40, action="decrease")

            def page_ids(item: _Item, t: Array) -> tuple[Array, ...]:
                """Of tile t. Past the row's last page that one again: it is in the cache already."""
                first = div(t, tiles_a_page) * pages_a_tile
                return tuple(table_ref[item.row, jnp.minimum(first + p, item.final_page)] for p in range(pages_a_tile))

            def produce(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                step, place = carry
                head = rem(item_of(i), G)
                item = locate(place)
                # Loads of what comes next are under way while this waits for a stage.
                next_place = place_of(i + 1)

                def fetch(t: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
                    step, *ids = carry
                    next_ids = page_ids(item, t + 1)
                    stage = stage_of(step)
                    size = min(tile, page_size)
                    offset = rem(t, tiles_a_page) * tile if tiles_a_page > 1 else 0
                    for pages, smem, full, free in ((k_ref, k_smem, k_full, k_free), (v_ref, v_smem, v_full, v_free)):
                        pl.when(step >= stages)(lambda free=free: plgpu.barrier_wait(free.at[stage]))
                        for p, page in enumerate(ids):
                            plgpu.copy_gmem_to_smem(pages.at[page, pl.ds(offset, size), head],
                                                    smem.at[stage, pl.ds(p * size, size)], full.at[stage])  # fmt: skip
                    return step + 1, *next_ids

                step, *_ = lax.fori_loop(item.first, item.last, fetch, (step, *page_ids(item, item.first)))
                return step, next_place

            steps, _ = lax.fori_loop(0, trips, produce, (jnp.int32(0), place_of(0)))

            # The last arrivals too must be waited for: a barrier may not end with one that nobody saw.
            def drain(step: Array, _: Any) -> None:
                plgpu.barrier_wait(k_free.at[stage_of(step)])
                plgpu.barrier_wait(v_free.at[stage_of(step)])

            lax.fori_loop(jnp.maximum(steps - stages, 0), steps, drain, None)

        @pl.when(thread < pairs)
        def consumer():
            if pairs == 2:
                plgpu.set_max_registers(216, action="increase")
            q_here, out_here, lse_here = q_smem.at[pair], out_smem.at[pair], lse_smem.at[pair]
            columns = lambda x, like: lax.broadcast_in_dim(x, like.shape, [0])  # a number a row, over all columns

            def fetch_q(i: Array, place: Array) -> None:
                head = rem(item_of(i), G)
                q = q_ref.at[div(place, splits.most), head]
                plgpu.copy_gmem_to_smem(q, q_here.at[pl.ds(0, padded)], q_full.at[pair])
                if has_alibi:
                    plgpu.copy_gmem_to_smem(slope_ref.at[head], slope_smem.at[pair], q_full.at[pair])

            def consume(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                step, place = carry
                head = rem(item_of(i), G)
                item = locate(place)
                next_place = place_of(i + 1)
                plgpu.barrier_wait(q_full.at[pair])
                slope = slope_smem[pair] if has_alibi else None

                def attend(t: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
                    step, m, l, acc = carry
                    stage = stage_of(step)
                    plgpu.barrier_wait(k_full.at[stage])
                    s = _scores(q_here, k_smem.at[stage], interpret)  # [64, tile]
                    plgpu.barrier_arrive(k_free.at[stage])
                    s = _capped(s, scale, soft_cap)
                    at = lax.broadcasted_iota(jnp.int32, s.shape, 1) + t * tile
                    if slope is not None:
                        s += columns(slope, s) * (at - (len_ref[item.row] - 1)).astype(jnp.float32)
                    s = jnp.where((at >= item.start) & (at < item.stop), s, MASKED)
                    m_new = jnp.maximum(m, jnp.max(s, axis=1))
                    shrink = jnp.exp2(m - m_new)
                    p = jnp.exp2(s - columns(m_new, s))
                    l = l * shrink + jnp.sum(p, axis=1)
                    acc = acc * columns(shrink, acc)
                    plgpu.barrier_wait(v_full.at[stage])

                    # 0 * NaN is NaN: what lies before or after the item's tokens may be anything.
                    @pl.when((t * tile < item.start) | (t * tile + tile > item.stop))
                    def clear():
                        for c in range(0, D, 64):  # a piece at a time: there are no registers for all of it
                            v = v_smem[stage, :, pl.ds(c, 64)]
                            token = lax.broadcasted_iota(jnp.int32, v.shape, 0) + t * tile
                            seen = (token >= item.start) & (token < item.stop)
                            v_smem[stage, :, pl.ds(c, 64)] = jnp.where(seen, v, jnp.zeros_like(v))
                        plgpu.commit_smem()

                    acc = _add_product(acc, p.astype(dtype), v_smem.at[stage], interpret)
                    plgpu.barrier_arrive(v_free.at[stage])
                    return step + 1, m_new, l, acc

                start = (
                    jnp.full((ROWS,), MASKED, jnp.float32),
                    jnp.zeros((ROWS,), jnp.float32),
                    jnp.zeros((ROWS, D), jnp.float32),
                )
                step, m, l, acc = lax.fori_loop(item.first, item.last, attend, (step, *start))
                acc *= columns(1.0 / l, acc)
                lse_here[...] = m + jnp.log(l) * _LOG2E
                for c in range(0, D, OUT_COLUMNS):
                    out_here[...] = lax.slice(acc, (0, c), (ROWS, c + OUT_COLUMNS))
                    plgpu.commit_smem()
                    if c == 0:
                        # All warps are past the last read of q: the next item's may come while this one's results leave.
                        pl.when(i + 1 < trips)(lambda: fetch_q(i + 1, next_place))
                        plgpu.copy_smem_to_gmem(lse_here.at[pl.ds(0, padded)], lse_ref.at[place, head])
                    plgpu.copy_smem_to_gmem(out_here.at[pl.ds(0, padded)], out_ref.at[place, head, :, pl.ds(c, OUT_COLUMNS)])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                return step, next_place

            place = place_of(0)
            pl.when(trips > 0)(lambda: fetch_q(jnp.int32(0), place))
            lax.fori_loop(0, trips, consume, (jnp.int32(0), place))
            plgpu.wait_smem_to_gmem(0)

    ring = plgpu.SMEM((pairs * stages, tile, D), dtype, transforms=_TILED)
    numbers = plgpu.SMEM((pairs, ROWS), jnp.float32)
    full = plgpu.Barrier(num_arrivals=pages_a_tile, num_barriers=pairs * stages)
    free = plgpu.Barrier(num_barriers=pairs * stages)
    q_full = plgpu.Barrier(num_arrivals=1 + has_alibi, num_barriers=pairs)
    return plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((R * splits.most, G, padded, D), jnp.float32),
                  jax.ShapeDtypeStruct((R * splits.most, G, padded), jnp.float32)),
        scratch_types=[plgpu.SMEM((pairs, ROWS, D), dtype, transforms=_TILED), numbers, ring, ring,
                       plgpu.SMEM((pairs, ROWS, OUT_COLUMNS), jnp.float32, transforms=_TILED_F32), numbers,
                       q_full, full, full, free, free],
        grid=(num_ctas,), grid_names=("cta",), num_threads=2 * pairs, thread_name="warpgroup",
        compiler_params=_PARAMS, interpret=interpreter() if interpret else False, kernel_name="paged_decode",
    )  # fmt: skip


def _capped(s: Array, scale: float, soft_cap: float | None) -> Array:
    """Products -> scores times log2(e): powers of 2 are what the hardware has."""
    if soft_cap is None:
        return s * (scale * _LOG2E)
    # tanh(x) = 1 - 2 / (1 + e^2x). The hardware's own tanh is good to 2^-11: with a cap of 50 that is 2 % of a probability.
    return (soft_cap * _LOG2E) * (1.0 - 2.0 / (1.0 + jnp.exp2(s * (2 * scale / soft_cap * _LOG2E))))


def _scores(q: Any, k: Any, interpret: bool) -> Array:
    """q [64, D], k [tile, D] in shared memory -> q k^T, float32."""
    if interpret:  # the interpreter of 0.10.2 knows no transposed operand
        return jnp.dot(q[...], k[...].T, preferred_element_type=jnp.float32)

    def multiply(acc: Any) -> Array:
        plgpu.wgmma(acc, q, k.T)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((q.shape[0], k.shape[0]), jnp.float32))


def _add_product(acc: Array, p: Array, v: Any, interpret: bool) -> Any:
    """acc [64, D] + p [64, tile] v [tile, D], v in shared memory."""
    if interpret:  # it has no run_state
        return acc + jnp.dot(p, v[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, p, v))(plgpu.WGMMAAccumulatorRef.init(acc))


# -- the sum over a row's splits ---------------------------------------------------------------------------------------------


def _merge_kernel(
    splits: _Splits, R: int, G: int, heads: int, D: int, per_vector: int, dtype: Any, has_sinks: bool, interpret: bool
) -> Any:
    """(out float32 [R * most, G, n, per_vector * D], lse in base 2 [R * most, G, n'], kv_lens, sinks [G, heads]) ->
    (out [R, G, heads * D], lse [R, G, heads]).

    One warpgroup a CTA. It reads as many partial results at once as there are registers for, as all it does is wait for
    memory. Splits that a row has not are never read, whatever the table could hold."""
    vectors = heads // per_vector
    few_rows = R * G * vectors <= CTAS_AT_ONCE  # then a CTA for each vector
    block = 1 if few_rows else max(n for n in range(1, min(vectors, 8) + 1) if vectors % n == 0)
    at_once = max(1, 16 // (block * per_vector))
    lanes = per_vector * D

    def body(part_ref, part_lse_ref, len_ref, sink_ref, out_ref, lse_ref):
        row, g, first = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("block") * block
        count = splits.count(len_ref[row])

        def over_lanes(numbers: list[Array]) -> Array:
            """A number a head -> over the vector that holds these heads."""
            wide = [lax.broadcast_in_dim(x, (lanes,), ()) for x in numbers]
            return wide[0] if per_vector == 1 else jnp.where(lax.broadcasted_iota(jnp.int32, (lanes,), 0) < D, *wide)

        def add(i: Array, carry: Any) -> Any:
            split = [i * at_once + n for n in range(at_once)]
            place = [row * splits.most + jnp.minimum(s, count - 1) for s in split]
            parts = [[part_ref[p, g, first + j] for j in range(block)] for p in place]
            lses = [[part_lse_ref[p, g, first * per_vector + h] for h in range(block * per_vector)] for p in place]
            m, l, acc = carry
            lses = [[jnp.where(s < count, x, MASKED) for x in xs] for s, xs in zip(split, lses, strict=True)]
            m_new = [functools.reduce(jnp.maximum, xs) for xs in zip(m, *lses, strict=True)]
            shrink = [jnp.exp2(x - y) for x, y in zip(m, m_new, strict=True)]
            weights = [[jnp.exp2(x - y) for x, y in zip(xs, m_new, strict=True)] for xs in lses]
            l = [functools.reduce(lambda x, y: x + y, xs, x * y) for x, y, *xs in zip(l, shrink, *weights, strict=True)]
            of = lambda numbers, j: over_lanes(numbers[j * per_vector : (j + 1) * per_vector])
            acc = [x * of(shrink, j) for j, x in enumerate(acc)]
            for xs, ws in zip(parts, weights, strict=True):
                acc = [x + of(ws, j) * xs[j] for j, x in enumerate(acc)]
            return m_new, l, acc

        numbers = [jnp.float32(0)] * (block * per_vector)
        start = [jnp.float32(MASKED) for _ in numbers], numbers, [jnp.zeros((lanes,), jnp.float32) for _ in range(block)]
        m, l, acc = lax.fori_loop(0, lax.div(count + (at_once - 1), jnp.int32(at_once)), add, start)
        norms = []
        for h, (x, total) in enumerate(zip(m, l, strict=True)):
            x, total = x / _LOG2E, jnp.maximum(total, 1e-30)  # unused rows: 0 / 1e-30, not 0 / 0
            lse = x + jnp.log(total)
            norm = 1.0 / total
            if has_sinks:
                sink = sink_ref[g, first * per_vector + h]
                top = jnp.maximum(lse, sink)
                # A sink is a key without a value: it only thins the others out.
                with_sink = top + jnp.log(jnp.exp(lse - top) + jnp.exp(sink - top))
                norm, lse = norm * jnp.exp(lse - with_sink), with_sink
            norms.append(norm)
            lse_ref[row, g, first * per_vector + h] = jnp.where(count > 0, lse, 0.0)
        for j, x in enumerate(acc):
            out_ref[row, g, first + j] = (x * over_lanes(norms[j * per_vector : (j + 1) * per_vector])).astype(dtype)

    return plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((R, G, vectors, lanes), dtype), jax.ShapeDtypeStruct((R, G, heads), jnp.float32)),
        grid=(R, G, vectors // block), grid_names=("row", "head", "block"), num_threads=1, thread_name="warpgroup",
        compiler_params=_PARAMS, interpret=interpreter() if interpret else False, kernel_name="paged_decode_merge",
    )  # fmt: skip
