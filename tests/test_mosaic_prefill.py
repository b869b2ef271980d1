"""The Hopper prefill kernel in JAX's interpreter, which simulates warpgroups, TMA and barriers (but not the tensor cores), and
the list of work that it walks. A call of the kernel takes seconds: few and small."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.mosaic_gpu import prefill as host
from pallas_kernels.mosaic_gpu.interpret import interpreter
from pallas_kernels.mosaic_gpu.prefill import prefill
from pallas_kernels.mosaic_gpu.prefill_kernel import FIRST, GRANULE, KV_LEN, LAST, QUERIES, ROW, TILE, Problem
from pallas_kernels.mosaic_gpu.tuning import PrefillConfig

SMALL = PrefillConfig(block_kv=64, num_ctas=2)
# The kernel rounds probabilities to the cache's dtype, as FlashAttention does: an output that is the small difference of large
# terms is off by 2^-9 (2^-12) of the terms, which are normal numbers, and not of itself.
TOLERANCES = {"bfloat16": dict(atol=6e-3, rtol=2**-8), "float16": dict(atol=2e-3, rtol=1e-3)}


class Batch:
    """rows: (kv_len, queries); the first `decodes` of them are not the kernel's. There are unused rows, tokens and table
    entries, and what is no row's is NaN."""

    def __init__(self, rows, H, G, D=64, K=16, dtype="bfloat16", decodes=0, seed=0):
        rng = np.random.default_rng(seed)
        normal = lambda *dims: rng.standard_normal(dims).astype(jnp.dtype(dtype))
        pages_of = [-(-kv_len // K) for kv_len, _ in rows]
        R, M, P, n = len(rows) + 1, max(pages_of) + 1, sum(pages_of) + 3, sum(q for _, q in rows)
        nan = lambda *dims: np.full(dims, np.nan, jnp.dtype(dtype))
        self.rows, self.decodes, self.dtype, self.scale = rows, decodes, dtype, 0.3 * (64 / D) ** 0.5
        self.keys, self.values = ([normal(kv_len, G, D) for kv_len, _ in rows] for _ in range(2))
        self.q = np.concatenate([normal(n, H, D), nan(3, H, D)])
        self.k_pages, self.v_pages = nan(P, K, G, D), nan(P, K, G, D)
        self.table = rng.integers(0, P, (R, M)).astype(np.int32)
        free = iter(rng.permutation(P))
        for r, (kv_len, _) in enumerate(rows):
            self.table[r, : pages_of[r]] = [next(free) for _ in range(pages_of[r])]
            for t in range(kv_len):
                at = self.table[r, t // K], t % K
                self.k_pages[at], self.v_pages[at] = self.keys[r][t], self.values[r][t]
        self.kv_lens = np.array([*(kv_len for kv_len, _ in rows), 0], np.int32)
        self.query_start = np.cumsum([0, *(q for _, q in rows), 0]).astype(np.int32)
        self.counts = np.array([decodes, len(rows)], np.int32)

    def run(self, config=SMALL, interpret=True, **options):
        out, lse = prefill(
            self.q, self.k_pages, self.v_pages, self.table, self.kv_lens, self.query_start, self.counts,
            scale=self.scale, config=config, interpret=interpret, **options,
        )  # fmt: skip
        assert out.shape == self.q.shape and out.dtype == self.q.dtype and lse.dtype == jnp.float32
        return np.asarray(out), np.asarray(lse)

    def oracle(self, r, window=None, soft_cap=None, sinks=None, alibi=None):
        """The equation of `ops.paged_attention` in float64: out [queries, H, D] and lse [queries, H] of row r."""
        kv_len, n = self.rows[r]
        H, G = self.q.shape[1], self.keys[r].shape[1]
        x, t = np.arange(kv_len - n, kv_len)[:, None], np.arange(kv_len)[None]
        seen = (t <= x) & (t > x - (window or kv_len))
        q = self.q[self.query_start[r] :][:n].astype(np.float64)
        outs, lses = [], []
        for h in range(H):
            keys, values = (x[r][:, h // (H // G)].astype(np.float64) for x in (self.keys, self.values))
            s = self.scale * q[:, h] @ keys.T
            s = soft_cap * np.tanh(s / soft_cap) if soft_cap else s
            s = np.where(seen, s if alibi is None else s + alibi[h] * (t - x), -np.inf)
            weights = np.exp(s)
            total = weights.sum(1) + (0 if sinks is None else np.exp(sinks[h]))
            outs.append(weights @ values / total[:, None])
            lses.append(np.log(total))
        return np.stack(outs, 1), np.stack(lses, 1)


def assert_right(batch, out, lse, **options):
    assert np.isfinite(out.astype(np.float32)).all() and np.isfinite(lse).all()
    for r in range(batch.decodes, len(batch.rows)):
        mine = slice(batch.query_start[r], batch.query_start[r + 1])
        right_out, right_lse = batch.oracle(r, **options)
        np.testing.assert_allclose(out[mine].astype(np.float64), right_out, **TOLERANCES[batch.dtype])
        np.testing.assert_allclose(lse[mine], right_lse, atol=1e-5, rtol=1e-5)


def heads(H):
    rng = np.random.default_rng(1)
    return dict(sinks=rng.standard_normal(H).astype(np.float32), alibi=-rng.random(H).astype(np.float32) / 10)


# -- the kernel --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rows_around_the_edges_of_pages_and_blocks():
    """Behind a decode; whole prompts and chunks that go on; ends on, before and behind an edge; more tiles than CTAs."""
    batch = Batch([(5, 1), (15, 15), (64, 64), (65, 30), (129, 2), (200, 1)], H=4, G=1, decodes=1)
    assert_right(batch, *batch.run())


@pytest.mark.slow
def test_window_soft_cap_sinks_and_slopes():
    """Three heads a group: 126 of a tile's 128 rows."""
    batch = Batch([(70, 50), (190, 60)], H=6, G=2, K=32, dtype="float16")
    options = dict(window=45, soft_cap=3.0, **heads(6))
    assert_right(batch, *batch.run(dataclasses.replace(SMALL, stages=3), **options), **options)


@pytest.mark.slow
def test_pages_longer_than_a_block():
    batch = Batch([(140, 70), (256, 3)], H=2, G=1, K=128)
    assert_right(batch, *batch.run(window=130), window=130)


@pytest.mark.slow
def test_head_dim_256():
    """Other code: a CTA has one item of work, and outputs take the queries' place. A group larger than half a tile's rows."""
    batch = Batch([(66, 3), (20, 2)], H=48, G=1, D=256)
    assert_right(batch, *batch.run())


@pytest.mark.slow
def test_a_row_does_not_depend_on_the_others():
    batch = Batch([(40, 40), (100, 37)], H=4, G=2)
    together = batch.run()
    batch.kv_lens[0] = 17
    batch.query_start[1] = 17
    batch.q = np.concatenate([batch.q[:17], batch.q[40:], batch.q[:23]])
    batch.query_start[2:] = 17 + 37
    alone = batch.run()
    for x, y in zip(together, alone):
        np.testing.assert_array_equal(x[40:77], y[17:54])


@pytest.mark.slow
def test_no_races_and_no_reads_out_of_bounds(capsys):
    """More blocks than stages, more tiles than CTAs; the longest sequence ends with the table, in the middle of a block."""
    batch = Batch([(290, 35), (33, 1)], H=4, G=1)
    batch.table = batch.table[:, :-1]
    strict = interpreter(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
    options = dict(sinks=heads(4)["sinks"], window=200)
    out, lse = batch.run(dataclasses.replace(SMALL, num_ctas=1), strict, **options)
    assert_right(batch, out, lse, **options)
    assert "RACE" not in capsys.readouterr().out  # that is how the interpreter says it


@pytest.mark.parametrize("change", [dict(D=96), dict(K=24), dict(dtype="float32"), dict(H=80)], ids=str)
def test_refuses_what_it_does_not_have(change):
    batch = Batch([(20, 5)], **{**dict(H=4, G=1, D=64, K=16), **change})
    with pytest.raises(NotImplementedError, match="triton"):
        batch.run()


# -- the list of work --------------------------------------------------------------------------------------------------------


make_plan = jax.jit(host._plan, static_argnums=(0, 1, 2, 3))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_every_query_is_in_one_tile_of_its_row(data):
    """What the kernel computes for a tile's row is of the query that the packed queries have there, and goes to its place."""
    n, window, T = data.draw(st.sampled_from([(1, None, 500), (3, 100, 40), (7, None, 300), (8, 1, 60), (48, 100, 200)]))
    decodes = data.draw(st.integers(0, 3), "decodes")
    chunks = data.draw(st.lists(st.integers(1, T), max_size=4), "queries")
    ends = np.minimum(np.cumsum([0, *[1] * decodes, *chunks]), T)  # often all tokens are used
    queries = np.diff(ends)
    before = np.array(data.draw(st.lists(st.integers(0, 1000), min_size=len(queries), max_size=len(queries))), int)
    R = 8
    start = np.full(R + 1, ends[-1], np.int32)
    start[: len(ends)] = ends
    kv_lens = np.zeros(R, np.int32)
    kv_lens[: len(queries)] = before + queries
    per_tile = 128 // n
    p = Problem(1, 64, n, per_tile, -(-per_tile * n // GRANULE) * GRANULE, 64, 16, 16, 2, 1.0, window, None, False, False, None)
    counts = np.array([decodes, len(queries)], np.int32)
    plan = make_plan(p, T, R, 64, kv_lens, start, counts)
    work, tokens, in_group = np.asarray(plan.work), np.asarray(plan.packed[0]), np.asarray(plan.packed[1])
    places, used = np.asarray(plan.places), int(plan.num_used[0])

    expected = {(int(t), h) for t in range(sum(queries[:decodes]), sum(queries)) for h in range(n)}
    found = []
    for item in work[:used]:
        row, first, last = item[ROW], item[FIRST], item[LAST]
        assert item[KV_LEN] == kv_lens[row] and 0 <= last - first < per_tile
        for y in range((last - first + 1) * n):
            token, head = tokens[item[QUERIES] * GRANULE + y], in_group[item[QUERIES] * GRANULE + y]
            assert token - start[row] + before[row] == first + y // n  # its position
            assert places[token, head] == item[TILE] * 128 + y
            found.append((int(token), int(head)))
        assert item[QUERIES] * GRANULE + 128 <= len(tokens)
    assert len(found) == len(set(found)) and set(found) == expected
    np.testing.assert_array_equal(plan.is_ours, [(t, 0) in expected for t in range(T)])
    seen = work[:used, LAST] - (0 if window is None else np.maximum(work[:used, FIRST] - window + 1, 0))
    assert (np.diff(seen) <= 0).all()  # longest first
