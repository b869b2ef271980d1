"""The one list of shapes: kernel tests take those with `test=True`, the kernel benchmark and the compile report those of
real models.

Dims are those of `pallas_kernels.ops`: T tokens and R rows of the step, M pages a row, P pages, K page size, H query
heads, G key/value heads, D head dim. A row is (kv_len, num_queries); rows with one query come first.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Rows = tuple[tuple[int, int], ...]


class Shape(NamedTuple):
    """One call of paged attention. sinks, alibi: whether there are any. kv_dtype: the cache's, if not the queries'."""

    name: str
    H: int
    G: int
    D: int
    page_size: int
    rows: Rows
    window: int | None = None
    chunk: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    alibi: bool = False
    dtype: str = "float32"
    kv_dtype: str | None = None
    test: bool = False

    @property
    def num_tokens(self) -> int:
        """T: the bucket that the rows' queries fit."""
        return _bucket(sum(n for _, n in self.rows))

    @property
    def num_rows(self) -> int:
        """R: the bucket that the rows fit; as many as tokens where all are decodes."""
        return _bucket(len(self.rows))

    @property
    def pages_a_row(self) -> int:
        """M: what the longest row needs, and one more: engines have longer tables than any sequence of a step fills."""
        return -(-max(kv_len for kv_len, _ in self.rows) // self.page_size) + 1

    @property
    def num_pages(self) -> int:
        """P: the null page, all rows' pages and three that nobody owns."""
        return 4 + sum(-(-kv_len // self.page_size) for kv_len, _ in self.rows)


class Metadata(NamedTuple):
    """Where a step's tokens are, int32: what `paged_attention` takes after the pages."""

    page_table: np.ndarray  # [R, M]
    kv_lens: np.ndarray  # [R]
    query_start: np.ndarray  # [R + 1]
    counts: np.ndarray  # [2]


def _bucket(n: int) -> int:
    return 1 << (n - 1).bit_length()


def metadata(shape: Shape, rng: np.random.Generator) -> Metadata:
    """Pages in random order; entries that no row needs are 0."""
    n, starts = len(shape.rows), np.cumsum([0, *(queries for _, queries in shape.rows)])
    lengths = np.zeros(shape.num_rows, np.int32)
    lengths[:n] = [kv_len for kv_len, _ in shape.rows]
    query_start = np.full(shape.num_rows + 1, starts[-1], np.int32)
    query_start[: n + 1] = starts
    table = np.zeros((shape.num_rows, shape.pages_a_row), np.int32)
    free = iter(1 + rng.permutation(shape.num_pages - 1))
    for row, kv_len in enumerate(lengths):
        for i in range(-(-int(kv_len) // shape.page_size)):
            table[row, i] = next(free)
    num_decode = sum(queries == 1 for _, queries in shape.rows)
    return Metadata(table, lengths, query_start, np.array([num_decode, n], np.int32))


def _edges(K: int) -> Rows:
    """Decodes of 1, K - 1, K, K + 1 and several pages' tokens; five, so that groups of four are not full."""
    return (1, 1), (K - 1, 1), (K, 1), (K + 1, 1), (5 * K + 2, 1)


def _mixed(K: int) -> Rows:
    """Decodes, then whole prompts of the same edges, then a chunk that goes on with a sequence."""
    return (*_edges(K), (K - 1, K - 1), (K, K), (K + 1, K + 1), (6 * K + 1, K + 3))


LONG = (1, 1), (300, 1), (129, 1), (128, 128), (190, 65)  # more than a block of keys or a tile of queries of any backend
SPLITS = (512, 1), (511, 1), (513, 1), (1300, 1), (1, 1), (600, 3)  # around the places where long decodes are cut

TINY = (
    Shape("decodes", 4, 2, 16, 4, _edges(4)),
    Shape("chunks", 4, 2, 16, 4, ((3, 3), (4, 4), (5, 5), (21, 9))),
    Shape("mixed", 4, 2, 16, 8, _mixed(8)),
    Shape("one token", 4, 2, 16, 4, ((1, 1),)),
    Shape("one decode", 4, 2, 16, 4, ((37, 1),)),
    Shape("one chunk", 4, 2, 16, 4, ((7, 7),)),
    Shape("mha", 3, 3, 16, 8, _mixed(8)),
    Shape("mqa", 6, 1, 16, 8, _mixed(8)),
    Shape("odd sizes", 6, 3, 24, 5, _mixed(5)),
    Shape("long", 2, 1, 16, 16, LONG),
    Shape("pages longer than a block", 2, 1, 16, 256, LONG),
    Shape("window of one", 4, 2, 16, 4, _mixed(4), window=1),
    Shape("window", 4, 2, 16, 4, _mixed(4), window=6),
    Shape("long window", 2, 1, 16, 16, LONG, window=131),
    Shape("positions in chunks of one", 4, 2, 16, 4, _mixed(4), chunk=1),
    Shape("positions in chunks", 4, 2, 16, 4, _mixed(4), chunk=8),
    Shape("positions in odd chunks", 6, 3, 24, 5, _mixed(5), chunk=7, sinks=True, alibi=True),
    Shape("positions in long chunks", 2, 1, 16, 16, LONG, chunk=128),
    Shape("soft cap", 4, 2, 16, 8, _mixed(8), soft_cap=2.0),
    Shape("sinks", 4, 2, 16, 8, _mixed(8), sinks=True),
    Shape("alibi", 6, 2, 16, 8, _mixed(8), alibi=True),
    Shape("all at once", 4, 2, 16, 8, LONG, window=40, soft_cap=3.0, sinks=True, alibi=True),
    Shape("splits", 4, 2, 16, 16, SPLITS, sinks=True),
    Shape("splits and a window", 3, 1, 16, 64, SPLITS, window=700, alibi=True),
    Shape("splits and chunks", 3, 1, 16, 64, SPLITS, chunk=600, window=590, soft_cap=3.0),
    Shape("int8 cache", 4, 2, 16, 8, _mixed(8), kv_dtype="int8"),
    Shape("int8 cache, all at once", 6, 2, 24, 5, LONG, window=40, soft_cap=3.0, sinks=True, alibi=True, kv_dtype="int8"),
    Shape("float8 cache", 4, 2, 16, 8, _mixed(8), kv_dtype="float8_e4m3fn"),
    Shape("float8 cache of bfloat16 queries", 4, 1, 64, 64, SPLITS, dtype="bfloat16", kv_dtype="float8_e4m3fn"),
    Shape("bfloat16", 4, 2, 32, 8, (*_mixed(8), (300, 40)), dtype="bfloat16"),
    Shape("float16", 4, 2, 32, 8, (*_mixed(8), (300, 40)), window=50, sinks=True, dtype="float16"),
    Shape("heads of SmolLM2-135M", 9, 3, 64, 16, _mixed(16)),
    Shape("heads of Gemma-3-270M", 4, 1, 256, 32, _mixed(16), window=20),
)

DECODES = ((1024, 1),) * 64
RAGGED = tuple((64 + 131 * i, 1) for i in range(32))
PROMPT = ((2048, 2048),)
CHUNK = (*((1024, 1),) * 32, (6144, 2048))
LOADS = {"64 decodes at 1k": DECODES, "32 ragged decodes": RAGGED, "prompt of 2k": PROMPT, "32 decodes and a chunk": CHUNK}


def _real(name: str, H: int, G: int, D: int, window: int | None = None, dtype: str = "bfloat16") -> tuple[Shape, ...]:
    return tuple(Shape(f"{name}, {load}", H, G, D, 32, rows, window=window, dtype=dtype) for load, rows in LOADS.items())


SHAPES = (
    *(shape._replace(test=True) for shape in TINY),
    *_real("Llama-3-8B", 32, 8, 128),
    *_real("Llama-3-70B at TP=8", 8, 1, 128),
    *_real("Qwen3-30B-A3B", 32, 4, 128),
    *_real("Gemma-3-27B local", 32, 16, 128, window=1024),
    *_real("SmolLM2-135M", 9, 3, 64),
    *_real("Gemma-3-270M local", 4, 1, 256, window=512),
)


# -- operations beside attention, in the sizes of real models ----------------------------------------------------------------


class Logits(NamedTuple):
    """A call of `sample`: R rows of V words."""

    R: int
    V: int


class Experts(NamedTuple):
    """A call of `grouped_matmul`: T rows (tokens x experts a token) of E inputs, X experts with F outputs."""

    name: str
    T: int
    E: int
    F: int
    X: int


class Weights(NamedTuple):
    """A call of `quantized_matmul`: T tokens, E inputs, F outputs, `size` inputs a scale."""

    bits: int
    T: int
    E: int
    F: int
    size: int


SAMPLES = tuple(Logits(R, V) for V in (128256, 262144) for R in (1, 64, 256))  # Llama 3, Gemma 3
EXPERTS = tuple(  # of Qwen3-30B-A3B: 8 of 128, gate and up, down
    Experts(name, 8 * tokens, E, F, 128) for name, E, F in (("up", 2048, 1536), ("down", 768, 2048)) for tokens in (8, 64, 2048)
)
WEIGHTS = tuple(  # of Llama-3-8B: a scale a row for 8 bits, one for 128 inputs for 4
    Weights(bits, T, 4096, F, size) for bits, size in ((8, 4096), (4, 128)) for F in (4096, 14336) for T in (1, 16, 64, 2048)
)
