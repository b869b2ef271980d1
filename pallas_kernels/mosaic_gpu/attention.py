"""Paged attention on Hopper: the decode kernel for rows of one query, the prefill kernel for the others."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.mosaic_gpu.decode import decode
from pallas_kernels.mosaic_gpu.interpret import interpreter
from pallas_kernels.mosaic_gpu.prefill import prefill
from pallas_kernels.mosaic_gpu.tuning import configuration


# A jit of its own: a step calls this once a layer, and traces it once.
@partial(jax.jit, static_argnames=("scale", "window", "chunk", "soft_cap", "device_kind", "interpret"))
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
    device_kind: str,
    interpret: bool,
) -> tuple[Array, Array]:
    """See `pallas_kernels.ops.paged_attention`. device_kind: of the jax.Device: what block sizes are good depends on it."""
    if chunk is not None:
        raise NotImplementedError(f"mosaic_gpu has no attention within chunks of {chunk} positions; the backend triton has")
    if k_scales is not None or v_scales is not None:
        raise NotImplementedError(f"mosaic_gpu has no quantised caches such as {k_pages.dtype}; the backend triton has")
    (T, H, D), (_, page_size, G, _), (R, _) = q.shape, k_pages.shape, page_table.shape
    config = configuration(device_kind, H, G, D, page_size, k_pages.dtype)
    options: dict[str, Any] = dict(scale=scale, window=window, soft_cap=soft_cap, sinks=sinks, alibi=alibi, interpret=interpret)
    n = min(T, R)  # decodes come first, so row r's query is token r
    decoded = decode(q[:n], k_pages, v_pages, page_table[:n], kv_lens[:n], counts[0], config=config.decode, **options)
    if T == 1:  # a chunk has at least two queries
        return decoded
    options["interpret"] = interpreter() if interpret else False
    chunks = prefill(q, k_pages, v_pages, page_table, kv_lens, query_start, counts, config=config.prefill, **options)
    is_decode = jnp.arange(n) < counts[0]
    choose = lambda x, y: y.at[:n].set(jnp.where(is_decode.reshape(n, *[1] * (x.ndim - 1)), x, y[:n]))
    return choose(decoded[0], chunks[0]), choose(decoded[1], chunks[1])
