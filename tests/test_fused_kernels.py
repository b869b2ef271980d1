"""Sampling, grouped and quantised products of every backend against numpy in float64: Pallas kernels in the interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels

BACKENDS = ["reference", "triton"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@functools.cache
def program(operation: str, backend: str):
    """The public function, jitted: one program a shape."""
    ops = pallas_kernels.backend(backend, interpret=True)
    return jax.jit(functools.partial(getattr(pallas_kernels, operation), implementation=ops))


# -- sampling --------------------------------------------------------------------------------------------------------------

OFF = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
DTYPES = dict(temperature=np.float32, top_k=np.int32, top_p=np.float32, min_p=np.float32)
R, V = 48, 37  # of most tests: one program
EDGE = 1e-5  # an oracle's decision that is this close may fall either way


def sample(backend: str, logits: np.ndarray, bits: np.ndarray, **changes) -> np.ndarray:
    """changes: one value, or one for each row."""
    fill = lambda name: np.broadcast_to(np.asarray({**OFF, **changes}[name], DTYPES[name]), len(logits)).copy()
    ids = program("sample", backend)(logits.astype(np.float32), *map(fill, OFF), bits.astype(np.uint32))
    assert ids.dtype == jnp.int32 and ids.shape == (len(logits),)
    return np.asarray(ids)


def places(count: int) -> np.ndarray:
    """Bits of `count` places that lie evenly in [0, 1)."""
    return np.stack([(np.arange(count) + 0.5) / count * 2**32, np.zeros(count)], 1).astype(np.uint32)


def oracle(row, temperature, top_k, top_p, min_p) -> tuple[np.ndarray, bool]:
    """(what is kept of the probabilities, whether some decision was close) by sorting, as `ops.sample` describes it."""
    row = np.asarray(row, np.float64)
    odds = np.exp((row - row.max()) / temperature) if temperature else (row == row.max()).astype(float)
    keep = odds >= min_p
    close = np.any((np.abs(odds - min_p) < EDGE * min_p) & (odds != min_p))
    if 0 < top_k < len(row):
        keep &= row >= np.sort(row)[-top_k]
    p = np.where(keep, odds, 0)
    p /= p.sum()
    if top_p < 1 and temperature:
        falling = np.sort(p)[::-1]
        mass = np.cumsum(falling)
        p = np.where(p >= falling[np.argmax(mass >= top_p)], p, 0)
        close |= np.any(np.abs(mass - top_p) < EDGE)
    return p / p.sum(), bool(close)


def drawn(p: np.ndarray, bits: np.ndarray) -> tuple[int, bool]:
    """(the id whose part of the cumulative sum holds the place, whether the place is close to another part)"""
    place = (int(bits[0]) * 2**32 + int(bits[1])) / 2**64
    (kept,) = np.nonzero(p)
    ends = np.cumsum(p[kept])[:-1]
    return int(kept[np.sum(ends <= place)]), bool(np.any(np.abs(ends - place) < EDGE))


KINDS = {
    "smooth": lambda rng, V: rng.normal(size=V),
    "peaked": lambda rng, V: rng.normal(size=V) * 10,
    "flat": lambda rng, V: np.full(V, rng.normal()),
    "tied": lambda rng, V: np.round(rng.normal(size=V) * 2) / 2,
    "masked": lambda rng, V: np.where(np.arange(V) % 3 == rng.integers(3), rng.normal(size=V), -np.inf),
    "one": lambda rng, V: np.where(np.arange(V) == rng.integers(V), 0.0, -np.inf),
    "signs": lambda rng, V: rng.choice([-1.5, -1e-30, -0.0, 0.0, 1e-30, 1.5], V),
    "large": lambda rng, V: rng.choice([-3e38, -1e20, 1e20, 3e38], V),
}


def adversarial(seed: int, R: int, V: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Logits [R, V], bits and parameters: all kinds of rows, with all kinds of truncation."""
    rng = np.random.default_rng(seed)
    logits = np.stack([KINDS[kind](rng, V) for kind in rng.choice(list(KINDS), R)]).astype(np.float32)
    bits = rng.integers(0, 2**32, (R, 2), dtype=np.uint32)
    bits[::7], bits[3::7] = 0, 2**32 - 1
    choices = dict(temperature=[0, 0.01, 0.5, 1, 1, 3], top_k=[-1, 0, 1, 2, 5, V // 2, V - 1, V, V + 1],
                   top_p=[1e-6, 0.1, 0.5, 0.9, 0.999, 1, 1, 1.5], min_p=[0, 0, 0.01, 0.3, 1])  # fmt: skip
    return logits, bits, {name: rng.choice(values, R).astype(DTYPES[name]) for name, values in choices.items()}


@each_backend
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_draws_the_word_that_sorting_finds(backend, seed):
    logits, bits, parameters = adversarial(seed, R, V)
    found = sample(backend, logits, bits, **parameters)
    clear = 0
    for r in range(R):
        p, close = oracle(logits[r], *(parameters[name][r] for name in OFF))
        expected, close_place = drawn(p, bits[r])
        assert p[found[r]] > 0 or close
        if not (close or close_place):
            assert found[r] == expected, (r, logits[r], {name: parameters[name][r] for name in OFF}, bits[r])
            clear += 1
    assert clear > R // 3


@pytest.mark.parametrize(("size", "seed"), [(1, 0), (2, 0), (2048, 1), (20000, 0), (20000, 1)])
def test_backends_draw_the_same_words(size, seed):
    """Also where a row takes several blocks and the last one is not full."""
    logits, bits, parameters = adversarial(seed, 24, size)
    reference, triton = (sample(backend, logits, bits, **parameters) for backend in BACKENDS)
    assert triton.tolist() == reference.tolist()


def test_a_words_part_of_the_sum_ends_at_the_same_place_in_all_backends():
    """Odds that differ in their last bit, by 2^-23, as `exp` may compute them, move an end by at most that part of the sum."""
    logits, _, parameters = adversarial(7, R, V)

    def first_end(backend: str) -> np.ndarray:
        """Of 2^64 places: the first at which another word is drawn than at place 0."""
        words = lambda places: np.stack([places >> np.uint64(32), places & np.uint64(2**32 - 1)], 1)
        draw = lambda places: sample(backend, logits, words(places), **parameters)
        low, high = np.zeros(R, np.uint64), np.full(R, 2**64 - 1, np.uint64)
        first = draw(low)
        for _ in range(64):
            middle = low + (high - low) // np.uint64(2)
            same = draw(middle) == first
            low, high = np.where(same, middle, low), np.where(same, high, middle)
        return high.astype(np.float64) / 2**64

    ends = [first_end(backend) for backend in BACKENDS]
    assert np.sum(ends[0] < 0.999) > R // 2
    np.testing.assert_allclose(*ends, atol=2**-23, rtol=0)


@each_backend
@pytest.mark.parametrize("changes", [
    dict(), dict(temperature=0.5), dict(top_k=5), dict(top_p=0.8), dict(min_p=0.2), dict(top_k=20, top_p=0.9, min_p=0.01),
], ids=str)  # fmt: skip
def test_words_are_drawn_as_often_as_they_are_probable(backend, changes):
    row = np.random.default_rng(4).normal(size=V)
    p, close = oracle(row.astype(np.float32), **{**OFF, **changes})
    found = sample(backend, np.tile(row, (256, 1)), places(256), **changes)
    assert not close
    np.testing.assert_allclose(np.bincount(found, minlength=V), p * 256, atol=1)


@each_backend
@pytest.mark.parametrize("changes", [dict(top_k=2), dict(top_p=0.35), dict(min_p=1.0), dict(temperature=0.0)], ids=str)
def test_equal_words_at_the_edge_are_all_kept(backend, changes):
    row = np.full(V, -1.0)
    row[[3, 11, 30]] = 2.0  # about 0.26 each
    assert set(sample(backend, np.tile(row, (R, 1)), places(R), **changes).tolist()) == {3, 11, 30}


@each_backend
def test_masked_words_are_never_drawn(backend):
    row = np.full(V, -np.inf)
    row[[5, 6, 20]] = [-50.0, -50.0, -51.0]
    for changes in [dict(), dict(top_k=10), dict(top_p=0.999), dict(top_k=36, top_p=0.9999), dict(temperature=100.0)]:
        assert set(sample(backend, np.tile(row, (R, 1)), places(R), **changes).tolist()) == {5, 6, 20}


@each_backend
def test_greedy_takes_the_lowest_of_the_highest(backend):
    logits, _, parameters = adversarial(5, R, V)
    found = sample(backend, logits, np.zeros((R, 2)), **{**parameters, "temperature": 0.0})
    assert found.tolist() == logits.argmax(1).tolist()


@each_backend
@pytest.mark.parametrize("broken", [(np.nan, np.nan), (-np.nan, -np.nan), (np.inf, np.inf), (-np.inf, -np.inf), (np.nan, 0.5),
                                    (-np.nan, -np.inf), (np.inf, -np.inf)], ids=str)  # fmt: skip
def test_broken_rows_get_some_word_and_leave_the_others_alone(backend, broken):
    logits, bits, parameters = adversarial(6, R, V)
    alone = sample(backend, logits, bits, **parameters)
    logits[::2, 0], logits[::2, 1:] = broken
    found = sample(backend, logits, bits, **parameters)
    assert ((found >= 0) & (found < V)).all()
    assert found[1::2].tolist() == alone[1::2].tolist()


def test_sample_refuses_arrays_that_do_not_fit():
    row = [jnp.zeros((2, V)), jnp.ones(2), jnp.zeros(2, jnp.int32), jnp.ones(2), jnp.zeros(2), jnp.zeros((2, 2), jnp.uint32)]
    for at, array, words in [
        (0, jnp.zeros((2, V), jnp.bfloat16), r"float32 \[R, V\], are bfloat16"),
        (2, jnp.zeros(3, jnp.int32), r"top_k must be \[2\], is \(3,\)"),
        (5, jnp.zeros((2, 2), jnp.int32), r"bits must be uint32 \[2, 2\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            pallas_kernels.sample(*row[:at], array, *row[at + 1 :], implementation="reference")


# -- products --------------------------------------------------------------------------------------------------------------

FLOATS = {
    "float32": dict(rtol=1e-5, atol=1e-5),
    "bfloat16": dict(rtol=2**-8, atol=1e-3),
    "float16": dict(rtol=2**-10, atol=1e-3),
}
"""Of outputs of about 1. The sums are float32 everywhere, the output is rounded once to half a unit in its last place."""


def exact(x) -> np.ndarray:
    return np.asarray(jnp.asarray(x).astype(jnp.float32), np.float64)


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape) * scale, jnp.float32).astype(dtype)


def grouped_oracle(x: np.ndarray, w: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    out, first = np.zeros((len(x), w.shape[1])), 0
    for matrix, size in zip(w, sizes):
        out[first : first + size] = x[first : first + size] @ matrix.T
        first += size
    return out


# fmt: off
GROUPED = [  # T, E, F, rows of each group
    (1, 16, 8, [0, 1]),
    (40, 72, 96, [7, 0, 20, 0, 0, 1, 12]),
    (40, 72, 96, [0, 0, 0, 0, 40, 0, 0]),
    (40, 72, 96, [0, 3, 5, 0, 0, 0, 0]),
    (40, 72, 96, [0, 0, 0, 0, 0, 0, 0]),
    (150, 64, 130, [65, 80]),   # tiles of 64 rows
    (600, 40, 24, [590]),       # tiles of 128 rows
]
# fmt: on


@each_backend
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("T", "E", "F", "sizes"), GROUPED, ids=str)
def test_each_row_is_multiplied_by_the_matrix_of_its_group(backend, T, E, F, sizes, dtype):
    rng = np.random.default_rng(T)
    x, w = normal(rng, (T, E), dtype), normal(rng, (len(sizes), F, E), dtype, E**-0.5)
    sizes = np.array(sizes, np.int32)
    x = x.at[sizes.sum() :].set(jnp.nan)  # rows of no group may hold anything
    out = program("grouped_matmul", backend)(x, w, sizes)
    assert out.dtype == x.dtype
    np.testing.assert_allclose(exact(out), grouped_oracle(exact(x), exact(w), sizes), **FLOATS[dtype])
    assert not np.any(np.asarray(out[sizes.sum() :]))


@each_backend
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_sizes_of_groups(backend, data):
    T, E, F, X = 50, 24, 20, 6
    sizes, left = [], T
    for _ in range(X):
        sizes.append(data.draw(st.one_of(st.just(0), st.integers(0, left))))
        left -= sizes[-1]
    order = data.draw(st.permutations(range(X)))
    sizes = np.array(sizes, np.int32)[order]
    rng = np.random.default_rng(0)
    x, w = normal(rng, (T, E), "float32"), normal(rng, (X, F, E), "float32", E**-0.5)
    out = program("grouped_matmul", backend)(x, w, sizes)
    np.testing.assert_allclose(exact(out), grouped_oracle(exact(x), exact(w), sizes), **FLOATS["float32"])


@each_backend
def test_a_row_does_not_depend_on_how_many_rows_its_group_has(backend):
    rng = np.random.default_rng(1)
    x, w = normal(rng, (48, 40), "float32"), normal(rng, (3, 24, 40), "float32")
    run = lambda first, sizes: np.asarray(program("grouped_matmul", backend)(jnp.roll(x, -first, 0), w, np.int32(sizes)))
    many = run(0, [0, 48, 0])
    for first in (0, 1, 17, 47):  # alone, behind a group of others, and at another place of its tile
        assert run(first, [0, 1, 0])[0].tolist() == many[first].tolist()
        assert run(first - 5, [5, 1, 9])[5].tolist() == many[first].tolist()


def test_the_reference_of_grouped_products_has_gradients():
    rng = np.random.default_rng(2)
    x, w, sizes = normal(rng, (9, 8), "float32"), normal(rng, (3, 4, 8), "float32"), jnp.array([2, 0, 5])
    dx, dw = jax.grad(lambda x, w: pallas_kernels.grouped_matmul(x, w, sizes, "reference").sum(), (0, 1))(x, w)
    group = np.repeat([0, 2], [2, 5])
    np.testing.assert_allclose(dx[:7], np.asarray(w)[group].sum(1), rtol=1e-5, atol=1e-5)
    assert not np.any(dx[7:])
    expected = np.stack([np.asarray(x)[:2].sum(0), np.zeros(8), np.asarray(x)[2:7].sum(0)])
    np.testing.assert_allclose(dw, np.broadcast_to(expected[:, None], dw.shape), rtol=1e-5, atol=1e-5)


def test_grouped_matmul_refuses_arrays_that_do_not_fit():
    x, w, sizes = jnp.zeros((4, 8)), jnp.zeros((3, 5, 8)), jnp.zeros(3, jnp.int32)
    for arguments, words in [
        ((x, w.swapaxes(1, 2), sizes), r"x must be \[T, E\]"),
        ((x.astype(jnp.bfloat16), w, sizes), "one dtype"),
        ((x, w, sizes[:2]), r"group_sizes must be int32 \[3\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            pallas_kernels.grouped_matmul(*arguments, implementation="reference")


def unpacked(w: np.ndarray, groups: int) -> np.ndarray:
    """The whole numbers [F, E], by the words of `ops.quantized_matmul`, one by one."""
    if w.dtype == np.int8:
        return w.astype(np.float64)
    F, E = len(w), 2 * w.shape[1]
    s = E // groups
    numbers = np.zeros((F, E))
    for e in range(E):
        g, j = divmod(e, s)
        byte = w[:, g * (s // 2) + j % (s // 2)]
        numbers[:, e] = byte % 16 if j < s // 2 else byte // 16
    return numbers


# fmt: off
QUANTIZED = [  # bits, T, E, F, groups, whether there are zero points
    (8, 3, 256, 64, 1, False),
    (8, 3, 96, 50, 1, True),      # a row of 96 goes in blocks of 32
    (8, 17, 320, 40, 5, False),
    (8, 70, 256, 33, 8, True),
    (8, 2, 512, 16, 2, False),    # a group takes two blocks
    (4, 1, 256, 64, 2, False),
    (4, 16, 256, 70, 8, False),   # four groups of 32 at a time
    (4, 5, 192, 16, 3, True),
    (4, 130, 256, 130, 2, True),
    (4, 4, 512, 16, 1, False),
]
# fmt: on


def quantized_case(bits, T, E, F, groups, zeros, dtype):
    rng = np.random.default_rng(E + T)
    x = normal(rng, (T, E), dtype)
    w = rng.integers(-128, 128, (F, E), np.int8) if bits == 8 else rng.integers(0, 256, (F, E // 2), np.uint8)
    scales = jnp.asarray(rng.uniform(0.5, 1.5, (F, groups)) / (2**bits * E**0.5), jnp.float32).astype(dtype)
    zero = jnp.asarray(rng.uniform(0, 2**bits / 4, (F, groups)), jnp.float32).astype(dtype) if zeros else None
    return x, w, scales, zero


@each_backend
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", QUANTIZED, ids=str)
def test_quantized_weights_are_what_they_stand_for(backend, case, dtype):
    bits, _, E, _, groups, _ = case
    x, w, scales, zeros = quantized_case(*case, dtype)
    out = program("quantized_matmul", backend)(x, w, scales, zeros)
    assert out.dtype == x.dtype
    spread = lambda of: np.repeat(exact(of), E // groups, axis=1)
    offset = spread(zeros) if zeros is not None else 8.0 * (bits == 4)
    expected = exact(x) @ ((unpacked(w, groups) - offset) * spread(scales)).T
    np.testing.assert_allclose(exact(out), expected, **FLOATS[dtype])


def test_groups_that_a_kernel_cannot_do_are_left_to_the_reference():
    x, w, scales, _ = quantized_case(8, 2, 80, 8, 10, False, "float32")  # groups of 8
    with pytest.raises(NotImplementedError, match="multiple of 16 inputs, these are of 8; reference"):
        program("quantized_matmul", "triton")(x, w, scales)
    expected = exact(x) @ (w * np.repeat(exact(scales), 8, axis=1)).T
    np.testing.assert_allclose(program("quantized_matmul", "reference")(x, w, scales), expected, **FLOATS["float32"])


def test_quantized_matmul_refuses_arrays_that_do_not_fit():
    x, w, scales = jnp.zeros((2, 8)), jnp.zeros((4, 8), jnp.int8), jnp.zeros((4, 2))
    for arguments, words in [
        ((x, w[:, :4], scales), r"w must be int8 \[F, 8\]"),
        ((x, w.astype(jnp.uint8), scales), r"uint8 \[F, 4\]"),
        ((x, w, scales[:3]), r"scales must be \[4, groups\]"),
        ((x, w, jnp.zeros((4, 8))), "groups of even size"),
        ((x, w, scales, scales[:, :1]), "zeros must be None or like scales"),
    ]:
        with pytest.raises(ValueError, match=words):
            pallas_kernels.quantized_matmul(*arguments, implementation="reference")
