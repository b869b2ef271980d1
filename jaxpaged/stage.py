"""A stage of the model on its devices: leaves, cache, and how its programs are lowered. Most models have one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxpaged import home, kv_cache, packing, programs
from jaxpaged.adapter import Adapter
from jaxpaged.batch import Bucket, Variant
from jaxpaged.models.adapters import NO_ADAPTERS, Slots, with_adapters
from jaxpaged.models.decoder import Decoder, head_leaves
from jaxpaged.models.quantized import NO_FORMS, Forms, quantize_modules
from jaxpaged.models.spec import DecoderConfig
from jaxpaged.parallel import Parallel
from jaxpaged.placement import WHOLE, Placement, shard_bytes, specs_of
from jaxpaged.programs import Dims, Model
from jaxpaged.request import RequestError
from pallas_kernels.ops import Ops

COPIES = 8  # pages that one call of the copy program copies
TABLE = ".adapters."  # in the path of a leaf that holds LoRA adapters


def abstract_decoder(
    config: DecoderConfig, dtype: Any, forms: Forms = NO_FORMS, adapters: Slots = NO_ADAPTERS
) -> tuple[nnx.GraphDef, Any, dict[str, jax.ShapeDtypeStruct]]:
    """The model without memory: graph, tree of its leaves, and {dotted path: shape and dtype} in the tree's order.
    forms: its quantised products. adapters: room for LoRA adapters, whose leaves are those with ".adapters." in their path."""
    decoder = lambda: quantize_modules(Decoder(config, jnp.dtype(dtype)), forms)
    graph, state = nnx.split(nnx.eval_shape(lambda: with_adapters(decoder(), adapters, jnp.dtype(dtype))))
    paths = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    leaves, treedef = jax.tree.flatten(state)
    return graph, treedef, {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in zip(paths, leaves)}


def local_decoder(parallel: Parallel, dtype: Any, forms: Forms, adapters: Slots = NO_ADAPTERS
                  ) -> tuple[nnx.GraphDef, Any, dict[str, jax.ShapeDtypeStruct]]:  # fmt: skip
    """`abstract_decoder` of what each device runs. RequestError if that cuts a group of quantised numbers."""
    try:
        return abstract_decoder(parallel.local, dtype, forms, adapters)
    except ValueError as error:
        size = parallel.sharding.size
        raise RequestError(f"tensor_parallel_size={size} does not divide the quantised weights: {error} Use a smaller size, or "
                           "enable_expert_parallel for experts.", "tensor_parallel_size") from error  # fmt: skip


@dataclass(frozen=True)
class Blueprint:
    """All that the programs of a model depend on.

    parallel: its devices. dtype: of activations and of weights that are not quantised (forms). kv: the cache's layout, of all
    layers; cache_dtype: its numbers'.
    """

    parallel: Parallel
    dtype: Any
    forms: Forms
    kv: kv_cache.Layout
    cache_dtype: Any
    ops: Ops
    dims: Dims

    @cached_property
    def abstract(self) -> tuple[nnx.GraphDef, Any, dict[str, jax.ShapeDtypeStruct]]:
        return local_decoder(self.parallel, self.dtype, self.forms, self.dims.adapters)

    @cached_property
    def leaves(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """Of each stage, what it holds: with shardings."""
        local = whole = self.abstract[2]
        if self.parallel.sharding.size > 1:
            _, _, whole = abstract_decoder(self.parallel.sharding.config, self.dtype, self.forms, self.dims.adapters)
        axes = {path: self.parallel.cut_axis(path, whole[path].shape) for path in local}
        return [
            {p: place.struct(x.shape, x.dtype, axes[p]) for p, x in local.items() if self.parallel.holds(stage, p)}
            for stage, place in enumerate(self.parallel.placements)
        ]

    def caches(self, stage: int, num_pages: int) -> list[jax.ShapeDtypeStruct]:
        """A stage's: cut by heads, unless there is but one."""
        place, kv = self.parallel.placements[stage], self.kv.of(self.parallel.layers[stage])
        of = lambda config: kv_cache.specs(config, kv, num_pages, self.dims.page_size, self.cache_dtype)
        pairs = zip(of(self.parallel.sharding.config), of(self.parallel.local))
        return [place.struct(local.shape, local.dtype, 2 if whole.shape[2] > 1 else None) for whole, local in pairs]

    @property
    def page_bytes(self) -> int:
        """Bytes that one page takes on the device where it takes most."""
        return max(sum(map(shard_bytes, self.caches(stage, 1))) for stage in range(len(self.leaves)))

    @property
    def weight_bytes(self) -> int:
        """Likewise, of weights and of room for adapters."""
        return max(sum(map(shard_bytes, leaves.values())) for leaves in self.leaves)


class Stage:
    """One stage: what it holds, and its programs before they are compiled."""

    def __init__(self, blueprint: Blueprint, number: int):
        b, self.blueprint, self.number, self.dims = blueprint, blueprint, number, blueprint.dims
        self.place: Placement = b.parallel.placements[number]
        layers = b.parallel.layers[number]
        graph, treedef, abstract = b.abstract
        self.abstract = b.leaves[number]
        self.model = Model(graph, treedef, b.parallel.local, b.kv.of(layers), b.ops, layers,
                           tuple(path in self.abstract for path in abstract), b.parallel.axis)  # fmt: skip
        self.tables = {path: spec for path, spec in self.abstract.items() if TABLE in path}
        self.leaves: dict[str, Array] = {}
        self.caches: tuple[Array, ...] = ()

    @property
    def cache_specs(self) -> list[jax.ShapeDtypeStruct]:
        return self.blueprint.caches(self.number, self.dims.num_pages)

    @property
    def head(self) -> tuple[Array, ...]:
        """What makes logits of hidden states: on the last stage."""
        return tuple(self.leaves[path] for path in head_leaves(self.model.config))

    def fill(self, leaves: Mapping[str, Array]) -> None:
        """leaves: the whole model's, each on the first stage that holds it."""
        empty = dict(zip(self.tables, self.place.zeros(list(self.tables.values()))))
        there = lambda path, spec: empty[path] if path in empty else jax.device_put(leaves[path], spec.sharding)
        self.leaves = {path: there(path, spec) for path, spec in self.abstract.items()}

    def allocate(self) -> None:
        """An empty cache. The old one, if any, is let go first."""
        self.caches = ()
        self.caches = tuple(self.place.zeros(self.cache_specs))

    def empty_tables(self) -> None:
        self.leaves |= zip(self.tables, self.place.zeros(list(self.tables.values())))

    @property
    def state(self) -> tuple[Array, ...]:
        """Arrays that programs are given to keep."""
        return (*self.caches, *(self.leaves[path] for path in self.tables))

    # -- lowering: from the arguments' shapes to a program that only has to be compiled ----------------------------------------

    def _ints(self, *shape: int) -> jax.ShapeDtypeStruct:
        return self.place.struct(shape, jnp.int32)

    def _float(self, *shape: int, axis: int | None = None) -> jax.ShapeDtypeStruct:
        return self.place.struct(shape, self.blueprint.dtype, axis)

    @property
    def last_token(self) -> jax.ShapeDtypeStruct:
        return self._ints(self.dims.num_slots)

    def stream(self, num_tokens: int) -> jax.ShapeDtypeStruct:
        """What goes from stage to stage: [E, T], or where devices normalise some tokens each, those."""
        E, axis = self.model.config.embed_dim, self.model.axis_for(num_tokens)
        return self._float(E, num_tokens // axis.size, axis=1) if axis.sequence else self._float(E, num_tokens)

    def input_sharding(self, num_tokens: int) -> Any:
        """Of what a forward program takes from the stage before it, or of the last tokens."""
        cut = not self.model.first and self.model.axis_for(num_tokens).sequence
        return self.place.sharding(1 if cut else None)

    def lower_forward(self, bucket: Bucket, adapted: bool) -> Any:
        model, d = self.model, self.dims
        caches = tuple(self.cache_specs)
        x = self.last_token if model.first else self.stream(bucket.num_tokens)
        packed = self._ints(packing.size(programs.forward_layout(bucket, d, adapted)))
        inputs = tuple(self.abstract.values()), caches, x, packed
        out = (WHOLE, WHOLE) if model.last else (specs_of(self.stream(bucket.num_tokens)),)
        f = programs.make_forward(model, bucket, d, adapted)
        return self.place.jit(f, specs_of(inputs), (specs_of(caches), *out), donate=(1,)).lower(*inputs)

    def lower_sample(self, rows: int, variant: Variant) -> Any:
        f = programs.make_sample(self.model, rows, variant, self.dims)
        packed = self._ints(packing.size(programs.sample_layout(rows, variant, self.dims)))
        inputs = self._head_specs, self._float(self.model.config.embed_dim, rows), self.last_token, packed
        return self.place.jit(f, specs_of(inputs), (WHOLE, WHOLE, self.place.spec(0)), donate=(2,)).lower(*inputs)

    def lower_score(self, rows: int) -> Any:
        logits = self.place.struct((self.model.axis.rows(rows), self.dims.vocab_size), jnp.float32, 0)
        inputs = logits, self._ints(2, rows)
        return self.place.jit(programs.make_score(self.model, self.dims), specs_of(inputs), WHOLE).lower(*inputs)

    def lower_score_prompt(self, tokens: int) -> Any:
        inputs = self._head_specs, self._float(self.model.config.embed_dim, tokens), self._ints(tokens)
        return self.place.jit(programs.make_score_prompt(self.model, self.dims), specs_of(inputs), WHOLE).lower(*inputs)

    def lower_pool(self, bucket: Bucket) -> Any:
        hidden, rows = (self._float(self.model.config.embed_dim, n) for n in bucket)
        inputs = hidden, rows, self._ints(bucket.num_tokens)
        return self.place.jit(programs.pool, specs_of(inputs), WHOLE).lower(*inputs)

    def lower_copy(self) -> Any:
        caches = tuple(self.cache_specs)
        inputs = caches, self._ints(COPIES, 2)
        return self.place.jit(programs.copy_pages, specs_of(inputs), specs_of(caches), donate=(0,)).lower(*inputs)

    def lower_load_adapter(self) -> Any:
        tables = tuple(self.tables.values())
        inputs = tables, tuple(map(self._entry_spec, self.tables)), self._ints()
        return self.place.jit(programs.load_adapter, specs_of(inputs), specs_of(tables), donate=(0,)).lower(*inputs)

    @property
    def _head_specs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(self.abstract[path] for path in head_leaves(self.model.config))

    # -- adapters --------------------------------------------------------------------------------------------------------

    def entries(self, adapter: Adapter) -> tuple[Array, ...]:
        """An adapter's part of each table; zeros for what it does not touch."""
        return tuple(self._entry(path, adapter) for path in self.tables)

    def _entry(self, path: str, adapter: Adapter) -> Array:
        product, _, half = path.rpartition(TABLE)
        table, where = adapter.tables.get(product), _Entry(self.blueprint.parallel, self.place)
        if table is not None:
            return home.put(where, path, getattr(table, half))
        spec = self._entry_spec(path)
        nothing = np.zeros(spec.sharding.shard_shape(spec.shape), spec.dtype)  # pyright: ignore[reportOptionalMemberAccess]
        return where.join(path, spec.shape, None, [jax.device_put(nothing, device) for device in self.place.own])

    def _entry_spec(self, path: str) -> jax.ShapeDtypeStruct:
        spec = self.tables[path]
        axis = self.blueprint.parallel.cut_axis(path, spec.shape)
        local = spec.sharding.shard_shape(spec.shape)[1:]  # pyright: ignore[reportOptionalMemberAccess]
        return self.place.struct(local, spec.dtype, None if axis is None else axis - 1)


@dataclass(frozen=True)
class _Entry:
    """The home of one adapter's part of a table: cut as the table is, which has one axis more."""

    parallel: Parallel
    place: Placement

    def pieces(self, path: str, shape: tuple[int, ...], sharding: Any = None) -> list[home.Piece]:
        found = self.parallel.pieces(path, (1, *shape))
        return [home.Piece(p.device, tuple(r[1:] for r in p.regions), max(p.axis - 1, 0), p.shape[1:]) for p in found]

    def join(self, path: str, shape: tuple[int, ...], sharding: Any, parts: Sequence[Array]) -> Array:
        axis = self.parallel.cut_axis(path, (1, *shape))
        return self.place.join(parts, None if axis is None else axis - 1)
