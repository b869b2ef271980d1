"""KV writes in plain jnp: one scatter, in place when the caches are donated."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int32, Num

from pallas_kernels.checks import QUANTIZED


def write_kv(
    k_pages: Num[Array, "P K G D"],
    v_pages: Num[Array, "P K G D"],
    k: Float[Array, "T G D"],
    v: Float[Array, "T G D"],
    pages: Int32[Array, " T"],
    offsets: Int32[Array, " T"],
    *,
    k_scales: Float32[Array, "P K G"] | None = None,
    v_scales: Float32[Array, "P K G"] | None = None,
) -> tuple[Array, ...]:
    """See `pallas_kernels.ops.write_kv`. Padding has a page past the end, never -1: that would be the last page."""
    put = lambda cache, new: cache.at[pages, offsets].set(new.astype(cache.dtype), mode="drop")
    if k_scales is None or v_scales is None:
        return put(k_pages, k), put(v_pages, v)
    (k, k_scale), (v, v_scale) = quantize(k, k_pages.dtype), quantize(v, v_pages.dtype)
    return put(k_pages, k), put(v_pages, v), put(k_scales, k_scale), put(v_scales, v_scale)


def quantize(x: Float[Array, "*B D"], dtype: jnp.dtype) -> tuple[Num[Array, "*B D"], Float32[Array, "*B"]]:
    """x / scale in a cache's dtype, and the scales: max |x| over the last axis is the dtype's largest number."""
    x = x.astype(jnp.float32)
    largest = QUANTIZED[str(jnp.dtype(dtype))]
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1) / largest, jnp.finfo(jnp.float32).tiny)  # not 0, for zeros
    n = jnp.clip(x / scale[..., None], -largest, largest)
    return (jnp.round(n) if jnp.issubdtype(dtype, jnp.integer) else n).astype(dtype), scale
