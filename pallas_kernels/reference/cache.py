"""KV writes in plain jnp: one scatter, in place when the caches are donated."""

from jax import Array
from jaxtyping import Float, Int32


def write_kv(
    k_pages: Float[Array, "P K G D"],
    v_pages: Float[Array, "P K G D"],
    k: Float[Array, "T G D"],
    v: Float[Array, "T G D"],
    pages: Int32[Array, " T"],
    offsets: Int32[Array, " T"],
) -> tuple[Float[Array, "P K G D"], Float[Array, "P K G D"]]:
    """See `pallas_kernels.ops.write_kv`. Padding has a page past the end, never -1: that would be the last page."""
    k_pages = k_pages.at[pages, offsets].set(k.astype(k_pages.dtype), mode="drop")
    v_pages = v_pages.at[pages, offsets].set(v.astype(v_pages.dtype), mode="drop")
    return k_pages, v_pages
