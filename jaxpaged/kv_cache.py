"""The KV cache: a few arrays a layer, in pages, and how attention of a step reads and writes them.

A list of separate arrays and not one stacked array: donated and written by an unrolled step, XLA updates them in place
without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpaged.axis import ONE, Axis
from jaxpaged.models import adapters as lora
from jaxpaged.models.adapters import Sorted
from jaxpaged.models.spec import AttentionSpec, DecoderConfig, LayerSpec, MLASpec
from jaxpaged.reach import EVERYTHING, Places, Reach, grouped
from pallas_kernels.checks import QUANTIZED
from pallas_kernels.ops import Ops


class Layout(NamedTuple):
    """Which layers share a page table, and which share arrays (in pages of their own): see `reach`."""

    reaches: tuple[Reach, ...]  # of each group
    places: Places
    first: int = 0  # layer, of a part of the model

    @property
    def size(self) -> int:
        """Layers of a group: sets of arrays that there are."""
        return 1 + max(place for _, place in self.places)

    def of(self, layers: range) -> Layout:
        """The layout of some of the layers: the same groups, with as many arrays as the largest has layers there."""
        seen, places = [0] * len(self.reaches), []
        for group, _ in self.places[layers.start : layers.stop]:
            places.append((group, seen[group]))
            seen[group] += 1
        return Layout(self.reaches, tuple(places), layers.start)


def layout(config: DecoderConfig, max_model_len: int, page_size: int, hybrid: bool = True) -> Layout:
    """hybrid: layers that see a window only keep no more than that. Layers that leave different things in the cache are one
    group that sees everything; so are they if pages straddle chunks: what is kept would not begin with a chunk, and kernels
    count positions from there."""
    straddled = any(spec.chunk is not None and spec.chunk % page_size for spec in config.layers)
    if not hybrid or straddled or len({spec.attention.cached for spec in config.layers}) > 1:
        return Layout(EVERYTHING, tuple((0, i) for i in range(len(config.layers))))
    return Layout(*grouped([Reach(spec.window, spec.chunk) for spec in config.layers], max_model_len))


def layer_specs(spec: LayerSpec, num_pages: int, page_size: int, dtype: Any) -> list[jax.ShapeDtypeStruct]:
    """The arrays of one layer: keys and values [P, K, G, D]; of a quantised cache also their scales [P, K, G]; of latent
    attention keys alone."""
    heads, key_dim, value_dim = spec.attention.cached
    places = num_pages, page_size, heads
    arrays = [jax.ShapeDtypeStruct((*places, dim), dtype) for dim in (key_dim, value_dim) if dim]
    if str(jnp.dtype(dtype)) in QUANTIZED:
        arrays += [jax.ShapeDtypeStruct(places, jnp.float32)] * len(arrays)
    return arrays


def specs(config: DecoderConfig, layout: Layout, num_pages: int, page_size: int, dtype: Any) -> list[jax.ShapeDtypeStruct]:
    """Shapes of all cache arrays: those of a group's first layer, of its second, ..."""
    layers = config.layers[layout.first : layout.first + len(layout.places)]
    first = {place: spec for spec, (_, place) in zip(reversed(layers), reversed(layout.places))}
    return [array for place in range(layout.size) for array in layer_specs(first[place], num_pages, page_size, dtype)]


def page_bytes(config: DecoderConfig, layout: Layout, page_size: int, dtype: Any) -> int:
    """Bytes that one page takes over all layers of its group."""
    return sum(math.prod(s.shape) * np.dtype(s.dtype).itemsize for s in specs(config, layout, 1, page_size, dtype))


def spread(x: Array) -> Array:
    """[..., D] times an orthogonal, symmetric matrix of numbers of one size (Hadamard's): what a few numbers of a head hold
    goes to all, so that a scale fits all of them. Scores do not change where queries and keys are spread alike, and it undoes
    itself: what attention makes of spread values is spread back. Source: Ashkboos et al. 2024 (QuaRot)."""
    n = x.shape[-1] & -x.shape[-1]  # its largest power of two: of other sizes, parts are spread
    parts = x.reshape(*x.shape[:-1], -1, n).astype(jnp.float32)
    return jnp.einsum("...i,ij->...j", parts, jnp.asarray(_hadamard(n))).reshape(x.shape).astype(x.dtype)


def _hadamard(n: int) -> np.ndarray:
    """[n, n], n a power of two (Sylvester 1867)."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix * np.float32(n**-0.5)


class Pages(NamedTuple):
    """A group's view of a step. `page_table` [R, C] begins with the page of a sequence that is its first; lengths are counted
    from there: attention knows distances only."""

    page_table: Array
    kv_lens: Array  # [R]
    pages: Array  # [T]: where each token goes; >= P: nowhere
    offsets: Array  # [T]


class Ragged(NamedTuple):
    """Which tokens are whose: see `pallas_kernels.ops.paged_attention`."""

    query_start: Array
    counts: Array
    row_of_token: Array


class PagedStep:
    """The decoder's `Step` over pages: writes the step's keys and values, then attends. Lives for one trace; the written
    caches are collected in `caches`."""

    def __init__(self, config: DecoderConfig, layout: Layout, ops: Ops, caches: Sequence[Array], groups: Sequence[Pages],
                 ragged: Ragged, adapters: Sorted | None = None, axis: Axis = ONE):  # fmt: skip
        self.config, self.layout, self.ops, self.groups, self.adapters = config, layout, ops, groups, adapters
        self.axis = axis
        self.query_start, self.counts, self._row = ragged.query_start, ragged.counts, None
        if not config.causal:  # a query that sees all of its sequence is what a decode's is: each is a row of its own
            T = len(ragged.row_of_token)
            self.query_start, self._row = jnp.arange(T + 1, dtype=jnp.int32), ragged.row_of_token
            self.counts = jnp.full((2,), ragged.query_start[-1], jnp.int32)
        count = len(caches) // layout.size
        self._caches = [list(caches[i * count : (i + 1) * count]) for i in range(layout.size)]

    @property
    def caches(self) -> list[Array]:
        return [array for arrays in self._caches for array in arrays]

    def attend(self, layer: int, q: Array, k: Array, v: Array | None, sinks: Array | None) -> Array:
        spec = self.config.layers[layer].attention
        if isinstance(spec, MLASpec):
            return self._attend_latent(layer, spec, q, k)
        assert v is not None
        group, place = self._place(layer)
        caches, to = self._caches[place], self.groups[group]
        scales = dict(zip(("k_scales", "v_scales"), caches[2:]))
        spreads = caches[0].dtype == jnp.int8  # float8 has a scale in each number: it gains nothing
        if spreads:
            q, k, v = spread(q), spread(k), spread(v)
        caches = self.ops.write_kv(*caches[:2], k, v, to.pages, to.offsets, **scales)
        self._caches[place] = list(caches)
        scales = dict(zip(scales, caches[2:]))
        out = self._attend(layer, spec, q, *caches[:2], sinks=sinks, **scales)
        return spread(out) if spreads else out

    def _attend_latent(self, layer: int, spec: MLASpec, q: Array, k: Array) -> Array:
        """The values are the keys' first numbers: one array is both, and what it gives beyond them is cut off."""
        group, place = self._place(layer)
        (cache,), to = self._caches[place], self.groups[group]
        cache = cache.at[to.pages, to.offsets].set(k.astype(cache.dtype), mode="drop")
        self._caches[place] = [cache]
        return self._attend(layer, spec, q, cache, cache)[..., : spec.kv_rank]

    def _attend(self, layer: int, spec: AttentionSpec | MLASpec, q: Array, k_pages: Array, v_pages: Array, **more) -> Array:
        of, place = self.groups[self._place(layer)[0]], self.config.layers[layer]
        if spec.alibi is not None:
            more["alibi"] = self.axis.part(jnp.asarray(spec.alibi, jnp.float32), spec.num_heads)
        if place.chunk is not None:
            more["chunk"] = place.chunk
        table, lengths = of.page_table, of.kv_lens
        if self._row is not None:
            table, lengths = (x.at[self._row].get(mode="fill", fill_value=0) for x in (table, lengths))
        out, _ = self.ops.paged_attention(q, k_pages, v_pages, table, lengths, self.query_start, self.counts, scale=spec.scale,
                                          window=place.window, soft_cap=spec.soft_cap, **more)  # fmt: skip
        return out

    def _place(self, layer: int) -> tuple[int, int]:
        return self.layout.places[layer - self.layout.first]

    def grouped_matmul(self, x: Array, w: Array, group_sizes: Array) -> Array:
        return self.ops.grouped_matmul(x, w, group_sizes)

    def quantized_matmul(self, x: Array, w: Array, scales: Array, zeros: Array | None) -> Array:
        return self.ops.quantized_matmul(x, w, scales, zeros)

    def adapt(self, x: Array, a: Array, b: Array) -> Array | None:
        return None if self.adapters is None else lora.apply(x, a, b, self.adapters, self.ops.grouped_matmul)
