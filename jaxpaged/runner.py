"""The runner: weights, cache and carry on the device, and the compiled programs that advance them.

Every program is compiled ahead of time for its fixed shapes and called as a compiled object, which cannot recompile.
`dispatch` enqueues and returns; `collect` waits. The order of dispatch is the order on the device, so a page freed on
the host may be given away at once: whoever writes it next does so after everybody who still reads it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxpaged import kv_cache, packing, programs
from jaxpaged.adapter import Adapter
from jaxpaged.batch import Batch, Bucket, Sampled, TokenLogprobs, Variant
from jaxpaged.models.adapters import NO_ADAPTERS, Slots, with_adapters
from jaxpaged.models.decoder import Decoder, head_leaves
from jaxpaged.models.quantized import NO_FORMS, Forms, quantize_modules
from jaxpaged.models.spec import DecoderConfig
from jaxpaged.programs import Dims
from jaxpaged.residents import NONE
from pallas_kernels.ops import Ops

COPIES = 8  # pages that one call of the copy program copies
TABLE = ".adapters."  # in the path of a leaf that holds LoRA adapters

Progress = Callable[[str, float], None]
"""(what was compiled, seconds it took)."""


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


def adapter_bytes(config: DecoderConfig, adapters: Slots, dtype: Any) -> int:
    """What room for LoRA adapters takes on the device."""
    if not adapters.num:
        return 0
    _, _, leaves = abstract_decoder(config, dtype, adapters=adapters)
    return sum(leaf.size * leaf.dtype.itemsize for path, leaf in leaves.items() if TABLE in path)


class Handle(NamedTuple):
    """A dispatched step: arrays that will be there."""

    tokens: Array
    logprobs: Any
    prompt_logprobs: Any
    pooled: Any


@dataclass(frozen=True)
class Memory:
    """Bytes on the device, as the compiler states them."""

    weights: int
    cache: int
    temporaries: int  # of the largest program

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.temporaries


class ModelRunner:
    """Runs batches of one model on one device.

    leaves: {dotted path: array} for every path of `abstract_decoder`; forms: its quantised products. buckets: the shapes that
    batches may have.
    lazy: compile a program when it is first needed instead of all of them in `warm_up`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        leaves: Mapping[str, Array],
        buckets: Sequence[Bucket],
        dims: Dims,
        ops: Ops,
        cache_dtype: Any,
        device: jax.Device,
        lazy: bool = False,
        kv: kv_cache.Layout | None = None,
        forms: Forms = NO_FORMS,
    ):
        self.config, self.dims, self.ops, self.device, self.lazy = config, dims, ops, device, lazy
        self.buckets, self.cache_dtype = tuple(buckets), jnp.dtype(cache_dtype)
        self.kv = kv or kv_cache.layout(config, dims.max_model_len, dims.page_size)
        self._graph, self._treedef, abstract = abstract_decoder(config, leaves["embed.weight"].dtype, forms, dims.adapters)
        self._tables = {path: spec for path, spec in abstract.items() if TABLE in path}
        empty = kv_cache.create(list(self._tables.values()), device)
        filled = {**leaves, **dict(zip(self._tables, empty))}
        self._leaves = {path: filled[path] for path in abstract}
        self._head = tuple(leaves[path] for path in head_leaves(config))
        self._programs: dict[tuple, Any] = {}
        self.num_compilations = 0
        self._caches: tuple[Array, ...] = ()
        self._last_token = jax.device_put(jnp.zeros((dims.num_slots,), jnp.int32), device)

    @property
    def embed_dim(self) -> int:
        return self.config.embed_dim

    # -- compiling ---------------------------------------------------------------------------------------------------

    @property
    def num_programs(self) -> int:
        """How many programs `compile` will make."""
        return 0 if self.lazy else len(self._all_programs())

    def compile(self, progress: Progress = lambda what, seconds: None, threads: int = 2) -> None:
        """Compiles every program: traced one by one, compiled `threads` at a time."""
        keys = [] if self.lazy else self._all_programs()

        def compile_one(key: tuple, lowered: Any) -> None:
            start = time.perf_counter()
            self._programs[key] = lowered.compile()
            progress(_describe(key), time.perf_counter() - start)

        with _no_collections(), ThreadPoolExecutor(threads) as pool:
            try:
                for future in [pool.submit(compile_one, key, self._lower(key)) for key in keys]:
                    future.result()
            except BaseException:  # Ctrl-C above all: what has not begun is not begun any more
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        self.num_compilations += len(keys)

    def allocate(self) -> None:
        """Creates the cache, empty. The old one, if any, is let go first."""
        self._caches = ()
        self._caches = tuple(kv_cache.create(self._cache_specs(), self.device))

    def memory(self) -> Memory:
        """What the compiled programs need, from XLA's `memory_analysis()`."""
        temporaries = 0
        for program in self._programs.values():
            analysis = program.memory_analysis()
            if analysis is not None:
                temporaries = max(temporaries, analysis.temp_size_in_bytes)
        weights = sum(x.nbytes for x in self._leaves.values())
        page = kv_cache.page_bytes(self.config, self.kv, self.dims.page_size, self.cache_dtype)
        return Memory(weights, page * self.dims.num_pages, temporaries)

    def _cache_specs(self) -> list[jax.ShapeDtypeStruct]:
        return kv_cache.specs(self.config, self.kv, self.dims.num_pages, self.dims.page_size, self.cache_dtype)

    def _all_programs(self) -> list[tuple]:
        kinds = (False, True) if self._tables else (False,)
        keys: list[tuple] = [("forward", bucket, adapted) for bucket in reversed(self.buckets) for adapted in kinds]
        rows = sorted({bucket.num_rows for bucket in self.buckets})
        keys += [("sample", r, variant) for r in rows for variant in Variant]
        keys += [("score", r) for r in rows]
        keys += [("score_prompt", bucket.num_tokens) for bucket in self.buckets]
        keys += [("pool", bucket) for bucket in self.buckets]
        return [*keys, ("copy",), *([("load_adapter",)] if self._tables else [])]

    def _lower(self, key: tuple) -> Any:
        d, leaves = self.dims, [_spec(x) for x in self._leaves.values()]
        caches = self._cache_specs()
        head, last, E = tuple(map(_spec, self._head)), _spec(self._last_token), self.config.embed_dim
        act = self._head[0].dtype
        match key:
            case ("forward", bucket, adapted):
                f = programs.make_forward(self._graph, self._treedef, self.config, self.kv, self.ops, bucket, d, adapted)
                packed = _ints(packing.size(programs.forward_layout(bucket, d, adapted)))
                return jax.jit(f, donate_argnums=1).lower(tuple(leaves), tuple(caches), last, packed)
            case ("sample", rows, variant):
                f = programs.make_sample(self.config, self.ops, rows, variant, d)
                packed = _ints(packing.size(programs.sample_layout(rows, variant, d)))
                return jax.jit(f, donate_argnums=2).lower(head, jax.ShapeDtypeStruct((E, rows), act), last, packed)
            case ("score", rows):
                logits = jax.ShapeDtypeStruct((rows, d.vocab_size), jnp.float32)
                return jax.jit(programs.make_score(d)).lower(logits, _ints(2, rows))
            case ("score_prompt", tokens):
                hidden = jax.ShapeDtypeStruct((E, tokens), act)
                return jax.jit(programs.make_score_prompt(self.config, d)).lower(head, hidden, _ints(tokens))
            case ("pool", bucket):
                hidden, rows = (jax.ShapeDtypeStruct((E, n), act) for n in bucket)
                return jax.jit(programs.pool).lower(hidden, rows, _ints(bucket.num_tokens))
            case ("copy",):
                return jax.jit(programs.copy_pages, donate_argnums=0).lower(tuple(caches), _ints(COPIES, 2))
            case ("load_adapter",):
                tables = tuple(self._tables.values())
                new = tuple(jax.ShapeDtypeStruct(spec.shape[1:], spec.dtype) for spec in tables)
                return jax.jit(programs.load_adapter, donate_argnums=0).lower(tables, new, _ints())
        raise AssertionError(key)

    def _program(self, *key: Any) -> Any:
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = self._lower(key).compile()
            self.num_compilations += 1
        return program

    # -- running -----------------------------------------------------------------------------------------------------

    def dispatch(self, batch: Batch) -> Handle:
        """Enqueues copies, decoder, sampler and what logprobs and vectors are asked for. Returns before any of it has run."""
        bucket = Bucket(len(batch.tokens), len(batch.slots))
        for place, adapter in batch.loads:
            self._load_adapter(place, adapter)
        self._copy(batch.copies)
        adapted = bool(self._tables) and bool((batch.adapters != NONE).any())
        packed = self._put(packing.pack(programs.forward_layout(bucket, self.dims, adapted), batch._asdict()))
        forward = self._program("forward", bucket, adapted)
        leaves = tuple(self._leaves.values())
        self._caches, hidden, rows = forward(leaves, self._caches, self._last_token, packed)
        tokens, self._last_token, logits = self._sample(batch, rows)
        logprobs = prompt_logprobs = pooled = None
        if batch.num_logprobs >= 0:
            logprobs = self._program("score", bucket.num_rows)(logits, tokens)
        if batch.prompt_logprobs:
            program = self._program("score_prompt", bucket.num_tokens)
            prompt_logprobs = program(self._head, hidden, self._put(batch.targets))
        if batch.pools:
            pooled = self._program("pool", bucket)(hidden, rows, self._put(batch.row_of_token))
        handle = Handle(tokens, logprobs, prompt_logprobs, pooled)
        for array in jax.tree.leaves(handle):
            array.copy_to_host_async()
        return handle

    def collect(self, handle: Handle) -> Sampled:
        """Waits for a step and brings its results to the host."""
        tokens, finite = np.asarray(handle.tokens)
        pooled = None if handle.pooled is None else np.asarray(handle.pooled)
        return Sampled(tokens, finite != 0, _to_host(handle.logprobs), _to_host(handle.prompt_logprobs), pooled)

    def recover(self) -> bool:
        """After a failed step: if its donated arrays are gone or hold an error, new empty ones. True if the cache was
        lost."""
        arrays = (*self._caches, self._last_token, *(self._leaves[path] for path in self._tables))
        if not any(array.is_deleted() for array in arrays):
            try:
                jax.block_until_ready(arrays)
                return False
            except Exception:  # whatever the device says: these contents cannot be trusted
                pass
        self._last_token = jax.device_put(jnp.zeros((self.dims.num_slots,), jnp.int32), self.device)
        self._leaves |= zip(self._tables, kv_cache.create(list(self._tables.values()), self.device))
        self.allocate()
        return True

    def close(self) -> None:
        """Frees the device memory of cache, carry and programs."""
        for array in (*self._caches, self._last_token):
            array.delete()
        self._caches, self._leaves, self._programs = (), {}, {}

    def _sample(self, batch: Batch, rows: Array) -> tuple[Array, Array, Array]:
        fields = batch._asdict() | batch.sampling._asdict()
        if batch.variant == Variant.FULL:
            assert batch.edits is not None
            last = np.maximum(batch.query_start[1:] - 1, 0)
            fields |= batch.edits._asdict() | {"carried": batch.carried[last]}
        num_rows = len(batch.slots)
        packed = self._put(packing.pack(programs.sample_layout(num_rows, batch.variant, self.dims), fields))
        return self._program("sample", num_rows, batch.variant)(self._head, rows, self._last_token, packed)

    def _load_adapter(self, place: int, adapter: Adapter) -> None:
        """Writes an adapter's tables, and zeros for what it does not touch. Steps in flight have read the old ones before."""
        new = []
        for path, spec in self._tables.items():
            product, _, half = path.rpartition(TABLE)
            table = adapter.tables.get(product)
            new.append(self._put(np.zeros(spec.shape[1:], spec.dtype) if table is None else getattr(table, half)))
        old = tuple(self._leaves[path] for path in self._tables)
        place_ = self._put(np.asarray(place, np.int32))
        self._leaves |= zip(self._tables, self._program("load_adapter")(old, tuple(new), place_))

    def _copy(self, copies: np.ndarray) -> None:
        for at in range(0, len(copies), COPIES):
            pairs = np.full((COPIES, 2), (0, self.dims.num_pages), np.int32)
            part = copies[at : at + COPIES]
            pairs[: len(part)] = part
            self._caches = self._program("copy")(self._caches, self._put(pairs))

    def _put(self, array: np.ndarray) -> Array:
        return jax.device_put(array, self.device)


@contextmanager
def _no_collections() -> Iterator[None]:
    """Tracing makes a million objects and next to no garbage; and a Ctrl-C that arrives in JAX's callback for the garbage
    collector is lost."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _spec(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _to_host(values: Any) -> TokenLogprobs | None:
    return None if values is None else TokenLogprobs(*(np.asarray(x) for x in values))


def _describe(key: tuple) -> str:
    match key:
        case ("forward", bucket, adapted):
            return f"decoder, {bucket.num_tokens} tokens{', LoRA' if adapted else ''}"
        case ("sample", rows, variant):
            return f"sampler {variant.name.lower()}, {rows} rows"
        case ("score", rows):
            return f"logprobs, {rows} rows"
        case ("score_prompt", tokens):
            return f"prompt logprobs, {tokens} tokens"
        case ("pool", bucket):
            return f"pooling, {bucket.num_tokens} tokens"
    return key[0]
