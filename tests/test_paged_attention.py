"""Every kernel backend against the contract of `pallas_kernels.ops`: a dense oracle that has never heard of pages."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import SHAPES, Metadata, Shape, metadata

import pallas_kernels
from pallas_kernels import checks
from pallas_kernels.checks import QUANTIZED
from pallas_kernels.ops import Ops

TESTED = ("reference", "triton")  # mosaic_gpu's interpreter takes seconds for what takes triton's milliseconds: test_mosaic.py
TOLERANCES = {
    "float32": dict(atol=1e-5, rtol=1e-5),
    "bfloat16": dict(atol=2e-3, rtol=2**-8),  # rounding the output alone is 2^-9 of it, more than rtol=1e-3
    "float16": dict(atol=2e-3, rtol=1e-3),
}
CASES = [shape for shape in SHAPES if shape.test]
SCALE = 0.3  # about 1 / sqrt(D), but no power of two


@functools.cache
def operations(name: str) -> Ops:
    """A backend on the device that the tests run on; Pallas kernels in JAX's interpreters where that is no GPU."""
    on_cpu = jax.devices()[0].platform == "cpu"
    return pallas_kernels.backend(name, interpret=on_cpu and name != "reference")


class Cache(NamedTuple):
    """Keys or values in pages, [P, K, G, D], and the scales of quantised ones, [P, K, G]."""

    pages: np.ndarray
    scales: np.ndarray | None


class Case:
    """A shape with numbers in it. Per row, `keys` and `values` [kv_len, G, D]; `q` [T, H, D]; all in the shape's dtype, or
    whatever a quantised cache makes of them."""

    def __init__(self, shape: Shape, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.shape, self.rows, self.meta, self.scale = shape, shape.rows, metadata(shape, rng), SCALE
        normal = lambda *dims: rng.standard_normal(dims).astype(jnp.dtype(shape.dtype))
        self.q = normal(shape.num_tokens, shape.H, shape.D)
        self.keys = [self.as_cached(normal(kv_len, shape.G, shape.D)) for kv_len, _ in self.rows]
        self.values = [self.as_cached(normal(kv_len, shape.G, shape.D)) for kv_len, _ in self.rows]
        self.sinks = normal(shape.H) if shape.sinks else None
        self.alibi = np.float32(2) ** -np.arange(1, shape.H + 1, dtype=np.float32) if shape.alibi else None

    @property
    def num_used(self) -> int:
        return sum(n for _, n in self.rows)

    def as_cached(self, x: np.ndarray) -> np.ndarray:
        if self.shape.kv_dtype is None:
            return x
        n, scales = quantize(x, self.shape.kv_dtype)
        return n.astype(np.float32) * scales[..., None]

    def cache(self, sequences: list[np.ndarray], garbage: float = 0.0) -> Cache:
        """The rows' tokens where the page table says, but for pages that no query sees; `garbage` everywhere else."""
        s = self.shape
        dtype = jnp.dtype(s.kv_dtype or s.dtype)
        junk = garbage if dtype != jnp.int8 else np.nan_to_num(garbage, posinf=127).clip(-127, 127)
        pages = np.full((s.num_pages, s.page_size, s.G, s.D), junk, dtype)
        scales = np.full(pages.shape[:3], garbage, np.float32) if s.kv_dtype else None
        for row, sequence in enumerate(sequences):
            new, new_scales = quantize(sequence, s.kv_dtype) if s.kv_dtype else (sequence, None)
            kv_len, n = self.rows[row]
            first = first_seen(s, kv_len - n)
            at = np.arange(first // s.page_size * s.page_size, kv_len)
            new, new_scales = new[at], new_scales if new_scales is None else new_scales[at]
            places = self.meta.page_table[row, at // s.page_size], at % s.page_size
            pages[places] = new
            if scales is not None:
                scales[places] = new_scales
        return Cache(pages, scales)

    def run(self, backend: str, garbage: float = 0.0, meta: Metadata | None = None) -> tuple[np.ndarray, np.ndarray]:
        """out and lse, padding tokens included. meta: instead of the case's own, over the same pages."""
        meta = self.meta if meta is None else meta
        checks.look_at_rows(*meta, num_pages=self.shape.num_pages, page_size=self.shape.page_size)  # interpreters clamp
        keys, values = self.cache(self.keys, garbage), self.cache(self.values, garbage)
        run = program(backend, self.scale, self.shape.window, self.shape.chunk, self.shape.soft_cap)
        out, lse = run(self.q, keys, values, *meta, self.sinks, self.alibi)
        assert out.dtype == self.q.dtype and out.shape == self.q.shape
        assert lse.dtype == jnp.float32 and lse.shape == self.q.shape[:2]
        return np.asarray(out), np.asarray(lse)


def first_seen(shape: Shape, x: int) -> int:
    """The first key that a query at position x sees."""
    after_window = 0 if shape.window is None else x - shape.window + 1
    return max(0, after_window, 0 if shape.chunk is None else x // shape.chunk * shape.chunk)


def quantize(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """As `ops.write_kv` says: (numbers [..., D], scales [...])."""
    x = x.astype(np.float32)
    scales = np.abs(x).max(-1) / np.float32(QUANTIZED[dtype])
    n = x / scales[..., None]
    return (np.rint(n) if dtype == "int8" else n).astype(jnp.dtype(dtype)), scales


@functools.cache
def program(backend: str, scale: float, window: int | None, chunk: int | None, soft_cap: float | None):
    def run(q, keys, values, page_table, kv_lens, query_start, counts, sinks, alibi):
        return pallas_kernels.paged_attention(
            q, keys.pages, values.pages, page_table, kv_lens, query_start, counts, scale=scale, window=window,
            chunk=chunk, soft_cap=soft_cap, sinks=sinks, alibi=alibi, k_scales=keys.scales, v_scales=values.scales,
            implementation=operations(backend),
        )  # fmt: skip

    return jax.jit(run)


def oracle(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The equation of `ops.paged_attention`, query by query and head by head, in float64 on whole sequences."""
    s, out, lse, token = case.shape, [], [], 0
    for (kv_len, num_queries), keys, values in zip(case.rows, case.keys, case.values):
        for x in range(kv_len - num_queries, kv_len):
            seen = np.arange(first_seen(s, x), x + 1)
            for h in range(s.H):
                g = h // (s.H // s.G)
                score = case.scale * keys[seen, g].astype(np.float64) @ case.q[token, h].astype(np.float64)
                score = score if s.soft_cap is None else s.soft_cap * np.tanh(score / s.soft_cap)
                score = score if case.alibi is None else score + float(case.alibi[h]) * (seen - x)
                highest = score.max()
                weights, sink = np.exp(score - highest), np.exp(float(case.sinks[h]) - highest) if s.sinks else 0.0
                out.append(weights @ values[seen, g].astype(np.float64) / (weights.sum() + sink))
                lse.append(highest + np.log(weights.sum() + sink))
            token += 1
    return np.reshape(out, (token, s.H, s.D)), np.reshape(lse, (token, s.H))


def assert_right(case: Case, backend: str) -> None:
    (out, lse), (right_out, right_lse), n = case.run(backend), oracle(case), case.num_used
    np.testing.assert_allclose(out[:n].astype(np.float64), right_out, **TOLERANCES[case.shape.dtype])
    np.testing.assert_allclose(lse[:n], right_lse, **TOLERANCES["float32"])  # lse is float32 whatever q is
    assert np.isfinite(out[n:].astype(np.float32)).all() and np.isfinite(lse[n:]).all()


def assert_same_rows(case: Case, expected, found) -> None:
    """out and lse: bit by bit the same where tokens have a row, finite everywhere."""
    for x, y in zip(expected, found):
        assert np.isfinite(y.astype(np.float32)).all()
        np.testing.assert_array_equal(x[: case.num_used], y[: case.num_used])


each_backend = pytest.mark.parametrize("backend", TESTED)
each_case = pytest.mark.parametrize("shape", CASES, ids=lambda shape: shape.name)


@each_backend
@each_case
def test_equals_the_dense_oracle(backend, shape):
    assert_right(Case(shape), backend)


@each_backend
@each_case
def test_what_no_row_owns_changes_nothing(backend, shape):
    """Pages of nobody, the null page and what lies past a sequence's end may hold anything: other requests were there,
    perhaps one that ended because it had become NaN."""
    case = Case(shape, 1)
    clean = case.run(backend)
    for garbage in (6e4, np.inf, np.nan):
        assert_same_rows(case, clean, case.run(backend, garbage))


@each_backend
@each_case
def test_unused_entries_of_the_page_table_are_not_read(backend, shape):
    """The engine leaves the page ids of a slot's past in them."""
    case = Case(shape, 2)
    table = case.meta.page_table.copy()
    unused = np.arange(table.shape[1]) >= -(-case.meta.kv_lens // shape.page_size)[:, None]
    table[unused] = np.random.default_rng(3).integers(0, shape.num_pages, unused.sum())
    assert_same_rows(case, case.run(backend), case.run(backend, np.nan, case.meta._replace(page_table=table)))


# -- any ragged batch ------------------------------------------------------------------------------------------------------

OPTIONS = st.sampled_from([
    {}, dict(window=5), dict(window=1, sinks=True), dict(soft_cap=1.5, sinks=True, H=6), dict(alibi=True, H=2, kv_dtype="int8"),
    dict(window=9, soft_cap=2.0, sinks=True, alibi=True, H=16), dict(chunk=6), dict(chunk=8, window=5, sinks=True),
])  # fmt: skip


@st.composite
def ragged(draw) -> tuple[tuple[int, int], ...]:
    """Decodes, then chunks, with at most 32 queries in 8 rows."""
    decodes = draw(st.lists(st.integers(1, 30), max_size=6))
    chunks = []
    while len(decodes) + len(chunks) < 8 and (left := 32 - len(decodes) - sum(n for _, n in chunks)) > 1:
        n = draw(st.integers(1, min(left, 20)))
        if n == 1:  # enough
            break
        chunks.append((n + draw(st.integers(0, 30 - n)), n))
    return (*((kv_len, 1) for kv_len in decodes), *chunks)


class PaddedShape(Shape):
    """Fixed sizes, whatever the rows: few programs."""

    num_tokens, num_rows, pages_a_row, num_pages = 32, 8, 8, 65


def padded(rows, H: int = 4, **options) -> PaddedShape:
    return PaddedShape("padded", H, 2, 8, 4, rows, **options)


@each_backend
@settings(max_examples=150, deadline=None)
@given(rows=ragged(), options=OPTIONS, seed=st.integers(0, 2**32 - 1))
def test_any_ragged_batch_equals_the_oracle(backend, rows, options, seed):
    assert_right(Case(padded(rows, **options), seed), backend)


@each_backend
def test_scores_beyond_the_range_of_exp(backend):
    case = Case(padded(((30, 1), (7, 1), (25, 20)), sinks=True))
    case.q, case.keys, case.scale = np.round(10 * case.q), [np.round(5 * k) for k in case.keys], 0.25  # exact in float32
    assert oracle(case)[1].max() > 100
    assert_right(case, backend)


@each_backend
@each_case
def test_a_row_does_not_depend_on_its_neighbours(backend, shape):
    """Bit by bit, in a batch of the same size: what a request gets is the same whoever else is served."""
    case = Case(shape, 4)
    out, lse = case.run(backend)
    q, starts = case.q, case.meta.query_start
    for row in {0, len(shape.rows) - 1}:
        first, stop = starts[row], starts[row + 1]
        case.q = np.roll(q, -first, 0)
        found_out, found_lse = case.run(backend, meta=alone(case.meta, row))
        np.testing.assert_array_equal(found_out[: stop - first], out[first:stop])
        np.testing.assert_array_equal(found_lse[: stop - first], lse[first:stop])


def alone(meta: Metadata, row: int) -> Metadata:
    """The same batch with one row only: the first."""
    table, lens, n = meta.page_table.copy(), np.zeros_like(meta.kv_lens), np.diff(meta.query_start)[row]
    table[0], lens[0] = meta.page_table[row], meta.kv_lens[row]
    starts = np.full_like(meta.query_start, n)
    starts[0] = 0
    return Metadata(table, lens, starts, np.array([n == 1, 1], np.int32))


@each_backend
def test_a_batch_without_rows_is_finite(backend):
    for x in Case(padded(())).run(backend, np.nan):
        assert np.isfinite(x).all()


# -- write_kv --------------------------------------------------------------------------------------------------------------


def written(dtype: str, seed: int = 0):
    """Caches, tokens and places: the first places of page 3, the last one of the last page, and two that do not exist."""
    rng = np.random.default_rng(seed)
    normal = lambda *dims: rng.standard_normal(dims).astype(jnp.dtype(dtype))
    caches, tokens = (normal(6, 4, 2, 8), normal(6, 4, 2, 8)), (normal(5, 2, 8), normal(5, 2, 8))
    return caches, tokens, np.array([3, 3, 5, 6, 1000], np.int32), np.array([0, 1, 3, 0, 2], np.int32)


@each_backend
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("donate", [(), (0, 1)], ids=["copied", "donated"])
def test_write_kv_writes_the_named_places_and_no_other(backend, dtype, donate):
    caches, tokens, pages, offsets = written(dtype)
    write = jax.jit(functools.partial(pallas_kernels.write_kv, implementation=operations(backend)), donate_argnums=donate)
    results = write(*map(jnp.array, caches), *tokens, pages, offsets)
    for cache, new, result in zip(caches, tokens, results):
        cache[[3, 3, 5], [0, 1, 3]] = new[:3]
        assert result.dtype == cache.dtype
        assert np.asarray(result).tobytes() == cache.tobytes()


def test_write_kv_in_place_needs_no_second_cache():
    """Of the GPU's backends, test_kernels_compile.py says the same."""
    caches, tokens, pages, offsets = written("float32")
    write = jax.jit(functools.partial(pallas_kernels.write_kv, implementation="reference"), donate_argnums=(0, 1))
    memory = write.lower(*caches, *tokens, pages, offsets).compile().memory_analysis()
    assert memory.alias_size_in_bytes == sum(cache.nbytes for cache in caches)
    assert memory.temp_size_in_bytes < caches[0].nbytes


@each_backend
def test_write_kv_casts_to_the_caches_dtype(backend):
    caches, tokens, pages, offsets = written("bfloat16")
    wide = [token.astype(np.float32) + 2**-12 for token in tokens]
    results = pallas_kernels.write_kv(
        *map(jnp.array, caches), *map(jnp.array, wide), jnp.array(pages), jnp.array(offsets), implementation=operations(backend)
    )
    for result, new in zip(results, wide):
        np.testing.assert_array_equal(np.asarray(result)[3, 0], new[0].astype(jnp.bfloat16))


@each_backend
@pytest.mark.parametrize("kv_dtype", QUANTIZED)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_write_kv_quantises_each_token_and_head(backend, kv_dtype, dtype):
    _, tokens, pages, offsets = written(dtype)
    tokens[0][0, 1] = 0  # nothing to scale by
    caches = [np.ones((6, 4, 2, 8), jnp.dtype(kv_dtype))] * 2 + [np.full((6, 4, 2), 7, np.float32)] * 2
    write = jax.jit(functools.partial(pallas_kernels.write_kv, implementation=operations(backend)))
    k_pages, v_pages, k_scales, v_scales = map(
        np.asarray, write(*caches[:2], *tokens, pages, offsets, k_scales=caches[2], v_scales=caches[3])
    )
    kept = np.ones((6, 4), bool)
    kept[[3, 3, 5], [0, 1, 3]] = False
    for new, numbers, scales in zip(tokens, (k_pages, v_pages), (k_scales, v_scales)):
        assert numbers.dtype == jnp.dtype(kv_dtype) and scales.dtype == np.float32
        assert (numbers[kept].astype(np.float32) == 1).all() and (scales[kept] == 7).all()
        right = new[:3].astype(np.float32)
        largest = np.abs(right).max(-1, keepdims=True)
        error = np.abs(numbers[~kept].astype(np.float32) * scales[~kept][..., None] - right)
        # int8: half a step, of 127 up to the largest; float8: half of the last of 3 bits, or of the smallest number.
        bound = 0.5 / 127 * largest if kv_dtype == "int8" else np.maximum(2**-4 * np.abs(right), 2**-10 / 448 * largest)
        assert (error <= 1.01 * bound).all()
        assert (np.abs(numbers[~kept].astype(np.float32)).max(-1)[largest[..., 0] > 0] == QUANTIZED[kv_dtype]).all()


@each_backend
def test_write_kv_rounds_ties_to_the_even_number(backend):
    new = np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5], np.float32).reshape(1, 1, 8)  # a scale of 1
    pages, scales, zero = np.zeros((2, 4, 1, 8), np.int8), np.zeros((2, 4, 1), np.float32), np.zeros(1, np.int32)
    write = jax.jit(functools.partial(pallas_kernels.write_kv, implementation=operations(backend)))
    found, *_ = write(pages, pages, new, new, zero, zero, k_scales=scales, v_scales=scales)
    assert np.asarray(found)[0, 0, 0].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


# -- errors ----------------------------------------------------------------------------------------------------------------

INT8 = dict.fromkeys(("k_pages", "v_pages"), np.zeros((10, 4, 2, 8), np.int8))
BROKEN = [
    (dict(v_pages=(9, 4, 2, 8)), r"k_pages \(10, 4, 2, 8\) and v_pages \(9, 4, 2, 8\) must be alike"),
    (dict(q=(32, 4, 16)), r"head dim of q \(32, 4, 16\) and of k_pages \(10, 4, 2, 8\) must be equal"),
    (dict(q=(32, 5, 8)), "5 query heads must be a multiple of 2 key/value heads"),
    (dict(kv_lens=(7,)), r"kv_lens must be \[8\], is \(7,\)"),
    (dict(query_start=(8,)), r"query_start must be \[9\], is \(8,\)"),
    (dict(counts=(3,)), r"counts must be \[2\], is \(3,\)"),
    (dict(sinks=(2,)), r"sinks must be None or \[4\]"),
    (dict(window=0), "window must be None or >= 1, is 0"),
    (dict(chunk=0), "chunk must be None or >= 1, is 0"),
    (dict(kv_lens=np.zeros(8, np.int16)), "must be int32"),
    (dict(alibi=(2,)), r"alibi must be None or \[4\]"),
    (dict(soft_cap=0.0), "soft_cap must be None or > 0, is 0.0"),
    (dict(q=(32, 8)), r"q must be \[T, H, D\].*\(32, 8\)"),
    (dict(k_scales=(10, 4, 2), v_scales=(10, 4, 2)), "scales are for caches of int8, float8_e4m3fn, not of float32"),
    (INT8, "a cache of int8 needs k_scales and v_scales"),
    (INT8 | dict(k_scales=(10, 4, 2)), r"must both be float32 \(10, 4, 2\)"),
    (INT8 | dict(k_scales=(10, 4, 2), v_scales=(10, 4)), r"must both be float32 \(10, 4, 2\)"),
]


def call(**changes):
    ints = {"page_table": (8, 8), "kv_lens": (8,), "query_start": (9,), "counts": (2,)}
    shapes = {"q": (32, 4, 8), "k_pages": (10, 4, 2, 8), "v_pages": (10, 4, 2, 8), **ints}
    arguments = {
        name: jnp.zeros(value, jnp.int32 if name in ints else jnp.float32) if isinstance(value, tuple) else value
        for name, value in {**shapes, **changes}.items()
    }
    return pallas_kernels.paged_attention(**arguments, scale=1.0)


@pytest.mark.parametrize("changes, message", BROKEN, ids=[message for _, message in BROKEN])
def test_arguments_that_do_not_fit_are_named_with_their_shapes(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_everything_wrong_is_told_at_once():
    with pytest.raises(ValueError, match="kv_lens must be .*; counts must be .*; window must be"):
        call(kv_lens=(7,), counts=(3,), window=0)


def test_write_kv_names_shapes_that_do_not_fit():
    (k_pages, v_pages), (k, v), pages, offsets = written("float32")
    with pytest.raises(ValueError, match=r"v \(5, 2, 8\), 4 places do not fit \(6, 4, 2, 8\)"):
        pallas_kernels.write_kv(k_pages, v_pages, k, v, pages[:4], offsets[:4])
    with pytest.raises(ValueError, match=r"k \(5, 1, 8\)"):
        pallas_kernels.write_kv(k_pages, v_pages, k[:, :1], v, pages, offsets)


def test_the_list_of_shapes_is_sound():
    assert len({shape.name for shape in SHAPES}) == len(SHAPES)
    for shape in SHAPES:
        queries = [n for _, n in shape.rows]
        assert shape.H % shape.G == 0 and all(0 < n <= kv_len for kv_len, n in shape.rows)
        assert queries == sorted(queries, key=lambda n: n > 1), f"{shape.name}: decodes come first"
