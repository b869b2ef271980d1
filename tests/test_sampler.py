"""The sampler against float64 numpy: what may be drawn, how often, what edits do, and that neighbours change nothing."""

import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpaged import sampler
from jaxpaged.batch import Edits, Sampling

sample, edit, greedy, finite = map(jax.jit, (sampler.sample, sampler.edit, sampler.greedy, sampler.finite))
logprobs = jax.jit(sampler.logprobs, static_argnums=2)

COUNT, WIDTH = 1 << 14, 40  # draws and words of one call: one program for most tests
OFF = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)


def sampling(R: int, seed=0, **changes) -> Sampling:
    """The same parameters for R rows, or per row where a value is an array."""
    fill = lambda value, dtype: np.broadcast_to(np.asarray(value, dtype), (R,)).copy()
    p = {**OFF, **changes}
    seeds = np.broadcast_to(np.array([divmod(int(s), 2**32) for s in np.atleast_1d(seed)], np.uint32), (R, 2)).copy()
    return Sampling(fill(p["temperature"], np.float32), fill(p["top_k"], np.int32), fill(p["top_p"], np.float32),
                    fill(p["min_p"], np.float32), seeds)  # fmt: skip


def draws(row: np.ndarray, count: int, first: int = 0, seed: int = 0, **changes) -> np.ndarray:
    """`count` draws from one row of logits, at consecutive positions."""
    row = np.pad(row.astype(np.float32), (0, max(0, WIDTH - len(row))), constant_values=-np.inf)
    R = COUNT if len(row) == WIDTH else count
    positions = np.arange(first, first + R, dtype=np.int32)
    return np.asarray(sample(np.broadcast_to(row, (R, len(row))), sampling(R, seed, **changes), positions))[:count]


def softmax(row: np.ndarray) -> np.ndarray:
    odds = np.exp(row.astype(np.float64) - row.max())
    return odds / odds.sum()


def truncated(row: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The oracle: probabilities that remain, in vLLM's order; words equal to the last one kept are kept."""
    p = softmax(row / np.float64(temperature))
    p = np.where(p >= min_p * p.max(), p, 0)
    if 0 < top_k < len(p):
        p = np.where(p >= np.sort(p)[-top_k], p, 0)
    p = p / p.sum()
    mass = np.cumsum(np.sort(p)[::-1])
    last = np.searchsorted(mass, np.float64(np.float32(top_p)) - 1e-9) if top_p < 1 else len(p) - 1
    p = np.where(p >= np.sort(p)[::-1][last], p, 0)
    return p / p.sum()


# -- greedy and finite -----------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([-np.inf, -2.0, 0.0, 1.5, 3.0]), min_size=12, max_size=12).filter(lambda row: max(row) > -9))
def test_greedy_takes_the_lowest_of_the_most_probable(row):
    row = np.array([row], np.float32)
    assert greedy(row).tolist() == [int(np.argmax(row))]
    assert sample(row, sampling(1, temperature=0.0), np.zeros(1, np.int32)).tolist() == [int(np.argmax(row))]


def test_greedy_rows_ignore_truncation_and_seed():
    row = np.random.default_rng(0).normal(size=WIDTH)
    found = draws(row, 64, temperature=0.0, top_k=5, top_p=0.5, min_p=0.1)
    assert set(found.tolist()) == {int(row.argmax())}


BROKEN = {
    "a NaN": (0.0, np.nan, 1.0),
    "only NaN": (np.nan, np.nan, np.nan),
    "plus infinity": (0.0, np.inf, 1.0),
    "both infinities": (-np.inf, np.inf, 1.0),
    "all minus infinity": (-np.inf, -np.inf, -np.inf),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"top_k": 2, "top_p": 0.7, "min_p": 0.1}], ids=str)
def test_broken_rows_are_told_and_give_some_id_and_leave_their_neighbours_alone(kind, changes):
    good = np.array([0.5, 2.0, 1.0])
    rows = np.array([good, BROKEN[kind], good], np.float32)
    positions = np.arange(3, dtype=np.int32)
    assert finite(rows).tolist() == [True, False, True]
    found = np.asarray(sample(rows, sampling(3, **changes), positions))
    alone = np.asarray(sample(np.array([good] * 3, np.float32), sampling(3, **changes), positions))
    assert 0 <= found[1] < 3 and 0 <= int(greedy(rows)[1]) < 3
    assert found[[0, 2]].tolist() == alone[[0, 2]].tolist()


def test_minus_infinity_in_some_words_is_finite_and_never_drawn():
    row = np.array([-np.inf, 1.0, -np.inf, 1.0])
    assert finite(row[None].astype(np.float32)).tolist() == [True]
    assert set(draws(row, 500).tolist()) == {1, 3}


# -- truncation: exactly the right words -----------------------------------------------------------------------------------

V = 24
PARAMETERS = [
    dict(),
    dict(temperature=0.5),
    dict(temperature=2.0),
    dict(top_k=1),
    dict(top_k=7),
    dict(top_k=V - 1),
    dict(top_k=V),
    dict(top_k=1000),
    dict(top_p=0.9),
    dict(top_p=0.31),
    dict(top_p=1e-6),
    dict(min_p=0.3),
    dict(min_p=1.0),
    dict(top_k=9, top_p=0.7),
    dict(temperature=1.7, min_p=0.25, top_k=8, top_p=0.8),
    dict(temperature=0.6, min_p=0.05, top_k=12, top_p=0.95),
]


def kept(row: np.ndarray, count: int = COUNT, **changes) -> set[int]:
    return set(draws(row, count, **changes).tolist())


def likely(p: np.ndarray) -> set[int]:
    """Words that 2^14 draws cannot miss, all but one in a million times. Where a test compares sets, these are all."""
    assert p[p > 0].min() > 1e-3
    return set(np.flatnonzero(p).tolist())


def wanted(changes: dict, seed: int) -> tuple[np.ndarray, set[int]]:
    """A row of logits, flat enough to see every word, and the words that may be drawn from it."""
    row = np.random.default_rng(seed).uniform(0, 3, V) * min(1.0, changes.get("temperature", 1.0))
    return row, likely(truncated(row, **{**OFF, **changes}))


@pytest.mark.parametrize("changes", PARAMETERS, ids=str)
def test_what_can_be_drawn_is_what_the_oracle_keeps(changes):
    for seed in range(3):
        row, words = wanted(changes, seed)
        assert kept(row, **changes) == words


def test_each_row_is_truncated_by_its_own_parameters():
    n = len(PARAMETERS)
    each = [wanted(changes, i) for i, changes in enumerate(PARAMETERS)]
    columns = {name: np.array([{**OFF, **p}[name] for p in PARAMETERS] * (COUNT // n)) for name in OFF}
    logits = np.full((n, WIDTH), -np.inf, np.float32)
    logits[:, :V] = [row for row, _ in each]
    found = [
        sample(np.tile(logits, (COUNT // n, 1)), sampling(COUNT, **columns), np.arange(COUNT, dtype=np.int32) + i * COUNT)
        for i in range(n)
    ]
    for i, (_, words) in enumerate(each):
        assert set(np.array(found)[:, i::n].ravel().tolist()) == words, PARAMETERS[i]


def test_ties_at_the_edge_are_all_kept():
    row = np.log([4, 2, 2, 2, 1, 1])
    assert kept(row, top_k=2) == {0, 1, 2, 3}
    assert kept(row, top_k=5) == {0, 1, 2, 3, 4, 5}
    assert kept(row, top_p=0.5) == {0, 1, 2, 3}
    assert kept(row, min_p=0.5) == {0, 1, 2, 3}
    assert kept(np.zeros(6), top_k=1, top_p=0.1) == set(range(6))


def test_top_p_keeps_the_word_that_crosses_it():
    row = np.log([0.4, 0.3, 0.2, 0.1])
    assert [kept(row, top_p=p) for p in (0.39, 0.41, 0.69, 0.71, 0.91)] == [{0}, {0, 1}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}]


def test_the_order_is_temperature_min_p_top_k_top_p():
    row = np.log([0.4, 0.3, 0.2, 0.1])
    assert kept(row, top_k=2, top_p=0.5) == {0}  # of what top-k leaves, 0.57 and 0.43; of all words it would be {0, 1}
    assert kept(row, min_p=0.6, top_p=0.55) == {0}  # likewise
    assert kept(row, min_p=0.3) == {0, 1, 2}
    assert kept(row, min_p=0.3, temperature=2.0) == {0, 1, 2, 3}  # min-p sees 0.1 / 0.4 as sqrt(0.25) = 0.5
    assert kept(row, min_p=0.3, temperature=0.5) == {0, 1}
    assert kept(row, top_p=0.6, temperature=0.5) == {0, 1} and kept(row, top_p=0.5, temperature=0.5) == {0}


def test_large_vocabularies_and_equal_logits():
    """Bisection must end on words that float32 can hardly tell apart, and blocks must not be missed."""
    rng = np.random.default_rng(1)
    row = rng.permutation(np.concatenate([np.full(4990, -5.0), np.nextafter(np.float32(1), 2) * np.ones(3), np.ones(7)]))
    assert kept(row, 300, top_k=3) == set(np.flatnonzero(row > 1).tolist())
    assert kept(row, 300, top_k=4) == set(np.flatnonzero(row >= 1).tolist())
    for place in (0, 255, 256, 4999):
        row = np.full(5000, -40.0)
        row[place] = 0
        assert kept(row, 300) == {place}


@pytest.mark.parametrize("shift", [-1e4, 0.0, 3e4])
def test_only_differences_of_logits_matter(shift):
    row = np.arange(8) / 4 + shift
    assert kept(row, top_k=3, top_p=0.8) == likely(truncated(np.arange(8) / 4, 1.0, 3, 0.8, 0.0))


# -- the draw: the right frequencies ---------------------------------------------------------------------------------------


def surprise(counts: np.ndarray, p: np.ndarray) -> float:
    """Chi-square, in standard deviations above what chance gives."""
    assert counts[p == 0].sum() == 0
    counts, p = counts[p > 0], p[p > 0]
    expected = p * counts.sum()
    freedom = max(len(p) - 1, 1)
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0.7}, {"temperature": 1.5, "top_k": 20, "top_p": 0.9}, {"min_p": 0.05}], ids=str
)
def test_frequencies_over_positions(changes):
    row = np.random.default_rng(5).normal(0, 1.2, WIDTH)
    found = np.concatenate([draws(row, COUNT, i * COUNT, seed=12345, **changes) for i in range(8)])
    p = truncated(row, **{**OFF, **changes})
    counts = np.bincount(found, minlength=WIDTH)
    assert surprise(counts, p) < 4
    assert np.abs(counts / len(found) - p).sum() / 2 < 0.01


def test_frequencies_over_seeds():
    row = np.random.default_rng(6).normal(0, 1, WIDTH)
    rows = np.broadcast_to(row.astype(np.float32), (COUNT, WIDTH))
    found = sample(rows, sampling(COUNT, np.arange(COUNT) * 2**20), np.full(COUNT, 17, np.int32))
    assert surprise(np.bincount(found, minlength=WIDTH), softmax(row)) < 4


def test_neighbouring_positions_and_seeds_are_independent():
    """Pairs of draws at x and x + 1 of a seed, and of seeds s and s + 1 at x."""
    p = np.array([0.1, 0.2, 0.3, 0.4])
    one, other = (draws(np.log(p), COUNT, seed=seed) for seed in (7, 8))
    for a, b in ((one[:-1], one[1:]), (one, other)):
        assert surprise(np.bincount(4 * a + b, minlength=16), np.outer(p, p).ravel()) < 4


def test_both_words_of_the_seed_count():
    row = np.zeros(WIDTH)
    first, low, high = (draws(row, 200, seed=seed).tolist() for seed in (5, 6, 5 + 2**32))
    assert first != low and first != high and low != high
    assert first == draws(row, 200, seed=5).tolist()


def test_rare_words_are_drawn_as_often_as_they_should():
    row = np.array([0.0, math.log(1e-3)])
    found = np.concatenate([draws(row, COUNT, i * COUNT) for i in range(16)])
    expected = 16 * COUNT * 1e-3 / 1.001
    assert abs(int((found == 1).sum()) - expected) < 4 * math.sqrt(expected)


# -- rows are alone --------------------------------------------------------------------------------------------------------

NEIGHBOURS = [
    dict(temperature=0.0),
    dict(temperature=1.9),
    dict(temperature=0.8, top_k=5),
    dict(temperature=0.8, top_p=0.3),
    dict(temperature=1.2, top_k=40, top_p=0.97, min_p=0.02),
]
MINE = [{}, dict(top_k=30), dict(top_p=0.9), dict(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01)]


def mixture(rng: np.random.Generator, R: int, mine: dict) -> tuple[np.ndarray, Sampling, np.ndarray]:
    """R random rows with random parameters, all but the first."""
    each = [mine] + [NEIGHBOURS[i] for i in rng.integers(len(NEIGHBOURS), size=R - 1)]
    columns = {name: np.array([{**OFF, **p}[name] for p in each]) for name in OFF}
    seeds = rng.integers(2**63, size=R)
    logits = rng.normal(0, rng.uniform(0.5, 8, (R, 1)), (R, 300)).astype(np.float32)
    logits[1:] = np.where(rng.random((R - 1, 300)) < 0.1, -np.inf, logits[1:])
    return logits, sampling(R, seeds, **columns), rng.integers(5000, size=R, dtype=np.int32)


@pytest.mark.parametrize("mine", MINE, ids=str)
def test_a_row_never_depends_on_its_neighbours_or_their_number(mine):
    rng = np.random.default_rng(11)
    for _ in range(12):
        logits, parameters, positions = mixture(rng, 1, mine)
        alone = int(sample(logits, parameters, positions)[0])
        for R in (2, 5, 16):
            others = mixture(rng, R, mine)
            place = int(rng.integers(R))
            with_me = jax.tree.map(partial(moved_in, place), others, (logits, parameters, positions))
            assert int(sample(*with_me)[place]) == alone


def moved_in(place: int, others: np.ndarray, mine: np.ndarray) -> np.ndarray:
    others = others.copy()
    others[place] = mine[0]
    return others


def test_a_token_is_a_function_of_seed_and_position():
    row = np.zeros(WIDTH)
    once, again = draws(row, 300, seed=9), draws(row, 100, first=200, seed=9)
    assert once[200:].tolist() == again.tolist()
    assert set(once.tolist()) == set(range(WIDTH))


# -- edits -----------------------------------------------------------------------------------------------------------------

WORDS = 70  # no multiple of 32: the mask's last word is not full


class Row:
    """What one request asks for; `outputs` are generated, the last one perhaps unknown to the host."""

    def __init__(self, prompt=(), outputs=(), carried=False, presence=0.0, frequency=0.0, repetition=1.0, bias=None, only=None):
        self.prompt, self.outputs, self.carried = list(prompt), list(outputs), carried
        self.presence, self.frequency, self.repetition = presence, frequency, repetition
        self.bias, self.only = bias or {}, only

    def oracle(self, logits: np.ndarray) -> np.ndarray:
        """vLLM's rules, word by word."""
        out = logits.astype(np.float64)
        for word in range(WORDS):
            count = self.outputs.count(word)
            if self.only is not None and word not in self.only:
                out[word] = -np.inf
            out[word] += self.bias.get(word, 0.0)
            if count or word in self.prompt:
                out[word] = out[word] / self.repetition if out[word] > 0 else out[word] * self.repetition
            out[word] -= self.frequency * count + self.presence * (count > 0)
        return out


def edits_of(rows: list[Row], width: int = 20) -> tuple[Edits, np.ndarray, np.ndarray]:
    """edits, last_token, carried."""
    column = lambda name: np.array([getattr(row, name) for row in rows], np.float32)
    R = len(rows)
    known = [row.prompt + row.outputs[: len(row.outputs) - row.carried] for row in rows]
    history = np.array([ids + [WORDS] * (width - len(ids)) for ids in known], np.int32)
    allowed = np.full((R, -(-WORDS // 32)), 0xFFFFFFFF, np.uint32)
    bias_ids, bias = np.full((R, 8), WORDS, np.int32), np.zeros((R, 8), np.float32)
    for i, row in enumerate(rows):
        bias_ids[i, : len(row.bias)], bias[i, : len(row.bias)] = list(row.bias), list(row.bias.values())
        if row.only is not None:
            allowed[i] = [sum(1 << (t % 32) for t in row.only if t // 32 == word) for word in range(allowed.shape[1])]
    lengths = lambda values: np.array([len(v) for v in values], np.int32)
    last = np.array([row.outputs[-1] if row.outputs else 0 for row in rows], np.int32)
    result = Edits(column("presence"), column("frequency"), column("repetition"), history, lengths([r.prompt for r in rows]),
                   lengths(known), allowed, bias_ids, bias)  # fmt: skip
    return result, last, np.array([row.carried for row in rows])


def assert_edited(rows: list[Row], seed: int = 0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, 3, (len(rows), WORDS)).astype(np.float32)
    found = np.asarray(edit(logits, *edits_of(rows)))
    np.testing.assert_allclose(found, [row.oracle(x) for row, x in zip(rows, logits)], atol=1e-5, rtol=1e-6)
    return found


REQUESTS = {
    "nothing": Row([1, 2], [3]),
    "presence": Row([1, 2], [3, 3, 5], presence=1.5),
    "frequency": Row([1, 2], [3, 3, 5], frequency=-0.7),
    "repetition of prompt and output": Row([1, 2, 60], [3, 3, 69], repetition=1.3),
    "repetition below one": Row([1, 2], [3], repetition=0.8),
    "all penalties": Row([0, 1, 1], [0, 4, 4, 4, 69], presence=0.4, frequency=1.1, repetition=1.2),
    "a carried token": Row([1], [5, 6], True, presence=1.0, frequency=0.5, repetition=1.1),
    "the first token carried": Row([1, 2], [1], True, presence=1.0, frequency=0.5, repetition=2.0),
    "a carried token that was there before": Row([1], [6, 6], True, presence=1.0, frequency=0.5, repetition=1.1),
    "no prompt word in the output": Row(range(20), [], frequency=1.0, presence=1.0),
    "bias": Row(bias={0: 5.0, 69: -100.0, 31: 0.25}),
    "only some words": Row(only=[0, 31, 32, 69]),
    "everything": Row([1, 2], [2, 31], True, 0.5, 0.5, 1.5, {31: 1.0, 5: 3.0}, [2, 5, 31]),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_edits_of_one_row_equal_the_oracle(name):
    assert_edited([REQUESTS[name]])


def test_edits_of_many_rows_equal_the_oracle_and_the_rows_alone():
    rows = list(REQUESTS.values())
    together = assert_edited(rows)
    logits = np.random.default_rng(0).normal(0, 3, (len(rows), WORDS)).astype(np.float32)
    for i, row in enumerate(rows):
        alone = np.asarray(edit(logits[i : i + 1], *edits_of([row])))
        np.testing.assert_array_equal(together[i], alone[0])


tokens = st.lists(st.integers(0, WORDS - 1), max_size=10)
penalties = st.floats(-2, 2, width=16)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.builds(Row, prompt=tokens, outputs=tokens.filter(len), carried=st.booleans(), presence=penalties,
                  frequency=penalties, repetition=st.floats(0.25, 2, width=16),
                  bias=st.dictionaries(st.integers(0, WORDS - 1), st.floats(-100, 100, width=16), max_size=8),
                  only=st.none() | st.sets(st.integers(0, WORDS - 1), min_size=1, max_size=40)),
        min_size=3, max_size=3,
    ),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_edits_equal_the_oracle(rows, seed):
    assert_edited(rows, seed)


def test_without_edits_logits_are_bit_by_bit_the_same():
    logits = np.random.default_rng(0).normal(size=(2, WORDS)).astype(np.float32)
    assert np.asarray(edit(logits, *edits_of([Row([1], [2]), Row()]))).tobytes() == logits.tobytes()


# -- logprobs --------------------------------------------------------------------------------------------------------------


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    return x - x.max(1, keepdims=True) - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True))


@pytest.mark.parametrize("k", [0, 1, 5, 40, 1000])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_logprobs_equal_float64(k, scale):
    rng = np.random.default_rng(k)
    logits = (scale * rng.normal(size=(6, 40))).astype(np.float32)
    ids = rng.integers(40, size=6, dtype=np.int32)
    found, right = logprobs(logits, ids, k), log_softmax(logits)
    k, order = min(k, 40), np.argsort(-logits, axis=1, kind="stable")
    np.testing.assert_allclose(found.logprob, right[np.arange(6), ids], atol=1e-5, rtol=1e-6)
    assert found.rank.tolist() == [1 + order[i].tolist().index(t) for i, t in enumerate(ids)]
    np.testing.assert_array_equal(found.top_ids, order[:, :k])
    np.testing.assert_allclose(found.top, np.take_along_axis(right, order[:, :k], 1), atol=1e-5, rtol=1e-6)


def test_ranks_and_alternatives_of_equal_words():
    logits = np.array([[1.0, 3.0, 3.0, 0.0, 3.0, -np.inf]], np.float32)
    ranks = [int(logprobs(logits, np.array([t], np.int32), 4).rank[0]) for t in range(6)]
    assert ranks == [4, 3, 3, 5, 3, 6]
    found = logprobs(logits, np.zeros(1, np.int32), 4)
    assert found.top_ids.tolist() == [[1, 2, 4, 0]]
    assert float(logprobs(logits, np.full(1, 5, np.int32), 1).logprob[0]) == -np.inf


def test_logprobs_are_of_float32_even_where_logits_are_not():
    logits = np.random.default_rng(0).normal(size=(3, 50)).astype(jnp.bfloat16)
    found = logprobs(logits, np.zeros(3, np.int32), 2)
    assert found.logprob.dtype == jnp.float32 and found.top.dtype == jnp.float32
    np.testing.assert_allclose(found.logprob, log_softmax(logits)[:, 0], atol=1e-5)


@pytest.mark.parametrize("T", [1, 5, 33])
def test_prompt_logprobs_do_not_depend_on_the_chunk(T):
    rng = np.random.default_rng(T)
    hidden, weight = (rng.normal(size=dims).astype(np.float32) for dims in ((T, 8), (8, 50)))
    targets = rng.integers(50, size=T, dtype=np.int32)
    head = lambda x: jnp.sum(x[:, :, None] * weight[None], axis=1)  # no matrix product: each row by itself
    whole = logprobs(head(hidden), targets, 3)
    score = lambda h, t: logprobs(head(h), t, 3)
    for chunk in (1, 4, 32, 64):
        parts = jax.jit(functools.partial(sampler.prompt_logprobs, score=score, chunk=chunk))(hidden, targets)
        np.testing.assert_array_equal(parts.rank, whole.rank)
        np.testing.assert_array_equal(parts.top_ids, whole.top_ids)
        np.testing.assert_allclose(parts.logprob, whole.logprob, atol=1e-6)
        np.testing.assert_allclose(parts.top, whole.top, atol=1e-6)
