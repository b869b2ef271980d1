"""Low-rank adapters (LoRA, Hu et al. 2021): many of them beside one product, a token's chosen by number.

A product W with adapters gives `W x + B[s] A[s] x` for a token of slot s, and `W x` for one that has none. Tokens are sorted
by slot once a step, so that each adapter in use is read once (as S-LoRA, Sheng et al. 2023, and Punica, Chen et al. 2023).
Slots are filled and emptied without compiling anything: they are weights.

Dims: S slots, T tokens, R largest rank, P parts of a product that lie one below the other (q, k and v; gate and up), each with
a rank of its own: A [S, P R, in], B [S, out, P R].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int32

from jaxpaged.models.decoder import Decoder
from jaxpaged.models.layers import Product, Step

PARTS = {"qkv": 3, "gate_up": 2, "out": 1, "up": 1, "down": 1, "q": 1, "q_down": 1, "kv_down": 1}
"""The products that can be adapted, by their name in a layer, and how many parts they have."""


class Slots(NamedTuple):
    """How many adapters there may be at once, and their largest rank. num 0: none."""

    num: int = 0
    rank: int = 0


NO_ADAPTERS = Slots()


class Adapters(nnx.Module):
    """The adapters of one product."""

    def __init__(self, slots: Slots, parts: int, n_in: int, n_out: int, dtype: jnp.dtype):
        self.a = nnx.Param(jnp.zeros((slots.num, parts * slots.rank, n_in), dtype))
        self.b = nnx.Param(jnp.zeros((slots.num, n_out, parts * slots.rank), dtype))

    def __call__(self, x: Float[Array, "in T"], step: Step) -> Float[Array, "out T"] | None:
        """What is to be added to the product; None if no token has an adapter."""
        return step.adapt(x, self.a[...], self.b[...])


def with_adapters(model: Decoder, slots: Slots, dtype: jnp.dtype) -> Decoder:
    """The decoder with room for adapters at each product that can have them."""
    for _, product, name in adaptable(model) if slots.num else ():
        n_out, n_in = product.shape
        product.adapters = Adapters(slots, PARTS[name], n_in, n_out, dtype)
    return model


def adaptable(model: Decoder) -> Iterator[tuple[str, Product, str]]:
    """(dotted path, product, its name in the layer)."""
    for path, parent in list(nnx.iter_graph(model)):
        if isinstance(parent, nnx.Module):
            for name, child in list(vars(parent).items()):
                if name in PARTS and isinstance(child, Product):
                    yield ".".join(map(str, (*path, name))), child, name


class Sorted(NamedTuple):
    """A step's tokens by slot: `order` [T] sorts them (those without an adapter last), `back` undoes it, `sizes` [S]."""

    order: Array
    back: Array
    sizes: Array


def sort(slot: Int32[Array, " T"], num: int) -> Sorted:
    """slot: of each token; -1 or any other number outside of 0..num-1: none."""
    group = jnp.where((slot >= 0) & (slot < num), slot, num)
    order = jnp.argsort(group, stable=True).astype(jnp.int32)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=jnp.int32))
    return Sorted(order, back, jnp.zeros((num,), jnp.int32).at[group].add(1, mode="drop"))


def apply(x: Float[Array, "in T"], a: Array, b: Array, tokens: Sorted, grouped_matmul: Callable) -> Float[Array, "out T"]:
    """B[s] A[s] x for each token; 0 where it has no adapter."""
    low = grouped_matmul(x.T[tokens.order], a, tokens.sizes)
    return grouped_matmul(low, b, tokens.sizes)[tokens.back].T
