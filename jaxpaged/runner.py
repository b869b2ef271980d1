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
import numpy as np
from jax import Array

from jaxpaged import packing, programs
from jaxpaged.adapter import Adapter
from jaxpaged.batch import Batch, Bucket, Sampled, TokenLogprobs, Variant
from jaxpaged.residents import NONE
from jaxpaged.stage import COPIES, Blueprint, Stage

Progress = Callable[[str, float], None]
"""(what was compiled, seconds it took)."""


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
    """Runs batches of one model.

    leaves: {dotted path: array} for every path of `stage.abstract_decoder` but those of adapters, each where
    `blueprint.parallel` puts it. buckets: the shapes that batches may have.
    lazy: compile a program when it is first needed instead of all of them in `compile`.
    """

    def __init__(self, blueprint: Blueprint, leaves: Mapping[str, Array], buckets: Sequence[Bucket], lazy: bool = False):
        self.blueprint, self.dims, self.lazy, self.buckets = blueprint, blueprint.dims, lazy, tuple(buckets)
        self.stages = [Stage(blueprint, number) for number in range(len(blueprint.parallel.layers))]
        for stage in self.stages:
            stage.fill(leaves)
        self._programs: dict[tuple, Any] = {}
        self.num_compilations = 0
        self._last_token = self._no_tokens()

    @property
    def embed_dim(self) -> int:
        return self.blueprint.parallel.local.embed_dim

    @property
    def leaves(self) -> dict[str, Array]:
        """The whole model's, by path: as they are on the devices."""
        return {path: array for stage in reversed(self.stages) for path, array in stage.leaves.items()}

    @property
    def last(self) -> Stage:
        """The stage that samples."""
        return self.stages[-1]

    def _no_tokens(self) -> Array:
        return self.last.place.put(np.zeros((self.dims.num_slots,), np.int32))

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
        for stage in self.stages:
            stage.allocate()

    def memory(self) -> Memory:
        """What the compiled programs need on a device, from XLA's `memory_analysis()`."""
        temporaries = 0
        for program in self._programs.values():
            analysis = program.memory_analysis()
            if analysis is not None:
                temporaries = max(temporaries, analysis.temp_size_in_bytes)
        return Memory(self.blueprint.weight_bytes, self.blueprint.page_bytes * self.dims.num_pages, temporaries)

    def _all_programs(self) -> list[tuple]:
        adapters, stages = bool(self.dims.adapters.num), range(len(self.stages))
        kinds = (False, True) if adapters else (False,)
        keys: list[tuple] = [("forward", i, b, adapted) for b in reversed(self.buckets) for i in stages for adapted in kinds]
        rows = sorted({bucket.num_rows for bucket in self.buckets})
        keys += [("sample", r, variant) for r in rows for variant in Variant]
        keys += [("score", r) for r in rows]
        keys += [("score_prompt", bucket.num_tokens) for bucket in self.buckets]
        keys += [("pool", bucket) for bucket in self.buckets]
        return [*keys, *(("copy", i) for i in stages), *(("load_adapter", i) for i in stages if adapters)]

    def _lower(self, key: tuple) -> Any:
        match key:
            case ("forward", i, bucket, adapted):
                return self.stages[i].lower_forward(bucket, adapted)
            case ("sample", rows, variant):
                return self.last.lower_sample(rows, variant)
            case ("score", rows):
                return self.last.lower_score(rows)
            case ("score_prompt", tokens):
                return self.last.lower_score_prompt(tokens)
            case ("pool", bucket):
                return self.last.lower_pool(bucket)
            case ("copy", i):
                return self.stages[i].lower_copy()
            case ("load_adapter", i):
                return self.stages[i].lower_load_adapter()
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
        hidden, rows = self._forward(batch, bucket)
        tokens, self._last_token, logits = self._sample(batch, rows)
        logprobs = prompt_logprobs = pooled = None
        put, head = self.last.place.put, self.last.head
        if batch.num_logprobs >= 0:
            logprobs = self._program("score", bucket.num_rows)(logits, tokens)
        if batch.prompt_logprobs:
            prompt_logprobs = self._program("score_prompt", bucket.num_tokens)(head, hidden, put(batch.targets))
        if batch.pools:
            pooled = self._program("pool", bucket)(hidden, rows, put(batch.row_of_token))
        handle = Handle(tokens, logprobs, prompt_logprobs, pooled)
        for array in jax.tree.leaves(handle):
            array.copy_to_host_async()
        return handle

    def _forward(self, batch: Batch, bucket: Bucket) -> tuple[Array, Array]:
        """Hidden states of all tokens and of each row's last: one stage after the other."""
        adapted = bool(self.dims.adapters.num) and bool((batch.adapters != NONE).any())
        packed = packing.pack(programs.forward_layout(bucket, self.dims, adapted), batch._asdict())
        x, rows = self._last_token, None
        for i, stage in enumerate(self.stages):
            forward = self._program("forward", i, bucket, adapted)
            x = x if len(self.stages) == 1 else jax.device_put(x, stage.input_sharding(bucket.num_tokens))
            stage.caches, x, *rows = forward(tuple(stage.leaves.values()), stage.caches, x, stage.place.put(packed))
        assert rows, "the last stage returns them"
        return x, rows[0]

    def collect(self, handle: Handle) -> Sampled:
        """Waits for a step and brings its results to the host."""
        tokens, finite = np.asarray(handle.tokens)
        pooled = None if handle.pooled is None else np.asarray(handle.pooled)
        return Sampled(tokens, finite != 0, _to_host(handle.logprobs), _to_host(handle.prompt_logprobs), pooled)

    def recover(self) -> bool:
        """After a failed step: if its donated arrays are gone or hold an error, new empty ones. True if the cache was
        lost."""
        arrays = [self._last_token, *(array for stage in self.stages for array in stage.state)]
        if not any(array.is_deleted() for array in arrays):
            try:
                jax.block_until_ready(arrays)
                return False
            except Exception:  # whatever the device says: these contents cannot be trusted
                pass
        self._last_token = self._no_tokens()
        for stage in self.stages:
            stage.empty_tables()
        self.allocate()
        return True

    def close(self) -> None:
        """Frees the device memory of cache, carry and programs."""
        for array in (self._last_token, *(array for stage in self.stages for array in stage.caches)):
            array.delete()
        for stage in self.stages:
            stage.caches, stage.leaves = (), {}
        self._programs = {}

    def _sample(self, batch: Batch, rows: Array) -> tuple[Array, Array, Array]:
        fields = batch._asdict() | batch.sampling._asdict()
        if batch.variant == Variant.FULL:
            assert batch.edits is not None
            last = np.maximum(batch.query_start[1:] - 1, 0)
            fields |= batch.edits._asdict() | {"carried": batch.carried[last]}
        num_rows = len(batch.slots)
        packed = self.last.place.put(packing.pack(programs.sample_layout(num_rows, batch.variant, self.dims), fields))
        return self._program("sample", num_rows, batch.variant)(self.last.head, rows, self._last_token, packed)

    def _load_adapter(self, place: int, adapter: Adapter) -> None:
        """Writes an adapter's tables, and zeros for what it does not touch. Steps in flight have read the old ones before."""
        for i, stage in enumerate(self.stages):
            old, new = tuple(stage.leaves[path] for path in stage.tables), stage.entries(adapter)
            filled = self._program("load_adapter", i)(old, new, stage.place.put(np.asarray(place, np.int32)))
            stage.leaves |= zip(stage.tables, filled)

    def _copy(self, copies: np.ndarray) -> None:
        for at in range(0, len(copies), COPIES):
            pairs = np.full((COPIES, 2), (0, self.dims.num_pages), np.int32)
            part = copies[at : at + COPIES]
            pairs[: len(part)] = part
            for i, stage in enumerate(self.stages):
                stage.caches = self._program("copy", i)(stage.caches, stage.place.put(pairs))


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


def _to_host(values: Any) -> TokenLogprobs | None:
    return None if values is None else TokenLogprobs(*(np.asarray(x) for x in values))


def _describe(key: tuple) -> str:
    match key:
        case ("forward", stage, bucket, adapted):
            return f"decoder{f' {stage}' if stage else ''}, {bucket.num_tokens} tokens{', LoRA' if adapted else ''}"
        case ("sample", rows, variant):
            return f"sampler {variant.name.lower()}, {rows} rows"
        case ("score", rows):
            return f"logprobs, {rows} rows"
        case ("score_prompt", tokens):
            return f"prompt logprobs, {tokens} tokens"
        case ("pool", bucket):
            return f"pooling, {bucket.num_tokens} tokens"
    return key[0]
