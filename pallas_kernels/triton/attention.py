"""Paged attention in Pallas-Triton: limits, block sizes, and the two kernels of a ragged batch."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.triton.blocks import HOPPER, Blocks, Capability, decode_blocks, prefill_blocks
from pallas_kernels.triton.cache import refuse_float8
from pallas_kernels.triton.decode import decode, plan
from pallas_kernels.triton.prefill import prefill
from pallas_kernels.triton.tile import Cache, Static


# A jit of its own: a step calls this once a layer, and traces it once.
@partial(jax.jit, static_argnames=("scale", "window", "chunk", "soft_cap", "capability", "interpret"))
def paged_attention(
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
    chunk: int | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    alibi: Array | None = None,
    k_scales: Array | None = None,
    v_scales: Array | None = None,
    capability: Capability | None,
    interpret: bool,
) -> tuple[Array, Array]:
    """See `pallas_kernels.ops.paged_attention`. capability: of the GPU (None: any, when interpreted)."""
    _refuse(q, k_pages, capability)
    T, H, D = q.shape
    ratio, page_size = H // k_pages.shape[2], k_pages.shape[1]
    float32 = lambda x: None if x is None else x.astype(jnp.float32)
    sinks, alibi = float32(sinks), float32(alibi)
    cache = Cache(k_pages, v_pages, k_scales, v_scales, page_table)
    static = Static(ratio, D, page_size, scale, window, chunk, soft_cap)
    sizes = static.padded_dim, q.dtype.itemsize
    splits = plan(page_table.shape[1] * page_size, static, kv_lens, counts[0])
    out, lse = decode(q, cache, kv_lens, splits, sinks, alibi, static=static, blocks=decode_blocks(*sizes), interpret=interpret)
    return prefill(q, cache, kv_lens, query_start, counts, sinks, alibi, out, lse, static=static,
                   blocks=_fitted(prefill_blocks(*sizes, capability or HOPPER), T, ratio), interpret=interpret)  # fmt: skip


def _fitted(blocks: Blocks, T: int, ratio: int) -> Blocks:
    """Fewer rows for a small batch; at least a query's heads, and what a tensor core multiplies."""
    power = lambda n: 1 << (n - 1).bit_length()
    rows = max(16, power(ratio), min(blocks.rows, power(T * ratio)))
    return blocks._replace(rows=rows, warps=blocks.warps if rows >= blocks.rows else 4)


def _refuse(q: Array, k_pages: Array, capability: Capability | None) -> None:
    """NotImplementedError for what these kernels cannot do."""
    refuse_float8(k_pages.dtype, capability)
    D, size = q.shape[2], k_pages.size
    if D > 256:
        raise NotImplementedError(f"triton: head_dim {D} is above 256; the backend reference can")
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(
            f"triton: queries of {q.dtype}, not of bfloat16, float16 or float32; the backend reference can"
        )
    if k_pages.dtype.itemsize == 1 and 2**31 <= size <= 2**32:
        raise NotImplementedError(
            f"triton: a cache of {size} bytes a layer, which Pallas would count in 32 bits with a sign. Less than 2 GiB or "
            "more than 4 GiB works; take fewer pages, or the backend reference, which can"
        )
