"""The contract that every kernel backend fulfils: shapes, checks, equations, and how a backend is chosen.

Dims: T query tokens of the step, R rows (sequences) of the step, M pages of a row, P pages of the pool, K tokens a
page, H query heads, G key/value heads (H a multiple of G), D head dim.

A backend is a package beside this file that offers `OPS: Ops` and `supported(device) -> str | None` (None: it can run;
else why not). `ValueError` means that the caller is wrong, `NotImplementedError` that this backend cannot.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int32

log = logging.getLogger(__name__)

BACKENDS = ("reference",)  # best first: "auto" takes the first that supports the device


class PagedAttention(Protocol):
    def __call__(
        self,
        q: Float[Array, "T H D"],
        k_pages: Float[Array, "P K G D"],
        v_pages: Float[Array, "P K G D"],
        page_table: Int32[Array, "R M"],
        kv_lens: Int32[Array, " R"],
        query_start: Int32[Array, " R+1"],
        counts: Int32[Array, " 2"],
        *,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks: Float[Array, " H"] | None = None,
    ) -> tuple[Float[Array, "T H D"], Float32[Array, "T H"]]: ...


class WriteKV(Protocol):
    def __call__(
        self,
        k_pages: Float[Array, "P K G D"],
        v_pages: Float[Array, "P K G D"],
        k: Float[Array, "T G D"],
        v: Float[Array, "T G D"],
        pages: Int32[Array, " T"],
        offsets: Int32[Array, " T"],
    ) -> tuple[Float[Array, "P K G D"], Float[Array, "P K G D"]]: ...


class Ops(NamedTuple):
    """One backend's implementation of the contract."""

    name: str
    paged_attention: PagedAttention
    write_kv: WriteKV


def backend(name: str = "auto", device: Any = None) -> Ops:
    """The operations of a backend. "auto" takes the best one that supports `device` (a jax.Device; None: JAX's first) and
    logs the choice; a named backend never falls back: NotImplementedError says why it cannot run here."""
    device = jax.devices()[0] if device is None else device
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"kernel backend {name!r} is unknown; known: auto, {', '.join(BACKENDS)}.")
    reasons = {}
    for candidate in BACKENDS if name == "auto" else (name,):
        module = importlib.import_module(f"pallas_kernels.{candidate}")
        reason = module.supported(device)
        if reason is None:
            log.info("kernel backend: %s (on %s%s)", candidate, device.device_kind, _passed_over(reasons))
            return module.OPS
        reasons[candidate] = reason
    raise NotImplementedError(f"no kernel backend runs on {device.device_kind}: {reasons}")


def _passed_over(reasons: dict[str, str]) -> str:
    return "".join(f"; not {name}: {why}" for name, why in reasons.items())


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
    soft_cap: float | None = None,
    sinks: Array | None = None,
    implementation: str = "auto",
) -> tuple[Array, Array]:
    """Causal attention of a ragged batch of queries over keys and values in pages.

    Row r owns the queries `q[query_start[r] : query_start[r + 1]]`, which are the *last* tokens of a sequence of
    `kv_lens[r]` tokens: query i of the row has position `kv_lens[r] - n + i` (n queries in the row). Token t of the
    sequence lies in page `page_table[r, t // K]`, at offset `t % K`. For query position x and head h (g = h // (H/G)):

        s[t] = scale * q[h] . k[t, g]                       s[t] = soft_cap * tanh(s[t] / soft_cap)   if soft_cap
        out  = sum_t exp(s[t]) v[t, g] / Z                  Z = sum_t exp(s[t]) (+ exp(sinks[h])      if sinks)
        over t <= x                                         (and t > x - window                       if window)
        lse  = log Z

    Args:
      q: [T, H, D]. Rows' queries lie one behind the other, decodes (rows with one query) first.
      k_pages, v_pages: [P, K, G, D].
      page_table: int32 [R, M]; every entry in 0..P-1, also those past a row's last page, which mean nothing.
      kv_lens: int32 [R], the queries' own tokens included (their keys are already in the pages); 0 for unused rows.
      query_start: int32 [R + 1].
      counts: int32 [2]: (rows that are decodes, rows in use). Rows from the first to counts[0] have one query each.
      scale, window, soft_cap: static. sinks: [H] or None.
      implementation: a backend's name or "auto".
    Returns: out [T, H, D] in q's dtype and lse float32 [T, H]. Tokens of no row hold finite values of no meaning. What is
    in no row's sequence (other pages, places past kv_lens) may hold anything, also NaN, and changes nothing.
    Source: Kwon et al. 2023 (PagedAttention); online softmax of Milakov & Gimelshein 2018.
    """
    check_attention(q, k_pages, v_pages, page_table, kv_lens, query_start, counts, window, sinks)
    ops = backend(implementation)
    return ops.paged_attention(q, k_pages, v_pages, page_table, kv_lens, query_start, counts, scale=scale,
                               window=window, soft_cap=soft_cap, sinks=sinks)  # fmt: skip


def write_kv(
    k_pages: Array, v_pages: Array, k: Array, v: Array, pages: Array, offsets: Array, implementation: str = "auto"
) -> tuple[Array, Array]:
    """Writes token i's key and value at `[pages[i], offsets[i]]`; a page >= P drops it (padding). Donate the caches.

    k_pages, v_pages: [P, K, G, D]; k, v: [T, G, D]; pages, offsets: int32 [T]. Returns the new caches.
    """
    if k.shape[1:] != k_pages.shape[2:] or v.shape[1:] != v_pages.shape[2:] or k.shape[0] != pages.shape[0]:
        raise ValueError(f"write_kv: k {k.shape}, v {v.shape}, {pages.shape[0]} places do not fit {k_pages.shape}.")
    return backend(implementation).write_kv(k_pages, v_pages, k, v, pages, offsets)


def check_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    kv_lens: Array,
    query_start: Array,
    counts: Array,
    window: int | None,
    sinks: Array | None,
) -> None:
    """Raises ValueError, with the shapes, when the arguments of `paged_attention` do not fit each other."""
    (_, H, D), (_, _, G, _), (R, _) = q.shape, k_pages.shape, page_table.shape
    rules = {
        f"k_pages {k_pages.shape} and v_pages {v_pages.shape} must be alike": k_pages.shape == v_pages.shape,
        f"head dim of q {q.shape} and of k_pages {k_pages.shape} must be equal": D == k_pages.shape[3],
        f"{H} query heads must be a multiple of {G} key/value heads": H % G == 0,
        f"kv_lens must be [{R}], is {kv_lens.shape}": kv_lens.shape == (R,),
        f"query_start must be [{R + 1}], is {query_start.shape}": query_start.shape == (R + 1,),
        f"counts must be [2], is {counts.shape}": counts.shape == (2,),
        f"window must be None or >= 1, is {window}": window is None or window >= 1,
        f"sinks must be None or [{H}]": sinks is None or sinks.shape == (H,),
        "page_table, kv_lens, query_start and counts must be int32": all(
            x.dtype == jnp.int32 for x in (page_table, kv_lens, query_start, counts)
        ),
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise ValueError("paged_attention: " + "; ".join(broken) + ".")
