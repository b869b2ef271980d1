"""The KV cache: one pair of arrays a layer, in pages, and how attention of a step reads and writes it.

A list of separate arrays and not one stacked array: donated and written by an unrolled step, XLA updates them in place
without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxpaged.models.decoder import DecoderConfig
from pallas_kernels.ops import Ops

KVCache = list[tuple[Array, Array]]
"""A layer's (keys, values), each [P, K, G, D]."""


def page_bytes(config: DecoderConfig, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes that one page takes over all layers, keys and values."""
    per_token = 2 * len(config.layers) * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
    return per_token * page_size


def specs(config: DecoderConfig, num_pages: int, page_size: int, dtype: jnp.dtype) -> list[jax.ShapeDtypeStruct]:
    """Shapes of all cache arrays: keys then values of layer 0, of layer 1, ..."""
    shape = num_pages, page_size, config.num_kv_heads, config.head_dim
    return [jax.ShapeDtypeStruct(shape, dtype)] * (2 * len(config.layers))


def create(config: DecoderConfig, num_pages: int, page_size: int, dtype: jnp.dtype, device: jax.Device) -> list[Array]:
    """Zeroed caches on `device`, flat as in `specs`."""
    with jax.default_device(device):
        return [jax.device_put(jnp.zeros(s.shape, s.dtype), device) for s in specs(config, num_pages, page_size, dtype)]


class PagedAttend:
    """The decoder's `Attend` over pages: writes the step's keys and values, then attends. Lives for one trace; the
    written caches are collected in `caches`."""

    def __init__(self, config: DecoderConfig, ops: Ops, caches: Sequence[Array], batch, pages: Array, offsets: Array):
        self.config, self.ops, self.caches = config, ops, list(caches)
        self.batch, self.pages, self.offsets = batch, pages, offsets

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        b, i = self.batch, 2 * layer
        k_pages, v_pages = self.ops.write_kv(self.caches[i], self.caches[i + 1], k, v, self.pages, self.offsets)
        self.caches[i], self.caches[i + 1] = k_pages, v_pages
        out, _ = self.ops.paged_attention(
            q, k_pages, v_pages, b.page_table, b.kv_lens, b.query_start, b.counts, scale=self.config.scale,
            window=self.config.layers[layer].window, soft_cap=self.config.attention_soft_cap,
        )  # fmt: skip
        return out
