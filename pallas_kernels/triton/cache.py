"""KV writes in Pallas-Triton: keys and values, quantised on the way, in one launch and in place."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.checks import QUANTIZED
from pallas_kernels.triton.blocks import HOPPER, Capability
from pallas_kernels.triton.tile import both, load


@partial(jax.jit, static_argnames=("capability", "interpret"))  # as attention: traced once a step
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
    capability: Capability | None,
    interpret: bool,
) -> tuple[Array, ...]:
    """See `pallas_kernels.ops.write_kv`. capability: of the GPU (None: any, when interpreted)."""
    refuse_float8(k_pages.dtype, capability)
    T, G, D = k.shape
    caches = [k_pages, v_pages] if k_scales is None or v_scales is None else [k_pages, v_pages, k_scales, v_scales]
    P = k_pages.shape[0]
    power = lambda n: 1 << (n - 1).bit_length()

    def body(k_ref, v_ref, pages_ref, offsets_ref, *refs):
        t = pl.program_id(0)
        page, offset = pages_ref[t], offsets_ref[t]
        outs = refs[len(caches) :]
        g, d = jnp.arange(power(G), dtype=jnp.int32), jnp.arange(power(D), dtype=jnp.int32)
        heads = None if power(G) == G else g < G
        mask = both(heads, None if power(D) == D else d < D, (power(G), power(D)))

        @pl.when(page < P)  # padding has none
        def _():
            for i, new in enumerate((k_ref, v_ref)):
                x = load(new.at[t, g[:, None], d[None, :]], mask)
                if len(caches) == 4:
                    x, scales = _quantize(x, outs[i].dtype)
                    plt.store(outs[2 + i].at[page, offset, g], scales, mask=heads)
                plt.store(outs[i].at[page, offset, g[:, None], d[None, :]], x.astype(outs[i].dtype), mask=mask)

    return tuple(pl.pallas_call(
        body,
        grid=(T,),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in caches],
        input_output_aliases={4 + i: i for i in range(len(caches))},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="write_kv",
    )(k, v, pages, offsets, *caches))  # fmt: skip


def refuse_float8(dtype: jnp.dtype, capability: Capability | None) -> None:
    """Before Ada there are no instructions for float8, and Triton ends the process when it meets one."""
    if dtype == jnp.float8_e4m3fn and (capability or HOPPER) < (8, 9):
        raise NotImplementedError(f"triton: a float8 cache needs compute capability 8.9, this GPU has {capability}; int8 works "
                                  "here, and the backend reference can")  # fmt: skip


def _quantize(x: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """[G, D] -> x / scale in a cache's dtype, scales [G]: as `reference.cache.quantize`."""
    x = x.astype(jnp.float32)
    largest = QUANTIZED[str(jnp.dtype(dtype))]
    scales = jnp.maximum(jnp.max(jnp.abs(x), axis=1) / largest, jnp.finfo(jnp.float32).tiny)
    n = jnp.clip(x / scales[:, None], -largest, largest)
    return _round(n) if dtype == jnp.int8 else n, scales


def _round(x: Array) -> Array:
    """To the nearest whole number, of two the even one (there is no such instruction in Pallas-Triton)."""
    up = jnp.floor(x + 0.5)
    odd_tie = (up - x == 0.5) & (up != 2 * jnp.floor(up * 0.5))
    return jnp.where(odd_tie, up - 1, up)
