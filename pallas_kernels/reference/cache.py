"""KV writes in plain jnp: one scatter, in place when the caches are donated."""

from jax import Array


def write_kv(k_pages: Array, v_pages: Array, k: Array, v: Array, pages: Array, offsets: Array) -> tuple[Array, Array]:
    """See `pallas_kernels.ops.write_kv`. Padding has a page past the end, never -1: that would be the last page."""
    k_pages = k_pages.at[pages, offsets].set(k.astype(k_pages.dtype), mode="drop")
    v_pages = v_pages.at[pages, offsets].set(v.astype(v_pages.dtype), mode="drop")
    return k_pages, v_pages
