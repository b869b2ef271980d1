"""The parts of a layer: products, norms, attention, MLP.

Activations are columns: `[E, T]`, a token a column, so that a layer is `W x` as in the papers and weights are
`[out, in]`, the order of the checkpoints. (On CPU it is also the fast order: with 32 tokens `W x` takes two thirds of
the time of `x W'`.) Attention works on rows, `[T, H, D]`.

Dims: T tokens, E embed, F ffn, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int32

from jaxpaged.axis import ONE, Axis
from jaxpaged.models.rope import Rope, rotate
from jaxpaged.models.spec import AttentionSpec, LayerSpec, MLPSpec, NormSpec, QKNorm

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_quick": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


@runtime_checkable
class Step(Protocol):
    """What a layer asks of who runs it: where keys and values live, which kernels there are, and who else computes a part of
    the layer, is the runner's business."""

    axis: Axis

    def attend(self, layer: int, q: Array, k: Array, v: Array | None, sinks: Array | None) -> Array:
        """q [T, H, D], k [T, G, D], v [T, G, D] -> [T, H, D]. v None: the values are the first numbers of the keys, as many
        as the layer's spec says. sinks [H]."""
        ...

    def grouped_matmul(self, x: Array, w: Array, group_sizes: Array) -> Array:
        """As `pallas_kernels.ops.grouped_matmul`."""
        ...

    def quantized_matmul(self, x: Array, w: Array, scales: Array, zeros: Array | None) -> Array:
        """As `pallas_kernels.ops.quantized_matmul`."""
        ...

    def adapt(self, x: Array, a: Array, b: Array) -> Array | None:
        """What the adapters [S, ...] of a product add to it, for x [in, T] (see `adapters`); None: nothing."""
        ...


class Positions(NamedTuple):
    """Of the tokens at hand: int32 [T], and cos and sin [T, half] of each rotation of the model."""

    at: Array
    tables: Mapping[Rope, tuple[Array, Array]]

    def rotate(self, x: Array, rope: Rope | None) -> Array:
        """x [T, heads, D]."""
        return x if rope is None else rotate(x, *self.tables[rope], rope.interleaved)


class Product(nnx.Module):
    """y = W x (+ b) (+ what adapters add); W [out, in], x [in, T]. How W is kept is the subclass's business. `summed`: where
    several devices share a layer, each has some of the inputs, and y is its share of a sum."""

    bias: nnx.Param | None
    shape: tuple[int, int]
    summed: bool
    adapters: nnx.Module | None

    def __call__(self, x: Array, step: Step) -> Array:
        y = self.product(x, step)
        if self.bias is not None:
            bias = self.bias[...][:, None]
            y = y + (step.axis.once(bias) if self.summed else bias)
        added = None if self.adapters is None else self.adapters(x, step)  # pyright: ignore[reportCallIssue]
        return y if added is None else y + added

    def product(self, x: Array, step: Step) -> Array:
        """W x."""
        raise NotImplementedError


class Linear(Product):
    """W as it is."""

    def __init__(self, n_in: int, n_out: int, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs, summed: bool = False):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (n_out, n_in), dtype) * n_in**-0.5)
        self.bias = nnx.Param(jnp.zeros((n_out,), dtype)) if bias else None
        self.shape, self.summed, self.adapters = (n_out, n_in), summed, nnx.data(None)

    def product(self, x: Array, step: Step) -> Array:
        return columns_product(self.weight[...], x)

    def dense(self, dtype: jnp.dtype) -> Array:
        """W; what stands in the place of a product may keep it otherwise."""
        return self.weight[...].astype(dtype)


def columns_product(
    w: Float[Array, "out in"], x: Float[Array, "in T"], dtype: jnp.dtype | None = None
) -> Float[Array, "out T"]:
    """W x for W [out, in], x [in, T]. A single column goes as a row times W': XLA on CPU then streams W once at the
    speed of memory. (`reshape`, not `.T`: XLA folds transposes into the product, which is then the slow one again.)"""
    if x.shape[1] == 1:
        row = jax.lax.dot_general(x.reshape(1, -1), w, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
        return row.reshape(-1, 1)
    return jax.lax.dot_general(w, x, (((1,), (0,)), ((), ())), preferred_element_type=dtype)


class Norm(nnx.Module):
    """Normalises x along `axes`, in float32 (Zhang & Sennrich 2019; Ba et al. 2016). Its weight has `shape`, and `view` is
    that shape as it lies along x."""

    def __init__(self, spec: NormSpec, shape: tuple[int, ...], dtype: jnp.dtype,
                 view: tuple[int, ...] = (-1, 1), axes: tuple[int, ...] = (0,)):  # fmt: skip
        self.weight = nnx.Param(jnp.full(shape, 1.0 - spec.offset, dtype)) if spec.weight else None
        self.bias = nnx.Param(jnp.zeros(shape, dtype)) if spec.bias else None
        self.spec, self.view, self.axes = spec, view, axes

    def __call__(self, x: Array, over: Axis = ONE) -> Array:
        """over: devices that have a part each of the numbers that are normalised together."""
        y = x.astype(jnp.float32)
        mean = lambda y: over.sum(jnp.mean(y, axis=self.axes, keepdims=True)) / over.size
        if self.spec.kind == "layer":
            y = y - mean(y)
        y = y * jax.lax.rsqrt(mean(jnp.square(y)) + self.spec.eps)
        if self.weight is not None:
            y = y * (self.weight[...].astype(jnp.float32).reshape(self.view) + self.spec.offset)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32).reshape(self.view)
        return y.astype(x.dtype)


def _head_norm(spec: QKNorm, heads: int, head_dim: int, dtype: jnp.dtype) -> Norm:
    """A norm of x [T, heads, D]."""
    shape, view, axes = {
        "head": ((head_dim,), (1, 1, head_dim), (2,)),
        "heads": ((heads, head_dim), (1, heads, head_dim), (2,)),
        "all": ((heads * head_dim,), (1, heads, head_dim), (1, 2)),
    }[spec.over]
    return Norm(spec.norm, shape, dtype, view, axes)


class Attention(nnx.Module):
    """Grouped-query attention. One product makes q, k and v: W [(H + 2 G) D, E]. What it returns is a share of a sum, as of
    `MLP` and the others that stand in their place: see `Step.axis`."""

    def __init__(self, embed_dim: int, spec: LayerSpec, dtype: jnp.dtype, rngs: nnx.Rngs):
        assert isinstance(spec.attention, AttentionSpec)
        s, self.rope = spec.attention, spec.rope
        self.spec = s
        self.qkv = Linear(embed_dim, (s.num_heads + 2 * s.num_kv_heads) * s.head_dim, s.bias, dtype, rngs)
        self.out = Linear(s.num_heads * s.head_dim, embed_dim, s.out_bias, dtype, rngs, summed=True)
        self.q_norm = _head_norm(s.qk_norm, s.num_heads, s.head_dim, dtype) if s.qk_norm else None
        self.k_norm = _head_norm(s.qk_norm, s.num_kv_heads, s.head_dim, dtype) if s.qk_norm else None
        self.sinks = nnx.Param(jnp.zeros((s.num_heads,), dtype)) if s.sinks else None

    def __call__(self, x: Float[Array, "E T"], layer: int, positions: Positions, step: Step) -> Float[Array, "E T"]:
        s = self.spec
        H, G, D = s.num_heads, s.num_kv_heads, s.head_dim
        heads = self.qkv(x, step).reshape(H + 2 * G, D, -1).transpose(2, 0, 1)  # [T, H + 2 G, D]
        q, k, v = heads[:, :H], heads[:, H : H + G], heads[:, H + G :]
        if s.qk_norm is not None and not s.qk_norm.after_rope:
            q, k = self._norm(q, k, step.axis)
        if s.clip is not None:
            q, k, v = (jnp.clip(part, -s.clip, s.clip) for part in (q, k, v))
        q, k = positions.rotate(q, self.rope), positions.rotate(k, self.rope)
        if s.qk_norm is not None and s.qk_norm.after_rope:
            q, k = self._norm(q, k, step.axis)
        if s.temperature is not None:
            q = q * _temperature(positions.at, *s.temperature)[:, None, None].astype(q.dtype)
        y = step.attend(layer, q, k, v, None if self.sinks is None else self.sinks[...])
        return self.out(y.reshape(-1, H * D).T, step)

    def _norm(self, q: Array, k: Array, axis: Axis) -> tuple[Array, Array]:
        assert self.q_norm is not None and self.k_norm is not None and self.spec.qk_norm is not None
        over = axis if self.spec.qk_norm.over == "all" else ONE
        return self.q_norm(q, over), self.k_norm(k, over)


def _temperature(positions: Int32[Array, " T"], length: float, weight: float) -> Float[Array, " T"]:
    return 1.0 + weight * jnp.log1p(jnp.floor((positions + 1).astype(jnp.float32) / length))


class MLP(nnx.Module):
    """See `MLPSpec`; gate and up are one product, W [2 F, E]."""

    def __init__(self, embed_dim: int, spec: MLPSpec, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.activation, width = spec.activation, spec.ffn_dim
        self.gate_up = Linear(embed_dim, 2 * width, spec.bias, dtype, rngs) if spec.gated else None
        self.up = None if spec.gated else Linear(embed_dim, width, spec.bias, dtype, rngs)
        self.down = Linear(width, embed_dim, spec.bias, dtype, rngs, summed=True)

    def __call__(self, x: Float[Array, "E T"], step: Step) -> Float[Array, "E T"]:
        if self.up is not None:
            return self.down(ACTIVATIONS[self.activation](self.up(x, step)), step)
        assert self.gate_up is not None
        gate, up = jnp.split(self.gate_up(x, step), 2, axis=0)
        return self.down(glu(self.activation, gate, up), step)


def glu(activation: str, gate: Array, up: Array) -> Array:
    """act(gate) * up; "clamped_swiglu" is gpt-oss's: (up + 1) * gate * sigmoid(1.702 gate), both clamped at 7."""
    if activation != "clamped_swiglu":
        return ACTIVATIONS[activation](gate) * up
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return (up + 1.0) * ACTIVATIONS["gelu_quick"](gate)
