"""Cases of the kernel benchmark: arguments with random numbers, the work they need, and what is right.

Pure functions of shapes; nothing here looks at a device or at a clock. `attention_specs` gives what `attention_arguments`
gives without its numbers, for compiling. Dims as in `pallas_kernels.ops`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels import reference
from pallas_kernels.reference import cache, matmul

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from shapes import EXPERTS, SAMPLES, SHAPES, WEIGHTS, Metadata, Shape, metadata

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of an operation: in order, and by name
DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "fp8": "float8_e4m3fn", "int8": "int8"}


class Work(NamedTuple):
    """What a call cannot do without: bytes with each input read once and each output written once, and operations."""

    bytes: int
    flops: int


class Limits(NamedTuple):
    """A result is wrong where |found - right| > absolute + of_vector * (the largest |right| of the vector, along the last
    axis), or ‖found - right‖ > relative * ‖right‖.

    The norm finds what the largest error cannot: of 128k tokens a page left out changes every output, each by little."""

    absolute: float
    of_vector: float = 0.0
    relative: float = float("inf")


class Target(NamedTuple):
    """A bar to reach. kind: "copy" (share of the copy bandwidth), "flops" (FLOP/s), "rival" (time as a multiple of that
    rival's) or "parts" (of the sum of other cases' times). bar: a number, or one a backend."""

    kind: str
    bar: float | dict[str, float]
    aim: float | None = None
    of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One call of an operation of `pallas_kernels.Ops`."""

    name: str
    operation: str
    make: Callable[[np.random.Generator], Arguments]  # fresh numbers each time
    oracle: Callable[[Arguments], dict[str, Array]]  # what is right, in float32
    results: Callable[[Any, Arguments], dict[str, Array]]  # a call's result -> what is to be compared with it
    limits: dict[str, Limits]
    work: Work
    options: dict[str, Any] = field(default_factory=dict)  # static arguments
    target: Target | None = None
    shape: Shape | None = None  # of attention
    kv_dtype: str | None = None  # of a quantised cache
    group: str = ""  # cases of one group are measured side by side
    without: tuple[str, ...] = ()  # backends that are not measured
    num_caches: int = 0  # so many of the first arguments, and all named ones, are donated and come back


# -- attention -------------------------------------------------------------------------------------------------------------

LIMITS = {
    "float32": Limits(1e-5, 1e-5, 1e-5),
    # Roundings of 2^-9 each: of the softmax's weights, as tensor cores take them, with a scale perhaps, and of the output.
    "bfloat16": Limits(2e-3, 2**-7, 5e-3),
    "float16": Limits(2e-3, 2**-10, 2e-3),
}


def attention_options(shape: Shape) -> dict[str, Any]:
    """Static arguments of the call."""
    return {"scale": shape.D**-0.5, "window": shape.window, "soft_cap": shape.soft_cap}


def attention_specs(shape: Shape, kv_dtype: str | None = None, pad_to: int = 0) -> Arguments:
    """ShapeDtypeStructs of a call's arrays. kv_dtype: of the cache (None: the shape's); pad_to: tokens and rows of the
    batch, where more than the shape's buckets. Named ones: k_scales, v_scales, sinks, alibi, where there are any."""
    kv_dtype = kv_dtype or shape.kv_dtype
    T, R = max(shape.num_tokens, pad_to), max(shape.num_rows, pad_to)
    int32 = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.int32)
    kv = jax.ShapeDtypeStruct((shape.num_pages, shape.page_size, shape.G, shape.D), jnp.dtype(kv_dtype or shape.dtype))
    named: dict[str, Any] = {}
    if kv_dtype in ("int8", "float8_e4m3fn"):
        named["k_scales"] = named["v_scales"] = jax.ShapeDtypeStruct(kv.shape[:3], jnp.float32)
    if shape.sinks:
        named["sinks"] = jax.ShapeDtypeStruct((shape.H,), jnp.dtype(shape.dtype))
    if shape.alibi:
        named["alibi"] = jax.ShapeDtypeStruct((shape.H,), jnp.float32)
    q = jax.ShapeDtypeStruct((T, shape.H, shape.D), jnp.dtype(shape.dtype))
    return (q, kv, kv, int32(R, shape.pages_a_row), int32(R), int32(R + 1), int32(2)), named


def attention_arguments(shape: Shape, rng: np.random.Generator, kv_dtype: str | None = None, pad_to: int = 0) -> Arguments:
    """The same with numbers: normal queries, keys and values (logits of standard deviation 1), pages in random order."""
    (q, kv, *_), specs = attention_specs(shape, kv_dtype, pad_to)
    keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), 4)
    cached = [_normal(key, kv.shape, jnp.float32 if "k_scales" in specs else kv.dtype) for key in keys[:2]]
    named: dict[str, Any] = {}
    if "k_scales" in specs:
        quantized = [_quantize(x, kv.dtype) for x in cached]
        cached, (named["k_scales"], named["v_scales"]) = [x for x, _ in quantized], [scales for _, scales in quantized]
    if shape.sinks:
        named["sinks"] = _normal(keys[3], (shape.H,), q.dtype)
    if shape.alibi:
        named["alibi"] = jnp.float32(2) ** -jnp.arange(1, shape.H + 1, dtype=jnp.float32)
    meta = jax.device_put(_padded(metadata(shape, rng), max(shape.num_rows, pad_to)))
    return (_normal(keys[2], q.shape, q.dtype), *cached, *meta), named


@partial(jax.jit, static_argnums=(1, 2))
def _normal(key: Array, dims: tuple[int, ...], dtype: Any) -> Array:
    return jax.random.normal(key, dims, jnp.float32).astype(dtype)


_quantize = jax.jit(cache.quantize, static_argnums=1)


def _padded(meta: Metadata, rows: int) -> Metadata:
    more = rows - len(meta.kv_lens)
    pad = lambda x, mode: np.pad(x, [(0, more), *[(0, 0)] * (x.ndim - 1)], mode)
    return Metadata(pad(meta.page_table, "constant"), pad(meta.kv_lens, "constant"), pad(meta.query_start, "edge"), meta.counts)


def attention_work(shape: Shape, kv_dtype: str | None = None) -> Work:
    """Keys and values that some query of a row sees, read once; of the page table, the entries of those pages."""
    seen = pairs = pages = 0
    for kv_len, n in shape.rows:
        first = max(0, kv_len - n + 1 - shape.window) if shape.window else 0
        seen += kv_len - first
        pages += -(-kv_len // shape.page_size) - first // shape.page_size
        ends = np.arange(kv_len - n + 1, kv_len + 1)  # keys up to each query
        pairs += int(np.minimum(ends, shape.window or kv_len).sum())
    kv_dtype = kv_dtype or shape.kv_dtype
    scale = 4 if kv_dtype in ("int8", "float8_e4m3fn") else 0
    a_token = 2 * shape.G * (shape.D * jnp.dtype(kv_dtype or shape.dtype).itemsize + scale)
    queries = sum(n for _, n in shape.rows)
    q_and_out, lse = 2 * queries * shape.H * shape.D * jnp.dtype(shape.dtype).itemsize, 4 * queries * shape.H
    return Work(seen * a_token + q_and_out + lse + 4 * (pages + 2 * len(shape.rows)), 4 * pairs * shape.H * shape.D)


def attention(name: str, shape: Shape, kv: str = "", pad_to: int = 0, **fields: Any) -> Case:
    kv_dtype = DTYPES[kv] if kv else shape.kv_dtype
    used, options = sum(n for _, n in shape.rows), attention_options(shape)

    def oracle(arguments: Arguments) -> dict[str, Array]:
        (q, *rest), named = arguments
        named = {k: v.astype(jnp.float32) if k == "sinks" else v for k, v in named.items()}
        return results(reference.paged_attention(q.astype(jnp.float32), *rest, **options, **named), arguments)

    def results(found: Any, arguments: Arguments) -> dict[str, Array]:
        """Of the tokens that rows have. Rivals give no lse."""
        found = found if isinstance(found, tuple) else (found,)
        return {name: x[:used].astype(jnp.float32) for name, x in zip(("out", "lse"), found)}

    make = lambda rng: attention_arguments(shape, rng, kv_dtype, pad_to)
    limits = {"out": LIMITS[shape.dtype], "lse": Limits(1e-4)}
    return Case(name, "paged_attention", make, oracle, results, limits, attention_work(shape, kv_dtype), options, shape=shape,
                kv_dtype=kv_dtype, **fields)  # fmt: skip


# -- the other operations --------------------------------------------------------------------------------------------------


def sampling(name: str, R: int, V: int, top_k: int = 0, top_p: float = 1.0) -> Case:
    """Rows as language models give them: a few words stand out of a broad tail."""

    def make(rng: np.random.Generator) -> Arguments:
        tail = rng.standard_normal((R, V), np.float32) * 2
        tail[:, :: max(1, V // 200)] += rng.exponential(4, tail[:, :: max(1, V // 200)].shape).astype(np.float32)
        full = lambda value, dtype: np.full(R, value, dtype)
        bits = rng.integers(0, 2**32, (R, 2), dtype=np.uint32)
        rows = full(0.8, np.float32), full(top_k, np.int32), full(top_p, np.float32), full(0, np.float32), bits
        return jax.device_put((tail, *rows)), {}

    def results(found: Array, arguments: Arguments) -> dict[str, Array]:
        """1 a row that got the reference's id. Where exp differs by a bit, so may the word at the edge of a set: a
        sixteenth of the rows may differ."""
        return {"same id": (found == jax.jit(reference.sample)(*arguments[0])).astype(jnp.float32)}

    oracle = lambda arguments: {"same id": jnp.ones(R, jnp.float32)}
    return Case(name, "sample", make, oracle, results, {"same id": Limits(1, relative=0.25)}, Work(4 * R * V + 28 * R, 0))


def grouped(name: str, T: int, E: int, F: int, X: int) -> Case:
    """Sizes of groups as routers make them: some experts get many tokens, some few or none."""
    fixed = np.random.default_rng(11)
    group_sizes = fixed.multinomial(T, fixed.dirichlet(np.full(X, 2.0))).astype(np.int32)

    def make(rng: np.random.Generator) -> Arguments:
        keys = jax.random.split(jax.random.key(int(rng.integers(2**31))))
        w = _normal(keys[1], (X, F, E), jnp.bfloat16) * jnp.bfloat16(E**-0.5)
        return (_normal(keys[0], (T, E), jnp.bfloat16), w, jax.device_put(rng.permutation(group_sizes))), {}

    def oracle(arguments: Arguments) -> dict[str, Array]:
        """Group by group, each a product with all other rows 0: slow, small, and nothing to get wrong."""
        (x, w, sizes), _ = arguments
        group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(T), side="right")

        def add(i: Array, out: Array) -> Array:
            rows = jnp.where((group == i)[:, None], x, 0).astype(jnp.float32)
            return out + rows @ w[i].T.astype(jnp.float32)

        return {"out": jax.lax.fori_loop(0, X, add, jnp.zeros((T, F), jnp.float32))}

    touched = int(np.count_nonzero(group_sizes))
    work = Work(2 * (T * E + touched * E * F + T * F) + 4 * X, 2 * T * E * F)
    return Case(name, "grouped_matmul", make, oracle, _as_float, _PRODUCT, work)


def quantized(name: str, T: int, E: int, F: int, bits: int, size: int = 128) -> Case:
    """Weights of `bits` bits, `size` inputs to a scale."""

    def make(rng: np.random.Generator) -> Arguments:
        keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), 3)
        dtype, columns = (jnp.int8, E) if bits == 8 else (jnp.uint8, E // 2)
        w = jax.lax.bitcast_convert_type(jax.random.bits(keys[1], (F, columns), jnp.uint8), dtype)
        scales = jax.random.uniform(keys[2], (F, E // size), jnp.float32, 0.5, 1.5) * (E**-0.5 * 2.0 ** (1 - bits))
        return (_normal(keys[0], (T, E), jnp.bfloat16), w, scales.astype(jnp.bfloat16)), {}

    def oracle(arguments: Arguments) -> dict[str, Array]:
        (x, *weights), _ = arguments
        return {"out": x.astype(jnp.float32) @ matmul.dequantize(*weights, None).T}

    work = Work(2 * (T * E + T * F) + E * F * bits // 8 + 2 * F * E // size, 2 * T * E * F)
    return Case(name, "quantized_matmul", make, oracle, _as_float, _PRODUCT, work)


_PRODUCT = {"out": Limits(1e-2, 2**-9, 5e-3)}


def _as_float(found: Array, arguments: Arguments) -> dict[str, Array]:
    return {"out": found.astype(jnp.float32)}


def writing(name: str, T: int, G: int, D: int, kv: str, P: int, K: int = 32) -> Case:
    """T tokens to random places of a cache of P pages."""
    dtype, is_quantized = jnp.dtype(DTYPES[kv]), kv in ("fp8", "int8")

    def make(rng: np.random.Generator) -> Arguments:
        keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), 4)
        caches = [_normal(key, (P, K, G, D), jnp.float32 if is_quantized else dtype) for key in keys[:2]]
        named: dict[str, Any] = {}
        if is_quantized:
            (k, named["k_scales"]), (v, named["v_scales"]) = (_quantize(x, dtype) for x in caches)
            caches = [k, v]
        places = rng.choice(P * K, T, replace=False).astype(np.int32)
        new = (_normal(key, (T, G, D), jnp.bfloat16) for key in keys[2:])
        return (*caches, *new, *jax.device_put((places // K, places % K))), named

    def oracle(arguments: Arguments) -> dict[str, Array]:
        positional, named = arguments
        return results(reference.write_kv(*positional, **named), arguments)

    def results(found: tuple[Array, ...], arguments: Arguments) -> dict[str, Array]:
        """The whole caches, not only what was written: nothing else may have changed."""
        k, v, *scales = (x.astype(jnp.float32) for x in found)
        return {"k": k * scales[0][..., None], "v": v * scales[1][..., None]} if scales else {"k": k, "v": v}

    a_token = 2 * G * D * (2 + dtype.itemsize) + (8 * G if is_quantized else 0) + 8
    # A quantised number may fall to the other side of a rounding: one step of a few is no error, of many it is.
    limits = {name: Limits(0.5, relative=1e-3) if is_quantized else Limits(0) for name in ("k", "v")}
    return Case(name, "write_kv", make, oracle, results, limits, Work(T * a_token, 0), num_caches=2)


# -- the lists -------------------------------------------------------------------------------------------------------------

_LLAMA = dict(H=32, G=8, D=128, dtype="bfloat16")
_DECODES = Shape("64 decodes at 4k", page_size=32, rows=((4096, 1),) * 64, **_LLAMA)
_RAGGED = Shape("256 ragged decodes", page_size=32, **_LLAMA,
                rows=tuple((int(n), 1) for n in np.random.default_rng(7).integers(128, 513, 256)))  # fmt: skip
COPY, COPY_FP8 = Target("copy", 0.70, 0.90), Target("copy", 0.60, 0.85)


def issue_cases() -> list[Case]:
    """Those with a bar, and the padded batch. Heads of Llama-3-8B; pages of 32 where a name says nothing else."""
    decode, chunk, group = "decode 64 x 4k", "chunk of 2k", "64 x 4k"
    small = _DECODES._replace(page_size=16)
    mixed = _DECODES._replace(rows=(*_DECODES.rows, (2048, 2048)))
    long = _DECODES._replace(rows=((131072, 1),))
    return [
        attention(decode, _DECODES, target=COPY, group=group),
        attention(f"{decode} in a batch of 256 rows", _DECODES, pad_to=256, target=Target("parts", 1.03, None, (decode,)),
                  group=group),
        attention(chunk, _DECODES._replace(rows=((2048, 2048),)), group=group),
        attention(f"mixed: {decode} and a {chunk}", mixed, target=Target("parts", 1.15, 1.05, (decode, chunk)), group=group),
        attention(f"{decode}, pages of 16", small, target=COPY),
        attention(f"{decode}, fp8 cache", _DECODES, "fp8", target=COPY_FP8),
        attention(f"{decode}, fp8 cache, pages of 16", small, "fp8", target=COPY_FP8),
        attention(f"{decode}, int8 cache", _DECODES, "int8"),
        attention("decode 1 x 128k", long, target=Target("copy", 0.60, 0.85)),
        attention("decode 256 x 128..512", _RAGGED, target=Target("rival", 1.2, 1.0, ("FlashInfer",))),
        attention("prefill 8k", _DECODES._replace(rows=((8192, 8192),)),
                  target=Target("flops", {"triton": 350e12, "mosaic_gpu": 450e12}, 600e12)),
    ]  # fmt: skip


def helper_cases() -> list[Case]:
    """Operations around attention, in the sizes of Llama-3-8B and, for experts, of Qwen3-30B-A3B."""
    R, V = SAMPLES[1]
    return [
        sampling(f"sample {R} x {V}", R, V),
        sampling(f"sample {R} x {V}, top-k 50, top-p 0.95", R, V, 50, 0.95),
        sampling(f"sample {R} x {V}, top-p 0.95", R, V, 0, 0.95),
        *(grouped(f"experts, {x.T // 8} tokens x 8", *x[1:]) for x in EXPERTS if x.name == "up" and x.T > 64),
        *(quantized(f"int{w.bits} weights, {w.T} tokens", w.T, w.E, w.F, w.bits, w.size)
          for w in WEIGHTS if w.F == 14336 and w.T >= 64),
        *(writing(f"write {T} tokens, {kv} cache", T, 8, 128, kv, 2048) for kv in ("bf16", "fp8") for T in (64, 2048)),
    ]  # fmt: skip


def model_cases() -> list[Case]:
    """Without the reference, which is no rival on a GPU and takes long to compile."""
    return [attention(shape.name, shape, without=("reference",)) for shape in SHAPES if not shape.test]


def full_cases() -> list[Case]:
    """The order is that of importance: a run may end before the list does."""
    return [*issue_cases(), *helper_cases(), *model_cases()]


def quick_cases() -> list[Case]:
    helpers = helper_cases()
    return [*issue_cases(), helpers[1], helpers[3], helpers[5], helpers[9]]


def check_cases() -> list[Case]:
    """Every test shape, with quantised caches where heads are real ones, and small helpers: to be checked, not timed."""
    mixed = next(shape for shape in SHAPES if shape.name == "bfloat16")
    real = [Shape(f"heads of Llama-3-8B, {dtype}", 32, 8, 128, 32, ((700, 1), (33, 1), (90, 90), (600, 130)), dtype=dtype)
            for dtype in ("bfloat16", "float16")]  # fmt: skip
    cases = [attention(shape.name, shape) for shape in (*(s for s in SHAPES if s.test), *real)]
    cases += [attention(f"{shape.name}, {kv} cache", shape, kv) for shape in (mixed, real[0]) for kv in ("fp8", "int8")]
    return [*cases, *_small_helpers(V=5000)]


def tiny_cases() -> list[Case]:
    """What an interpreter on a CPU does in seconds: one case of each kind."""
    heads = dict(H=4, G=2, D=16, page_size=8, dtype="bfloat16")
    decodes = Shape("tiny", rows=((9, 1), (32, 1)), **heads)
    mixed = decodes._replace(rows=(*decodes.rows, (12, 12)))
    parts = ("tiny decodes", "tiny prompt")
    return [
        attention(parts[0], decodes, target=COPY, group="tiny"),
        attention("tiny padded decodes", decodes, pad_to=8, target=Target("parts", 1.03, None, parts[:1]), group="tiny"),
        attention(parts[1], decodes._replace(rows=((12, 12),)), target=Target("flops", {"triton": 1e12}), group="tiny"),
        attention("tiny mixed", mixed, target=Target("parts", 1.15, 1.05, parts), group="tiny"),
        attention("tiny decodes of one length", decodes._replace(rows=((24, 1),) * 2),
                  target=Target("rival", 1.2, 1.0, ("FlashInfer",))),
        attention("tiny prompt, window", decodes._replace(rows=((20, 20),), window=5)),
        *(attention(f"tiny mixed, {kv} cache", mixed, kv) for kv in ("fp8", "int8")),
        *_small_helpers(V=300),
    ]  # fmt: skip


def _small_helpers(V: int) -> list[Case]:
    return [
        sampling("small sample", 4, V),
        sampling("small sample, top-k 50, top-p 0.95", 4, V, 50, 0.95),
        grouped("small experts", 40, 128, 64, 4),
        *(quantized(f"small int{bits} weights", 16, 256, 128, bits) for bits in (8, 4)),
        *(writing(f"small write, {kv} cache", 5, 2, 16, kv, 6, 8) for kv in ("bf16", "fp8", "int8")),
    ]
