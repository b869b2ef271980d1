"""The KV cache: a few arrays a layer, in pages, and how attention of a step reads and writes them.

A list of separate arrays and not one stacked array: donated and written by an unrolled step, XLA updates them in place
without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpaged.models.spec import AttentionSpec, DecoderConfig, LayerSpec, MLASpec
from pallas_kernels.checks import QUANTIZED
from pallas_kernels.ops import Ops


def layer_specs(spec: LayerSpec, num_pages: int, page_size: int, dtype: Any) -> list[jax.ShapeDtypeStruct]:
    """The arrays of one layer: keys and values [P, K, G, D]; of a quantised cache also their scales [P, K, G]; of latent
    attention keys alone."""
    heads, key_dim, value_dim = spec.attention.cached
    places = num_pages, page_size, heads
    arrays = [jax.ShapeDtypeStruct((*places, dim), dtype) for dim in (key_dim, value_dim) if dim]
    if str(jnp.dtype(dtype)) in QUANTIZED:
        arrays += [jax.ShapeDtypeStruct(places, jnp.float32)] * len(arrays)
    return arrays


def specs(config: DecoderConfig, num_pages: int, page_size: int, dtype: Any) -> list[jax.ShapeDtypeStruct]:
    """Shapes of all cache arrays: those of layer 0, of layer 1, ..."""
    return [array for spec in config.layers for array in layer_specs(spec, num_pages, page_size, dtype)]


def page_bytes(config: DecoderConfig, page_size: int, dtype: Any) -> int:
    """Bytes that one page takes over all layers."""
    return sum(math.prod(s.shape) * np.dtype(s.dtype).itemsize for s in specs(config, 1, page_size, dtype))


def create(config: DecoderConfig, num_pages: int, page_size: int, dtype: Any, device: jax.Device) -> list[Array]:
    """Zeroed caches on `device`, flat as in `specs`."""
    with jax.default_device(device):
        return [jax.device_put(jnp.zeros(s.shape, s.dtype), device) for s in specs(config, num_pages, page_size, dtype)]


class PagedStep:
    """The decoder's `Step` over pages: writes the step's keys and values, then attends. Lives for one trace; the written
    caches are collected in `caches`."""

    def __init__(self, config: DecoderConfig, ops: Ops, caches: Sequence[Array], batch, pages: Array, offsets: Array):
        self.config, self.ops, self.batch, self.pages, self.offsets = config, ops, batch, pages, offsets
        rest, self._caches = list(caches), []
        for spec in config.layers:
            count = len(layer_specs(spec, 1, 1, caches[0].dtype))
            self._caches.append(rest[:count])
            del rest[:count]

    @property
    def caches(self) -> list[Array]:
        return [array for arrays in self._caches for array in arrays]

    def attend(self, layer: int, q: Array, k: Array, v: Array | None, sinks: Array | None) -> Array:
        spec = self.config.layers[layer].attention
        if isinstance(spec, MLASpec):
            return self._attend_latent(layer, spec, q, k)
        assert v is not None
        caches = self._caches[layer]
        scales = dict(zip(("k_scales", "v_scales"), caches[2:]))
        caches = self.ops.write_kv(*caches[:2], k, v, self.pages, self.offsets, **scales)
        self._caches[layer] = list(caches)
        return self._attend(layer, spec, q, *caches[:2], sinks=sinks, **dict(zip(("k_scales", "v_scales"), caches[2:])))

    def _attend_latent(self, layer: int, spec: MLASpec, q: Array, k: Array) -> Array:
        """The values are the keys' first numbers: one array is both, and what it gives beyond them is cut off."""
        (cache,) = self._caches[layer]
        cache = cache.at[self.pages, self.offsets].set(k.astype(cache.dtype), mode="drop")
        self._caches[layer] = [cache]
        return self._attend(layer, spec, q, cache, cache)[..., : spec.kv_rank]

    def _attend(self, layer: int, spec: AttentionSpec | MLASpec, q: Array, k_pages: Array, v_pages: Array, **more) -> Array:
        b, place = self.batch, self.config.layers[layer]
        if spec.alibi is not None:
            more["alibi"] = jnp.asarray(spec.alibi, jnp.float32)
        if place.chunk is not None:
            more["chunk"] = place.chunk
        out, _ = self.ops.paged_attention(
            q, k_pages, v_pages, b.page_table, b.kv_lens, b.query_start, b.counts, scale=spec.scale,
            window=place.window, soft_cap=spec.soft_cap, **more,
        )  # fmt: skip
        return out

    def grouped_matmul(self, x: Array, w: Array, group_sizes: Array) -> Array:
        return self.ops.grouped_matmul(x, w, group_sizes)
