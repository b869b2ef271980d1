"""The contract that every kernel backend fulfils: shapes, equations, and how a backend is chosen.

Dims: T query tokens of the step, R rows (sequences) of the step, M pages of a row, P pages of the pool, K tokens a
page, H query heads, G key/value heads (H a multiple of G), D head dim, V words; E inputs, F outputs, X experts.

A backend is a package beside this file that offers `supported(device) -> str | None` (None: it can run; else why not)
and `make(device, interpret) -> Ops`. `ValueError` means that the caller is wrong (checks.py), `NotImplementedError` that
this backend cannot; it names one that can.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import Array

from pallas_kernels import checks

log = logging.getLogger(__name__)

# "auto" takes the first that supports the device, operation by operation. The order is by how much of it has been proven.
BACKENDS = ("triton", "mosaic_gpu", "reference")


class Ops(NamedTuple):
    """One backend's operations: the functions of this module, unchecked and without `implementation`."""

    name: str
    paged_attention: Callable[..., tuple[Array, Array]]
    write_kv: Callable[..., tuple[Array, ...]]
    sample: Callable[..., Array]
    grouped_matmul: Callable[..., Array]
    quantized_matmul: Callable[..., Array]


# -- choosing --------------------------------------------------------------------------------------------------------------


def backend(name: str = "auto", device: Any = None, *, interpret: bool = False, debug_checks: bool = False) -> Ops:
    """The operations of a backend on `device` (a jax.Device; None: JAX's first).

    "auto" takes for each operation the best backend that supports the device and the shapes, and logs what it chose and
    why. A named backend never falls back: NotImplementedError says why it cannot run here.

    interpret: run Pallas kernels in JAX's interpreters, which need no GPU: to test them. debug_checks: each call also
    looks at the *numbers* (page ids within the pool, lengths within the table) when it runs, and fails with a ValueError
    inside JAX's runtime error: ids out of range clamp on CPU, and read or write foreign memory on a GPU.
    """
    device = jax.devices()[0] if device is None else device
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"kernel backend {name!r} is unknown; known: auto, {', '.join(BACKENDS)}")
    able, reasons = [], {}
    for candidate in BACKENDS if name == "auto" else (name,):
        module = importlib.import_module(f"pallas_kernels.{candidate}")
        reason = None if interpret else module.supported(device)
        if reason is None:
            able.append(module.make(device, interpret))
        else:
            reasons[candidate] = reason
    if not able:
        raise NotImplementedError(f"no kernel backend runs on {device.device_kind}: {reasons}")
    chosen = able[0] if len(able) == 1 else _first_that_can(able)
    log.info("kernel backend: %s (on %s%s)", chosen.name, device.device_kind, _passed_over(reasons))
    return _debugged(chosen) if debug_checks else chosen


def _passed_over(reasons: dict[str, str]) -> str:
    return "".join(f"; not {name}: {why}" for name, why in reasons.items())


def _first_that_can(candidates: Sequence[Ops]) -> Ops:
    """Each operation by the first candidate that does not refuse the shapes it is traced with."""
    return Ops("+".join(ops.name for ops in candidates), *(
        _try_each(operation, {ops.name: getattr(ops, operation) for ops in candidates}) for operation in Ops._fields[1:]
    ))  # fmt: skip


def _try_each(operation: str, functions: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    @functools.cache  # of a trace a layer, one line
    def say(name: str, refusals: tuple[str, ...]) -> None:
        log.info("%s: by %s, as %s", operation, name, "; ".join(refusals))

    def call(*arguments: Any, **options: Any) -> Any:
        refusals: tuple[str, ...] = ()
        for name, function in functions.items():
            try:
                result = function(*arguments, **options)
            except NotImplementedError as error:
                refusals += (str(error),)
            else:
                if refusals:
                    say(name, refusals)
                return result
        raise NotImplementedError("; ".join(refusals))

    return call


def _debugged(ops: Ops) -> Ops:
    def attention(q, k_pages, v_pages, page_table, kv_lens, query_start, counts, **options):
        checks.debug_attention(k_pages, page_table, kv_lens, query_start, counts)
        return ops.paged_attention(q, k_pages, v_pages, page_table, kv_lens, query_start, counts, **options)

    def write(k_pages, v_pages, k, v, pages, offsets, **options):
        checks.debug_write(k_pages, pages, offsets)
        return ops.write_kv(k_pages, v_pages, k, v, pages, offsets, **options)

    return ops._replace(paged_attention=attention, write_kv=write)


@functools.cache
def _named(name: str) -> Ops:
    return backend(name)


def _operations(implementation: str | Ops) -> Ops:
    return _named(implementation) if isinstance(implementation, str) else implementation


# -- operations ------------------------------------------------------------------------------------------------------------


def paged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    kv_lens: Array,
    query_start: Array,
    counts: Array,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    alibi: Array | None = None,
    k_scales: Array | None = None,
    v_scales: Array | None = None,
    implementation: str | Ops = "auto",
) -> tuple[Array, Array]:
    """Causal attention of a ragged batch of queries over keys and values in pages.

    Row r owns the queries `q[query_start[r] : query_start[r + 1]]`, which are the *last* tokens of a sequence of
    `kv_lens[r]` tokens: query i of the row has position `kv_lens[r] - n + i` (n queries in the row). Token t of the
    sequence lies in page `page_table[r, t // K]`, at offset `t % K`. For query position x and head h (g = h // (H/G)):

        s[t] = scale * q[h] . k[t, g]                       s[t] = soft_cap * tanh(s[t] / soft_cap)   if soft_cap
                                                            s[t] = s[t] + alibi[h] * (t - x)          if alibi
        out  = sum_t exp(s[t]) v[t, g] / Z                  Z = sum_t exp(s[t]) (+ exp(sinks[h])      if sinks)
        over t <= x                                         (and t > x - window                       if window)
                                                            (and t >= x // chunk * chunk              if chunk)
        lse  = log Z

    Args:
      q: [T, H, D]. Rows' queries lie one behind the other, decodes (rows with one query) first.
      k_pages, v_pages: [P, K, G, D]: floats, or int8 / float8_e4m3fn with scales (see `write_kv`).
      page_table: int32 [R, M]; every entry in 0..P-1, also those past a row's last page, which mean nothing.
      kv_lens: int32 [R], the queries' own tokens included (their keys are already in the pages); 0 for unused rows.
      query_start: int32 [R + 1].
      counts: int32 [2]: (rows that are decodes, rows in use). Rows from the first to counts[0] have one query each.
      scale, window, chunk, soft_cap: static. sinks, alibi: [H] or None.
      k_scales, v_scales: float32 [P, K, G]: a quantised key or value is `pages[p, i, g] * scales[p, i, g]`.
      implementation: a backend's name, "auto", or what `backend` gave.
    Returns: out [T, H, D] in q's dtype and lse float32 [T, H]. Tokens of no row hold finite values of no meaning. Places past
    kv_lens, pages that no row has, and a row's pages that lie wholly before what its first query sees may hold anything, also
    NaN, and change nothing. What a row gets does not depend on the other rows, bit by bit, as long as the shapes of the arrays
    are the same.
    Source: Kwon et al. 2023 (PagedAttention); online softmax of Milakov & Gimelshein 2018; sinks as in gpt-oss; Press et
    al. 2022 (ALiBi).
    """
    checks.check_attention(q, k_pages, v_pages, page_table, kv_lens, query_start, counts, window, chunk, soft_cap, sinks,
                           alibi, k_scales, v_scales)  # fmt: skip
    return _operations(implementation).paged_attention(
        q, k_pages, v_pages, page_table, kv_lens, query_start, counts, scale=scale, window=window, chunk=chunk,
        soft_cap=soft_cap, sinks=sinks, alibi=alibi, k_scales=k_scales, v_scales=v_scales,
    )  # fmt: skip


def write_kv(
    k_pages: Array,
    v_pages: Array,
    k: Array,
    v: Array,
    pages: Array,
    offsets: Array,
    *,
    k_scales: Array | None = None,
    v_scales: Array | None = None,
    implementation: str | Ops = "auto",
) -> tuple[Array, ...]:
    """Writes token i's key and value at `[pages[i], offsets[i]]`; a page >= P drops it (padding). Donate the caches.

    k_pages, v_pages: [P, K, G, D]; k, v: [T, G, D]; pages, offsets: int32 [T]; no two tokens have one place. Numbers are
    cast to the cache's dtype. A cache of int8 or float8_e4m3fn has k_scales and v_scales, float32 [P, K, G]: one scale for
    each token and head, max |x| over D divided by 127 or 448; written is x / scale, int8 rounded to the nearest even.
    Returns: the new (k_pages, v_pages), or (k_pages, v_pages, k_scales, v_scales).
    """
    checks.check_write(k_pages, v_pages, k, v, pages, offsets, k_scales, v_scales)
    return _operations(implementation).write_kv(k_pages, v_pages, k, v, pages, offsets, k_scales=k_scales, v_scales=v_scales)


def sample(
    logits: Array,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
    bits: Array,
    implementation: str | Ops = "auto",
) -> Array:
    """Draws one id of each row of logits: int32 [R].

    The row becomes probabilities softmax(logits / temperature); of these are kept: those >= min_p times the highest, then
    those >= the top_k-th highest, then, of what is left, the most probable ones up to a mass of top_p (the one that
    crosses it included; words of equal probability at the edge are all kept). `bits`, 64 random ones a row, choose a
    place in the cumulative sum of what is kept, in the order of ids.

    logits: float32 [R, V]. temperature, top_p, min_p: float32 [R]; top_k: int32 [R]. bits: uint32 [R, 2], high word
    first. temperature 0: the row's highest logit (of equals, `bits` choose; bits 0: the lowest id). top_k <= 0 or >= V,
    top_p >= 1, min_p 0: off.
    Probabilities are whole numbers of about 2^-30: those below 2^-31 are 0. Rows with NaN, with +inf or without any
    finite logit get some id in [0, V). A row's id does not depend on the other rows.
    """
    checks.check_sample(logits, temperature, top_k, top_p, min_p, bits)
    return _operations(implementation).sample(logits, temperature, top_k, top_p, min_p, bits)


def grouped_matmul(x: Array, w: Array, group_sizes: Array, implementation: str | Ops = "auto") -> Array:
    """Each row of x times the matrix of its group: out[t] = w[g(t)] @ x[t], [T, F] in x's dtype, sums in float32.

    x: [T, E], rows sorted by group: the first group_sizes[0] rows are of group 0, the next group_sizes[1] of group 1, ...
    w: [X, F, E], each matrix as checkpoints have it: outputs first. group_sizes: int32 [X]; their sum may be below T: the
    rows left over are 0. A row's numbers do not depend on how many rows its group has.
    """
    checks.check_grouped(x, w, group_sizes)
    return _operations(implementation).grouped_matmul(x, w, group_sizes)


def quantized_matmul(
    x: Array, w: Array, scales: Array, zeros: Array | None = None, implementation: str | Ops = "auto"
) -> Array:
    """x @ W^T with W in 8 or 4 bits: [T, F] in x's dtype, sums in float32.

        W[f, e] = (n[f, e] - zeros[f, e // s]) * scales[f, e // s]             s = E / groups inputs share a scale

    x: [T, E]. w: int8 [F, E]: n itself; or uint8 [F, E/2]: 4-bit numbers 0..15, of which byte j of a group (0 <= j < s/2)
    holds input j in its low and input j + s/2 in its high half. scales: [F, groups] floats. zeros: [F, groups] floats, or
    None: 0 for int8 and 8 for 4 bits.
    """
    checks.check_quantized(x, w, scales, zeros)
    return _operations(implementation).quantized_matmul(x, w, scales, zeros)
