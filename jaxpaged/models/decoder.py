"""The decoder, top to bottom. A family is a `DecoderConfig` made by its door; this file knows no family's name.

Activations are columns: `[E, T]`, a token a column, so that a layer is `W x` as in the papers and weights are
`[out, in]`, the order of the checkpoints. (On CPU it is also the fast order: with 32 tokens `W x` takes two thirds of
the time of `x W'`.) Attention works on rows, `[T, H, D]`.

The module is built and named with Flax NNX; the engine runs it on plain leaves (`nnx.split` once, `nnx.merge` inside
the traced step). `Decoder.__call__` is the ordinary forward pass of whole sequences, differentiable, without a cache.

Dims: T tokens, E embed, F ffn, H query heads, G key/value heads, D head dim, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Float32, Int32

from jaxpaged.models.rope import Rope, rotate

Attend = Callable[[int, Array, Array, Array], Array]
"""(layer, q [T, H, D], k [T, G, D], v [T, G, D]) -> [T, H, D]: where the keys and values live is its business."""

FLOAT32 = jnp.dtype(jnp.float32)

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


@dataclass(frozen=True)
class LayerSpec:
    """What varies from layer to layer: how it rotates, and how far back it sees (None: to the beginning)."""

    rope: Rope
    window: int | None = None


@dataclass(frozen=True)
class DecoderConfig:
    """The mathematical choices of a decoder."""

    vocab_size: int
    embed_dim: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    max_positions: int  # the longest sequence the model was made for
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # RMSNorm multiplies by (offset + weight)
    qk_norm: bool = False  # RMSNorm of each head's query and key before rotation
    attention_bias: bool = False  # biases of q, k, v
    out_bias: bool = False  # bias of the attention's output
    mlp_bias: bool = False
    post_norms: bool = False  # norms after attention and after the MLP as well as before
    activation: str = "silu"
    query_scale: float | None = None  # None: head_dim ** -0.5
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    embed_scale: float = 1.0
    tie: bool = False  # the head is the embedding

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale


class Linear(nnx.Module):
    """y = W x (+ b); W [out, in], x [in, T]."""

    def __init__(self, n_in: int, n_out: int, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (n_out, n_in), dtype) * n_in**-0.5)
        self.bias = nnx.Param(jnp.zeros((n_out,), dtype)) if bias else None

    def __call__(self, x: Array) -> Array:
        y = columns_product(self.weight[...], x)
        return y if self.bias is None else y + self.bias[...][:, None]


def columns_product(
    w: Float[Array, "out in"], x: Float[Array, "in T"], dtype: jnp.dtype | None = None
) -> Float[Array, "out T"]:
    """W x for W [out, in], x [in, T]. A single column goes as a row times W': XLA on CPU then streams W once at the
    speed of memory. (`reshape`, not `.T`: XLA folds transposes into the product, which is then the slow one again.)"""
    if x.shape[1] == 1:
        row = jax.lax.dot_general(x.reshape(1, -1), w, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
        return row.reshape(-1, 1)
    return jax.lax.dot_general(w, x, (((1,), (0,)), ((), ())), preferred_element_type=dtype)


class RMSNorm(nnx.Module):
    """Normalises along `axis` in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, config: DecoderConfig, dtype: jnp.dtype, axis: int = 0):
        self.weight = nnx.Param(jnp.full((dim,), 1.0 - config.norm_offset, dtype))
        self.eps, self.offset, self.axis = config.norm_eps, config.norm_offset, axis

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=self.axis, keepdims=True) + self.eps)
        shape = [1] * x.ndim
        shape[self.axis] = -1
        weight = self.weight[...].astype(jnp.float32).reshape(shape) + self.offset
        return (y * weight).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention. One product makes q, k and v: W [(H + 2 G) D, E]."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        c = self.config = config
        heads = c.num_heads + 2 * c.num_kv_heads
        self.qkv = Linear(c.embed_dim, heads * c.head_dim, c.attention_bias, dtype, rngs)
        self.out = Linear(c.num_heads * c.head_dim, c.embed_dim, c.out_bias, dtype, rngs)
        self.q_norm = RMSNorm(c.head_dim, c, dtype, axis=2) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c, dtype, axis=2) if c.qk_norm else None

    def __call__(
        self, x: Float[Array, "E T"], layer: int, cos: Float[Array, "T half"], sin: Float[Array, "T half"], attend: Attend
    ) -> Float[Array, "E T"]:
        H, G, D = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        heads = self.qkv(x).reshape(H + 2 * G, D, -1).transpose(2, 0, 1)  # [T, H + 2 G, D]
        q, k, v = heads[:, :H], heads[:, H : H + G], heads[:, H + G :]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        y = attend(layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.out(y.reshape(-1, H * D).T)


class GatedMLP(nnx.Module):
    """W_down (act(W_gate x) * (W_up x)) (Shazeer 2020); gate and up are one product, W [2 F, E]."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        c = config
        self.gate_up = Linear(c.embed_dim, 2 * c.ffn_dim, c.mlp_bias, dtype, rngs)
        self.down = Linear(c.ffn_dim, c.embed_dim, c.mlp_bias, dtype, rngs)
        self.activation = c.activation

    def __call__(self, x: Array) -> Array:
        gate, up = jnp.split(self.gate_up(x), 2, axis=0)
        return self.down(ACTIVATIONS[self.activation](gate) * up)


class Layer(nnx.Module):
    """Pre-norm residual block; with `post_norms` each branch is normalised again before it is added."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        norm = lambda: RMSNorm(config.embed_dim, config, dtype)
        self.attention_norm, self.attention = norm(), Attention(config, dtype, rngs)
        self.mlp_norm, self.mlp = norm(), GatedMLP(config, dtype, rngs)
        self.attention_post_norm = norm() if config.post_norms else None
        self.mlp_post_norm = norm() if config.post_norms else None

    def __call__(self, x: Array, layer: int, cos: Array, sin: Array, attend: Attend) -> Array:
        y = self.attention(self.attention_norm(x), layer, cos, sin, attend)
        x = x + (y if self.attention_post_norm is None else self.attention_post_norm(y))
        y = self.mlp(self.mlp_norm(x))
        return x + (y if self.mlp_post_norm is None else self.mlp_post_norm(y))


class Embedding(nnx.Module):
    """W [V, E]: looked up by token, or multiplied by as the head."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        shape = config.vocab_size, config.embed_dim
        self.weight = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * config.embed_dim**-0.5)

    def lookup(self, tokens: Int32[Array, " T"]) -> Float[Array, "E T"]:
        """int32 [T] -> [E, T]."""
        return self.weight[...].at[tokens].get(mode="clip").T


def head_logits(weight: Float[Array, "V E"], hidden: Float[Array, "E R"], config: DecoderConfig) -> Float32[Array, "R V"]:
    """Head W [V, E] times hidden [E, R] -> logits float32 [R, V]."""
    # The barrier keeps XLA from folding the transpose into the product: on CPU that takes 65 ms for 2 rows instead of 5.
    logits = jax.lax.optimization_barrier(columns_product(weight, hidden, FLOAT32)).T
    cap = config.logit_soft_cap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


class Decoder(nnx.Module):
    """Embedding, layers, norm, head."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype = FLOAT32, rngs: nnx.Rngs | None = None):
        rngs = rngs or nnx.Rngs(0)
        self.config = config
        self.embed = Embedding(config, dtype, rngs)
        self.layers = nnx.List([Layer(config, dtype, rngs) for _ in config.layers])
        self.norm = RMSNorm(config.embed_dim, config, dtype)
        self.head = None if config.tie else Embedding(config, dtype, rngs)

    def hidden(self, tokens: Int32[Array, " T"], positions: Int32[Array, " T"], attend: Attend) -> Float[Array, "E T"]:
        """tokens, positions int32 [T] -> the last layer's output, normalised, [E, T]."""
        x = self.embed.lookup(tokens)
        if self.config.embed_scale != 1.0:
            x = x * jnp.asarray(self.config.embed_scale, x.dtype)
        ropes = {spec.rope for spec in self.config.layers}
        tables = {rope: rope.tables(positions) for rope in ropes}
        for i, (spec, layer) in enumerate(zip(self.config.layers, self.layers)):
            x = layer(x, i, *tables[spec.rope], attend)
        return self.norm(x)

    def logits(self, hidden: Array) -> Array:
        """[E, R] -> float32 [R, V]."""
        return head_logits((self.head or self.embed).weight[...], hidden, self.config)

    def __call__(self, tokens: Int32[Array, "B T"]) -> Float32[Array, "B T V"]:
        """Whole sequences, causal, without a cache: tokens int32 [B, T] -> logits float32 [B, T, V]."""
        attend = full_attention(self.config)
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        return jax.vmap(lambda row: self.logits(self.hidden(row, positions, attend)))(tokens)


def full_attention(config: DecoderConfig) -> Attend:
    """Causal attention among the tokens at hand: the cacheless `Attend`, for training and as an oracle."""

    def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
        T, H, D = q.shape
        x = q.reshape(T, config.num_kv_heads, -1, D).astype(jnp.float32) * config.scale
        s = jnp.einsum("sgqd,tgd->gqst", x, k.astype(jnp.float32))
        if config.attention_soft_cap is not None:
            s = config.attention_soft_cap * jnp.tanh(s / config.attention_soft_cap)
        at = jnp.arange(T)
        seen = at[None, :] <= at[:, None]
        window = config.layers[layer].window
        if window is not None:
            seen &= at[None, :] > at[:, None] - window
        p = jax.nn.softmax(jnp.where(seen[None, None], s, -jnp.inf), axis=-1)
        return jnp.einsum("gqst,tgd->sgqd", p, v.astype(jnp.float32)).reshape(T, H, D).astype(q.dtype)

    return attend
