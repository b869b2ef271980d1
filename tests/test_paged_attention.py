"""Every kernel backend against the contract of `pallas_kernels.ops`: a dense oracle that has never heard of pages."""

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import SHAPES, Shape, metadata

import pallas_kernels
from pallas_kernels.ops import BACKENDS

TOLERANCES = {
    "float32": dict(atol=1e-5, rtol=1e-5),
    "bfloat16": dict(atol=2e-3, rtol=2**-8),  # rounding the output alone is 2^-9 of it, more than rtol=1e-3
    "float16": dict(atol=2e-3, rtol=1e-3),
}
CASES = [shape for shape in SHAPES if shape.test]
SCALE = 0.3  # about 1 / sqrt(D), but no power of two


class Case:
    """A shape with numbers in it. Per row, `keys` and `values` [kv_len, G, D]; `q` [T, H, D]; all in the shape's dtype."""

    def __init__(self, shape: Shape, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.shape, self.rows, self.meta, self.scale = shape, shape.rows, metadata(shape, rng), SCALE
        normal = lambda *dims: rng.standard_normal(dims).astype(jnp.dtype(shape.dtype))
        self.q = normal(shape.num_tokens, shape.H, shape.D)
        self.keys = [normal(kv_len, shape.G, shape.D) for kv_len, _ in self.rows]
        self.values = [normal(kv_len, shape.G, shape.D) for kv_len, _ in self.rows]
        self.sinks = normal(shape.H) if shape.sinks else None

    @property
    def num_used(self) -> int:
        return sum(n for _, n in self.rows)

    def pages(self, sequences: list[np.ndarray], garbage: float = 0.0) -> np.ndarray:
        """[P, K, G, D]: the rows' tokens where the page table says, `garbage` everywhere else."""
        s = self.shape
        pages = np.full((s.num_pages, s.page_size, s.G, s.D), garbage, jnp.dtype(s.dtype))
        for row, sequence in enumerate(sequences):
            for t, token in enumerate(sequence):
                pages[self.meta.page_table[row, t // s.page_size], t % s.page_size] = token
        return pages

    def run(self, backend: str, garbage: float = 0.0, table: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """out and lse, padding tokens included."""
        meta = self.meta if table is None else self.meta._replace(page_table=table)
        pages = self.pages(self.keys, garbage), self.pages(self.values, garbage)
        out, lse = program(backend, self.scale, self.shape.window, self.shape.soft_cap)(self.q, *pages, *meta, self.sinks)
        assert out.dtype == self.q.dtype and out.shape == self.q.shape
        assert lse.dtype == jnp.float32 and lse.shape == self.q.shape[:2]
        return np.asarray(out), np.asarray(lse)


@functools.cache
def program(backend: str, scale: float, window: int | None, soft_cap: float | None):
    def run(q, k_pages, v_pages, page_table, kv_lens, query_start, counts, sinks):
        return pallas_kernels.paged_attention(
            q, k_pages, v_pages, page_table, kv_lens, query_start, counts,
            scale=scale, window=window, soft_cap=soft_cap, sinks=sinks, implementation=backend,
        )  # fmt: skip

    return jax.jit(run)


def oracle(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The equation of `ops.paged_attention`, query by query and head by head, in float64 on whole sequences."""
    s, out, lse, token = case.shape, [], [], 0
    for (kv_len, num_queries), keys, values in zip(case.rows, case.keys, case.values):
        for x in range(kv_len - num_queries, kv_len):
            seen = np.arange(0 if s.window is None else max(0, x - s.window + 1), x + 1)
            for h in range(s.H):
                g = h // (s.H // s.G)
                score = case.scale * keys[seen, g].astype(np.float64) @ case.q[token, h].astype(np.float64)
                score = score if s.soft_cap is None else s.soft_cap * np.tanh(score / s.soft_cap)
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


each_backend = pytest.mark.parametrize("backend", BACKENDS)
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
    assert_same_rows(case, case.run(backend), case.run(backend, np.nan, table))


# -- any ragged batch ------------------------------------------------------------------------------------------------------

OPTIONS = st.sampled_from([(None, None, False), (5, None, False), (1, None, True), (None, 1.5, True), (9, 2.0, True)])


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


def padded(rows, window=None, soft_cap=None, sinks=False) -> PaddedShape:
    return PaddedShape("padded", 4, 2, 8, 4, rows, window=window, soft_cap=soft_cap, sinks=sinks)


@each_backend
@settings(max_examples=150, deadline=None)
@given(rows=ragged(), options=OPTIONS, seed=st.integers(0, 2**32 - 1))
def test_any_ragged_batch_equals_the_oracle(backend, rows, options, seed):
    assert_right(Case(padded(rows, *options), seed), backend)


@each_backend
def test_scores_beyond_the_range_of_exp(backend):
    case = Case(padded(((30, 1), (7, 1), (25, 20)), sinks=True))
    case.q, case.keys, case.scale = np.round(10 * case.q), [np.round(5 * k) for k in case.keys], 0.25  # exact in float32
    assert oracle(case)[1].max() > 100
    assert_right(case, backend)


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
    write = jax.jit(functools.partial(pallas_kernels.write_kv, implementation=backend), donate_argnums=donate)
    results = write(*map(jnp.array, caches), *tokens, pages, offsets)
    for cache, new, result in zip(caches, tokens, results):
        cache[[3, 3, 5], [0, 1, 3]] = new[:3]
        assert result.dtype == cache.dtype
        assert np.asarray(result).tobytes() == cache.tobytes()


@each_backend
def test_write_kv_in_place_needs_no_second_cache(backend):
    caches, tokens, pages, offsets = written("float32")
    write = jax.jit(functools.partial(pallas_kernels.write_kv, implementation=backend), donate_argnums=(0, 1))
    memory = write.lower(*caches, *tokens, pages, offsets).compile().memory_analysis()
    assert memory.alias_size_in_bytes == sum(cache.nbytes for cache in caches)
    assert memory.temp_size_in_bytes < caches[0].nbytes


@each_backend
def test_write_kv_casts_to_the_caches_dtype(backend):
    caches, tokens, pages, offsets = written("bfloat16")
    wide = [token.astype(np.float32) + 2**-12 for token in tokens]
    results = pallas_kernels.write_kv(
        *map(jnp.array, caches), *map(jnp.array, wide), jnp.array(pages), jnp.array(offsets), backend
    )
    for result, new in zip(results, wide):
        np.testing.assert_array_equal(np.asarray(result)[3, 0], new[0].astype(jnp.bfloat16))


# -- errors ----------------------------------------------------------------------------------------------------------------

BROKEN = [
    (dict(v_pages=(9, 4, 2, 8)), r"k_pages \(10, 4, 2, 8\) and v_pages \(9, 4, 2, 8\) must be alike"),
    (dict(q=(32, 4, 16)), r"head dim of q \(32, 4, 16\) and of k_pages \(10, 4, 2, 8\) must be equal"),
    (dict(q=(32, 5, 8)), "5 query heads must be a multiple of 2 key/value heads"),
    (dict(kv_lens=(7,)), r"kv_lens must be \[8\], is \(7,\)"),
    (dict(query_start=(8,)), r"query_start must be \[9\], is \(8,\)"),
    (dict(counts=(3,)), r"counts must be \[2\], is \(3,\)"),
    (dict(sinks=(2,)), r"sinks must be None or \[4\]"),
    (dict(window=0), "window must be None or >= 1, is 0"),
    (dict(kv_lens=np.zeros(8, np.int16)), "must be int32"),
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


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="kernel backend 'cuda' is unknown; known: auto, .*reference"):
        pallas_kernels.backend("cuda")


def test_a_named_backend_does_not_fall_back_and_auto_does(monkeypatch):
    lazy = types.ModuleType("pallas_kernels.lazy")
    lazy.supported = lambda device: "it is Sunday"
    monkeypatch.setitem(sys.modules, "pallas_kernels.lazy", lazy)
    monkeypatch.setattr(pallas_kernels.ops, "BACKENDS", ("lazy", *BACKENDS))
    assert pallas_kernels.backend("auto").name in BACKENDS
    with pytest.raises(NotImplementedError, match="'lazy': 'it is Sunday'"):
        pallas_kernels.backend("lazy")


def test_the_choice_is_logged(caplog):
    with caplog.at_level("INFO", logger="pallas_kernels.ops"):
        name = pallas_kernels.backend("auto").name
    assert f"kernel backend: {name}" in caplog.text


def test_the_list_of_shapes_is_sound():
    assert len({shape.name for shape in SHAPES}) == len(SHAPES)
    for shape in SHAPES:
        queries = [n for _, n in shape.rows]
        assert shape.H % shape.G == 0 and all(0 < n <= kv_len for kv_len, n in shape.rows)
        assert queries == sorted(queries, key=lambda n: n > 1), f"{shape.name}: decodes come first"
