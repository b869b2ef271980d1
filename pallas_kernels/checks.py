"""What may be asked of an operation: each function raises one ValueError that names all that is wrong, with the shapes."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

QUANTIZED = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""Dtypes of a quantised cache -> the largest number that a key or a value is scaled to."""


def _refuse(operation: str, rules: dict[str, bool]) -> None:
    """rules: what must hold, in words with the numbers -> whether it does."""
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise ValueError(f"{operation}: " + "; ".join(broken) + ".")


def check_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    kv_lens: Array,
    query_start: Array,
    counts: Array,
    window: int | None,
    chunk: int | None,
    soft_cap: float | None,
    sinks: Array | None,
    alibi: Array | None,
    k_scales: Array | None,
    v_scales: Array | None,
) -> None:
    """Of `ops.paged_attention`."""
    if (q.ndim, k_pages.ndim, page_table.ndim) != (3, 4, 2):
        raise ValueError(f"paged_attention: q must be [T, H, D], k_pages [P, K, G, D] and page_table [R, M]; they are "
                         f"{q.shape}, {k_pages.shape} and {page_table.shape}.")  # fmt: skip
    (_, H, D), (_, _, G, _), (R, _) = q.shape, k_pages.shape, page_table.shape
    _refuse("paged_attention", {
        f"k_pages {k_pages.shape} and v_pages {v_pages.shape} must be alike": _alike(k_pages, v_pages),
        f"head dim of q {q.shape} and of k_pages {k_pages.shape} must be equal": D == k_pages.shape[3],
        f"{H} query heads must be a multiple of {G} key/value heads": H % G == 0,
        f"kv_lens must be [{R}], is {kv_lens.shape}": kv_lens.shape == (R,),
        f"query_start must be [{R + 1}], is {query_start.shape}": query_start.shape == (R + 1,),
        f"counts must be [2], is {counts.shape}": counts.shape == (2,),
        f"window must be None or >= 1, is {window}": window is None or window >= 1,
        f"chunk must be None or >= 1, is {chunk}": chunk is None or chunk >= 1,
        f"soft_cap must be None or > 0, is {soft_cap}": soft_cap is None or soft_cap > 0,
        f"sinks must be None or [{H}]": sinks is None or sinks.shape == (H,),
        f"alibi must be None or [{H}]": alibi is None or alibi.shape == (H,),
        "page_table, kv_lens, query_start and counts must be int32": all(
            x.dtype == jnp.int32 for x in (page_table, kv_lens, query_start, counts)
        ),
        **_scale_rules(k_pages, k_scales, v_scales),
    })  # fmt: skip


def check_write(
    k_pages: Array,
    v_pages: Array,
    k: Array,
    v: Array,
    pages: Array,
    offsets: Array,
    k_scales: Array | None,
    v_scales: Array | None,
) -> None:
    """Of `ops.write_kv`."""
    places = pages.shape == offsets.shape == k.shape[:1] == v.shape[:1]
    _refuse("write_kv", {
        f"k_pages {k_pages.shape} and v_pages {v_pages.shape} must be alike": _alike(k_pages, v_pages),
        f"k {k.shape}, v {v.shape}, {pages.shape[0]} places do not fit {k_pages.shape}": places
        and k.shape[1:] == v.shape[1:] == k_pages.shape[2:],
        **_scale_rules(k_pages, k_scales, v_scales),
    })  # fmt: skip


def _alike(x: Array, y: Array) -> bool:
    return (x.shape, x.dtype) == (y.shape, y.dtype)


def _scale_rules(pages: Array, k_scales: Array | None, v_scales: Array | None) -> dict[str, bool]:
    if k_scales is None and v_scales is None:
        return {f"a cache of {pages.dtype} needs k_scales and v_scales": str(pages.dtype) not in QUANTIZED}
    fits = lambda x: x is not None and x.shape == pages.shape[:3] and x.dtype == jnp.float32
    return {
        f"scales are for caches of {', '.join(QUANTIZED)}, not of {pages.dtype}": str(pages.dtype) in QUANTIZED,
        f"k_scales and v_scales must both be float32 {pages.shape[:3]}": fits(k_scales) and fits(v_scales),
    }


def check_sample(logits: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array, bits: Array) -> None:
    """Of `ops.sample`."""
    R = logits.shape[0]
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    rules = {f"{name} must be [{R}], is {x.shape}": x.shape == (R,) for name, x in given.items()}
    _refuse("sample", rules | {
        f"logits must be float32 [R, V], are {logits.dtype} {logits.shape}": logits.ndim == 2 and logits.dtype == jnp.float32,
        f"bits must be uint32 [{R}, 2], are {bits.dtype} {bits.shape}": bits.shape == (R, 2) and bits.dtype == jnp.uint32,
    })  # fmt: skip


def check_grouped(x: Array, w: Array, group_sizes: Array) -> None:
    """Of `ops.grouped_matmul`."""
    fit = x.ndim == 2 and w.ndim == 3 and x.shape[1] == w.shape[2]
    _refuse("grouped_matmul", {
        f"x must be [T, E] and w [X, F, E], are {x.shape} and {w.shape}": fit,
        f"x and w must have one dtype, have {x.dtype} and {w.dtype}": x.dtype == w.dtype,
        f"group_sizes must be int32 [{w.shape[0]}], is {group_sizes.dtype} {group_sizes.shape}": group_sizes.dtype == jnp.int32
        and group_sizes.shape == w.shape[:1],
    })  # fmt: skip


def check_quantized(x: Array, w: Array, scales: Array, zeros: Array | None) -> None:
    """Of `ops.quantized_matmul`."""
    two = x.ndim == w.ndim == scales.ndim == 2
    E = x.shape[-1]
    columns = {"int8": E, "uint8": E // 2}.get(str(w.dtype))  # uint8: two 4-bit numbers a byte
    groups = scales.shape[-1]
    even = groups > 0 and E % groups == 0 and E // groups % 2 == 0
    kinds = f"int8 [F, {E}] or, for 4 bits, uint8 [F, {E // 2}]"
    _refuse("quantized_matmul", {
        f"w must be {kinds}; it is {w.dtype} {w.shape}": two and w.shape[1] == columns,
        f"scales must be [{w.shape[0]}, groups], are {scales.shape}": two and scales.shape[0] == w.shape[0],
        f"{E} inputs must be a multiple of {groups} groups of even size": even,
        f"zeros must be None or like scales {scales.shape}": zeros is None or zeros.shape == scales.shape,
    })  # fmt: skip


# -- at run time -----------------------------------------------------------------------------------------------------------


def debug_attention(k_pages: Array, page_table: Array, kv_lens: Array, query_start: Array, counts: Array) -> None:
    """Inside a traced function: checks the numbers when it runs. See `ops.backend`, debug_checks."""
    look = partial(look_at_rows, num_pages=k_pages.shape[0], page_size=k_pages.shape[1])
    jax.debug.callback(look, page_table, kv_lens, query_start, counts)


def debug_write(k_pages: Array, pages: Array, offsets: Array) -> None:
    """The same of a write."""
    jax.debug.callback(partial(look_at_places, num_pages=k_pages.shape[0], page_size=k_pages.shape[1]), pages, offsets)


def look_at_rows(page_table: Any, kv_lens: Any, query_start: Any, counts: Any, *, num_pages: int, page_size: int) -> None:
    """ValueError if the numbers of `ops.paged_attention`'s metadata are wrong: arrays with numbers, not traced ones."""
    page_table, kv_lens, query_start, counts = map(np.asarray, (page_table, kv_lens, query_start, counts))
    queries, (num_decode, num_rows) = np.diff(query_start), counts
    outside = (page_table < 0) | (page_table >= num_pages)
    first = f"row {outside.any(1).argmax()} has {page_table[outside][:1]}"
    longest = page_table.shape[1] * page_size
    _refuse("paged_attention", {
        f"page ids must be in 0..{num_pages - 1}; {first}": not outside.any(),
        f"kv_lens must be in 0..{longest}, are {kv_lens}": bool(((kv_lens >= 0) & (kv_lens <= longest)).all()),
        f"query_start must not fall, is {query_start}": bool((queries >= 0).all()),
        f"a row has more queries than tokens: {queries} of {kv_lens}": bool((queries <= kv_lens)[:num_rows].all()),
        f"counts {counts}: the first {num_decode} rows must have one query each, have {queries}": bool(
            0 <= num_decode <= num_rows <= len(kv_lens) and (queries[:num_decode] == 1).all()
        ),
    })  # fmt: skip


def look_at_places(pages: Any, offsets: Any, *, num_pages: int, page_size: int) -> None:
    """The same of the places that `ops.write_kv` writes to."""
    pages, offsets = np.asarray(pages), np.asarray(offsets)
    used = pages < num_pages
    places = np.stack([pages, offsets], 1)[used]
    _refuse("write_kv", {
        f"pages must be >= 0, are {pages}": bool((pages >= 0).all()),
        f"offsets must be in 0..{page_size - 1}, are {offsets}": bool(((offsets >= 0) & (offsets < page_size))[used].all()),
        "two tokens are written to one place": len(np.unique(places, axis=0)) == len(places),
    })  # fmt: skip
