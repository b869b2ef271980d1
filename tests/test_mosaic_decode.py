"""The Hopper decode kernel in JAX's interpreter, which simulates warpgroups, TMA and barriers (but not the tensor cores).

What takes a call to it is small here: pages of 16 tokens, splits of a tile, one or two CTAs, so that each of them goes
through several items of work and its ring wraps around more than once.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.mosaic_gpu import decode as kernel
from pallas_kernels.mosaic_gpu import tuning
from pallas_kernels.mosaic_gpu.tuning import DecodeConfig, PrefillConfig, TuningConfig

SCALE = 0.3
SMALL = DecodeConfig(tile=64, stages=2, split_size=64, pairs=2, num_ctas=1)
ONE_PAIR = DecodeConfig(tile=64, stages=3, split_size=128, pairs=1, num_ctas=2)


class Batch:
    """Rows with numbers in them: the pages that the table names hold their tokens, every other place NaN."""

    def __init__(self, kv_lens, H=4, G=2, D=64, page_size=16, pages_a_row=14, dtype=jnp.bfloat16, seed=0):
        rng = np.random.default_rng(seed)
        self.kv_lens = np.array(kv_lens, np.int32)
        R = len(kv_lens)
        normal = lambda *dims: rng.standard_normal(dims).astype(dtype)
        self.q = normal(R, H, D)
        self.keys, self.values = [normal(n, G, D) for n in kv_lens], [normal(n, G, D) for n in kv_lens]
        self.table = rng.permutation(R * pages_a_row + 3)[: R * pages_a_row].reshape(R, pages_a_row).astype(np.int32)
        self.k_pages = np.full((R * pages_a_row + 3, page_size, G, D), np.nan, dtype)
        self.v_pages = self.k_pages.copy()
        for r, n in enumerate(kv_lens):
            at = np.arange(n)
            self.k_pages[self.table[r, at // page_size], at % page_size] = self.keys[r]
            self.v_pages[self.table[r, at // page_size], at % page_size] = self.values[r]
        self.per_head = rng.standard_normal(H).astype(np.float32)

    def forget_before(self, window):
        """NaN where no query looks any more: an engine gives such pages to others."""
        for r, n in enumerate(self.kv_lens):
            at = np.arange(max(n - (window or n), 0))
            for pages in (self.k_pages, self.v_pages):
                pages[self.table[r, at // pages.shape[1]], at % pages.shape[1]] = np.nan

    def run(self, config=SMALL, num_decode=None, **options):
        num_decode = jnp.int32(len(self.kv_lens) if num_decode is None else num_decode)
        out, lse = program(config, **options)(self.q, self.k_pages, self.v_pages, self.table, self.kv_lens, num_decode,
                                              self.per_head)  # fmt: skip
        assert out.dtype == self.q.dtype and lse.dtype == jnp.float32
        return np.asarray(out, np.float32), np.asarray(lse)

    def expected(self, row, window=None, soft_cap=None, sinks=False, alibi=False):
        """The equation of ops.paged_attention in float64: out [H, D], lse [H]."""
        n, H = self.kv_lens[row], self.q.shape[1]
        wide = lambda x: np.repeat(x.astype(np.float64), H // x.shape[1], axis=1)
        k, v, q = wide(self.keys[row]), wide(self.values[row]), self.q[row].astype(np.float64)
        s = SCALE * np.einsum("hd,thd->ht", q, k)
        if soft_cap is not None:
            s = soft_cap * np.tanh(s / soft_cap)
        at = np.arange(n)
        if alibi:
            s = s + self.per_head[:, None] * (at - (n - 1))
        s = np.where(at > n - 1 - (window or n), s, -np.inf)
        sink = self.per_head[:, None] if sinks else np.full((H, 1), -np.inf)
        top = np.maximum(s.max(1, keepdims=True), sink)
        total = np.exp(s - top).sum(1, keepdims=True) + np.exp(sink - top)
        return np.einsum("ht,thd->hd", np.exp(s - top) / total, v), (top + np.log(total))[:, 0]


@functools.cache
def program(config, sinks=False, alibi=False, **options):
    def run(q, k_pages, v_pages, table, kv_lens, num_decode, per_head):
        heads = dict(sinks=per_head if sinks else None, alibi=per_head if alibi else None)
        return kernel.decode(q, k_pages, v_pages, table, kv_lens, num_decode, scale=SCALE, config=config, interpret=True,
                             **heads, **options)  # fmt: skip

    return jax.jit(run)


def assert_right(batch, out, lse, used=None, **options):
    used = len(batch.kv_lens) if used is None else used
    for row, n in enumerate(batch.kv_lens):
        if row >= used or n == 0:
            np.testing.assert_array_equal(out[row], 0)
            np.testing.assert_array_equal(lse[row], 0)
            continue
        want, want_lse = batch.expected(row, **options)
        eps = float(jnp.finfo(batch.q.dtype).eps)
        # P is rounded to 16 bits for the product, and the output once more.
        largest = np.abs(batch.values[row].astype(np.float32)).max()
        np.testing.assert_allclose(out[row], want, atol=2e-3 + eps * largest, rtol=eps)
        np.testing.assert_allclose(lse[row], want_lse, atol=2e-5, rtol=2e-6)


# -- against the equation ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("config", [SMALL, ONE_PAIR], ids=["two pairs", "one pair"])
def test_every_length_around_a_page_a_tile_and_a_split(config):
    batch = Batch([1, 15, 16, 17, 0, 63, 64, 65, 200, 224, 30])
    out, lse = batch.run(config, num_decode=10)  # the last row is a chunk's: not ours
    assert_right(batch, out, lse, used=10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [dict(window=70, soft_cap=4.0), dict(window=1), dict(sinks=True, alibi=True), dict(window=130, sinks=True)],
    ids=lambda x: "+".join(x),
)
def test_what_models_add(options):
    batch = Batch([200, 1, 0, 71, 129])
    batch.forget_before(options.get("window"))
    assert_right(batch, *batch.run(**options), **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "config"),
    [
        (dict(H=3, G=1, page_size=64, pages_a_row=3, dtype=jnp.float16), SMALL),
        (dict(H=2, G=2, D=128, page_size=128, pages_a_row=2), SMALL),
        (dict(H=12, G=1, D=192, page_size=8, pages_a_row=17), ONE_PAIR),
    ],
    ids=["3 heads a group, f16", "page of two tiles", "12 heads a group, 192 dims"],
)
def test_shapes(shape, config):
    batch = Batch([130, 7], **shape)
    assert_right(batch, *batch.run(config))


@pytest.mark.slow
def test_merge_of_many_heads_by_one_cta(monkeypatch):  # which reads two splits at once: the row has four
    monkeypatch.setattr(kernel, "CTAS_AT_ONCE", 0)
    batch = Batch([200, 0, 65], H=6, G=1, D=128)
    assert_right(batch, *batch.run())


@pytest.mark.slow
def test_a_row_does_not_depend_on_the_others():
    batch = Batch([200, 33, 65, 128])
    together, lse_together = batch.run()
    batch.kv_lens = np.array([0, 0, 65, 0], np.int32)
    alone, lse_alone = batch.run()
    np.testing.assert_array_equal(alone[2], together[2])
    np.testing.assert_array_equal(lse_alone[2], lse_together[2])


@pytest.mark.slow
def test_no_races_and_no_reads_out_of_bounds(capsys):
    batch = Batch([150, 1, 66])
    options = dict(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
    with pytest.MonkeyPatch.context() as patch:
        strict = functools.partial(kernel.interpreter, **options)
        patch.setattr(kernel, "interpreter", strict)
        out, lse = batch.run(dataclasses.replace(SMALL, split_size=128), window=100)  # traced anew
    assert_right(batch, out, lse, window=100)
    assert "RACE" not in capsys.readouterr().out  # that is how the interpreter says it


# -- the list of work --------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=6),
    st.one_of(st.none(), st.integers(1, 320)),
    st.sampled_from([64, 128]),
)
def test_the_list_has_every_split_that_a_query_sees_once(kv_lens, window, size):
    splits = kernel._cut(DecodeConfig(split_size=size), 300, window)
    places, number = kernel._work_list(splits, np.array(kv_lens, np.int32))
    want = []
    for row, n in enumerate(kv_lens):
        seen = range(max(n - window, 0) if window else 0, n)
        want += [row * splits.most + i for i in range(len({t // size for t in seen}))]
        assert len({t // size for t in seen}) <= splits.most
    assert number.tolist() == [len(want)]
    assert places[: len(want)].tolist() == want and not places[len(want) :].any()


def test_splits_grow_with_what_a_row_may_hold_but_not_with_what_it_holds():
    cut = lambda longest, window=None: kernel._cut(DecodeConfig(split_size=256), longest, window)
    assert cut(4096) == (256, 16, None)
    assert cut(131072) == (4096, 32, None)  # at most 32 splits a row
    assert cut(131072, window=1024)[:2] == (256, 5)  # a window bounds them too


# -- limits ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        (dict(D=80), "not 80"),
        (dict(D=320), "not 320"),
        (dict(page_size=48), "not 48"),
        (dict(page_size=4), "not 4"),
        (dict(H=65, G=1), "not 65"),
        (dict(dtype=np.float32), "not float32"),
    ],
)
def test_what_it_cannot_do_it_refuses_and_names_who_can(changes, limit):
    batch = Batch([5], **{"pages_a_row": 2, **changes})
    with pytest.raises(NotImplementedError, match=f"{limit}.*triton"):
        batch.run()


def test_pages_of_another_dtype_are_refused():
    batch = Batch([5])
    batch.q = batch.q.astype(np.float16)
    with pytest.raises(NotImplementedError, match="float16 and bfloat16.*triton"):
        batch.run()


def test_no_rows():
    batch = Batch([])
    assert batch.run()[0].shape == (0, 4, 64)


@pytest.mark.parametrize("D", [64, 128, 192, 256])
def test_the_default_configuration_fits(D):
    config = tuning.configuration("NVIDIA H200", 32, 8, D, 32, jnp.bfloat16)
    assert tuning.decode_shared_memory(config.decode, D) <= tuning.SHARED_MEMORY
    in_flight = config.decode.pairs * config.decode.stages * 2 * config.decode.tile * D * 2
    assert in_flight >= 128 * 1024


def test_a_measured_configuration_wins_over_the_default(monkeypatch):
    mine = TuningConfig(decode=DecodeConfig(split_size=1024))
    shape = tuning.Shape(32, 8, 128, 32, "bfloat16")
    monkeypatch.setattr(tuning, "CONFIGURATIONS", {"NVIDIA H200": {shape: mine}})
    assert tuning.configuration("NVIDIA H200", *shape) == mine
    assert tuning.configuration("NVIDIA H100 80GB HBM3", *shape) == tuning.default(128)
    assert tuning.configuration("NVIDIA H200", *shape._replace(page_size=16)) == tuning.default(128)


def test_the_interpreter_gets_one_cta():
    config = tuning.configuration("cpu", 32, 8, 128, 32, jnp.bfloat16)
    assert config.decode.num_ctas == config.decode.pairs == config.prefill.num_ctas == 1


def test_a_configuration_that_does_not_fit_is_refused():
    batch = Batch([5])
    with pytest.raises(NotImplementedError, match="[0-9]{3},[0-9]{3} bytes of shared memory.*232,448.*triton"):
        batch.run(DecodeConfig(tile=256, stages=2, split_size=256))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DecodeConfig(tile=48), "tile must be .* is 48"),
        (lambda: DecodeConfig(stages=1), "stages must be >= 2, is 1"),
        (lambda: DecodeConfig(split_size=100), "100 must be a multiple of tile 64"),
        (lambda: DecodeConfig(split_size=0), "0 must be a multiple"),
        (lambda: DecodeConfig(pairs=3), "pairs must be 1 or 2, is 3"),
        (lambda: DecodeConfig(num_ctas=0), "num_ctas must be >= 1, is 0"),
        (lambda: PrefillConfig(block_kv=100), "block_kv must be .* is 100"),
    ],
)
def test_configurations_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
