"""The decoder, top to bottom. A family is a `DecoderConfig` made by its door; this file knows no family's name.

The module is built and named with Flax NNX; the engine runs it on plain leaves (`nnx.split` once, `nnx.merge` inside
the traced step). `Decoder.__call__` is the ordinary forward pass of whole sequences, differentiable, without a cache.

Dims: T tokens, E embed, H query heads, G key/value heads, D head dim, V vocab. Activations are columns, [E, T].
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Float32, Int32

from jaxpaged.axis import ONE, Axis
from jaxpaged.models.layers import MLP, Attention, Norm, Positions, Step, columns_product
from jaxpaged.models.mla import LatentAttention
from jaxpaged.models.moe import MoE
from jaxpaged.models.spec import AttentionSpec, DecoderConfig, LayerSpec, MLASpec, MoESpec
from pallas_kernels import ops

FLOAT32 = jnp.dtype(jnp.float32)
NORMS = {  # block -> the norms it has: before attention, before the MLP, after attention, after the MLP
    "pre": (True, True, False, False),
    "post": (False, False, True, True),
    "both": (True, True, True, True),
    "parallel": (True, False, False, False),
    "parallel2": (True, True, False, False),
}


class Layer(nnx.Module):
    """Attention and MLP, each added to the stream; where the norms are is `DecoderConfig.block`."""

    def __init__(self, config: DecoderConfig, spec: LayerSpec, dtype: jnp.dtype, rngs: nnx.Rngs):
        E, self.scale, self.parallel = config.embed_dim, config.residual_scale, config.block.startswith("parallel")
        before, before_mlp, after, after_mlp = NORMS[config.block]
        norm = lambda wanted: Norm(config.norm, (E,), dtype) if wanted else None
        self.attention_norm, self.mlp_norm = norm(before), norm(before_mlp)
        kind = LatentAttention if isinstance(spec.attention, MLASpec) else Attention
        self.attention = kind(E, spec, dtype, rngs)
        self.mlp = (MoE(E, spec.mlp, dtype, rngs) if isinstance(spec.mlp, MoESpec)
                    else MLP(E, spec.mlp, dtype, rngs))  # fmt: skip
        self.attention_post_norm, self.mlp_post_norm = norm(after), norm(after_mlp)

    def __call__(self, x: Float[Array, "E T"], layer: int, positions: Positions, step: Step) -> Float[Array, "E T"]:
        axis = step.axis
        h = axis.gather(_normed(self.attention_norm, x))
        attended = self.attention(h, layer, positions, step)
        if self.parallel:
            h = h if self.mlp_norm is None else axis.gather(self.mlp_norm(x))
            return x + self._scaled(axis.reduce(attended + self.mlp(h, step)))
        x = x + self._scaled(_normed(self.attention_post_norm, axis.reduce(attended)))
        return x + self._scaled(_normed(self.mlp_post_norm, self._mlp(_normed(self.mlp_norm, x), step)))

    def _mlp(self, h: Float[Array, "E X"], step: Step) -> Float[Array, "E X"]:
        axis = step.axis
        if axis.ragged and axis.sequence and isinstance(self.mlp, MoE) and self.mlp.spec.held is not None:
            return self.mlp.sent(h, step)
        return axis.reduce(self.mlp(axis.gather(h), step))

    def _scaled(self, branch: Array) -> Array:
        return branch if self.scale == 1.0 else branch * jnp.asarray(self.scale, branch.dtype)


def _normed(norm: Norm | None, x: Array) -> Array:
    return x if norm is None else norm(x)


class Embedding(nnx.Module):
    """W [V, E]: looked up by token or position, or multiplied by as the head."""

    def __init__(self, num: int, embed_dim: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (num, embed_dim), dtype) * embed_dim**-0.5)

    def lookup(self, index: Int32[Array, " T"], axis: Axis = ONE) -> Float[Array, "E T"]:
        """int32 [T] -> [E, T]. axis: devices that have some of the rows each; the result is then a share of a sum."""
        table = self.weight[...]
        if axis.size == 1:
            return table.at[index].get(mode="clip").T
        at = jnp.clip(index, 0, axis.size * len(table) - 1) - axis.index() * len(table)
        held = (at >= 0) & (at < len(table))
        return jnp.where(held[:, None], table.at[jnp.where(held, at, 0)].get(mode="clip"), jnp.zeros((), table.dtype)).T


class Decoder(nnx.Module):
    """Embedding, layers, norm, head."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype = FLOAT32, rngs: nnx.Rngs | None = None):
        rngs, E = rngs or nnx.Rngs(0), config.embed_dim
        self.config = config
        self.embed = Embedding(config.vocab_size, E, dtype, rngs)
        self.positions = Embedding(config.learned_positions, E, dtype, rngs) if config.learned_positions else None
        self.embed_norm = Norm(config.norm, (E,), dtype) if config.embed_norm else None
        self.layers = nnx.List([Layer(config, spec, dtype, rngs) for spec in config.layers])
        self.norm = Norm(config.norm, (E,), dtype) if config.final_norm else None
        self.head = None if config.tie else Embedding(config.vocab_size, E, dtype, rngs)
        self.head_bias = nnx.Param(jnp.zeros((config.vocab_size,), dtype)) if config.head_bias else None

    def hidden(self, tokens: Int32[Array, " T"], positions: Int32[Array, " T"], step: Step) -> Float[Array, "E T"]:
        """tokens, positions int32 [T] -> the last layer's output, normalised, [E, T]."""
        x = self.embedded(tokens, positions, step)
        return self.finished(self.through(x, range(len(self.layers)), positions, step), step)

    def embedded(self, tokens: Int32[Array, " T"], positions: Int32[Array, " T"], step: Step) -> Float[Array, "E X"]:
        """What goes into the first layer, [E, T]; between layers, where devices share them, maybe less: see `Axis.reduce`."""
        c = self.config
        x = self.embed.lookup(tokens, step.axis)
        if c.embed_scale != 1.0:
            x = x * jnp.asarray(c.embed_scale, x.dtype)
        if self.positions is not None:
            x = x + step.axis.once(self.positions.lookup(positions + c.position_offset))
        return _normed(self.embed_norm, step.axis.reduce(x))

    def through(self, x: Float[Array, "E X"], layers: range, positions: Int32[Array, " T"], step: Step) -> Float[Array, "E X"]:
        """What comes out of these layers."""
        ropes = {self.config.layers[i].rope for i in layers}
        where = Positions(positions, {rope: rope.tables(positions) for rope in ropes if rope is not None})
        for i in layers:
            x = self.layers[i](x, i, where, step)
        return x

    def finished(self, x: Float[Array, "E X"], step: Step) -> Float[Array, "E T"]:
        """The last layer's output, normalised."""
        return step.axis.gather(_normed(self.norm, x))

    def logits(self, hidden: Float[Array, "E R"]) -> Float32[Array, "R V"]:
        """[E, R] -> float32 [R, V]."""
        bias = () if self.head_bias is None else (self.head_bias[...],)
        return head_logits(((self.head or self.embed).weight[...], *bias), hidden, self.config)

    def __call__(self, tokens: Int32[Array, "B T"]) -> Float32[Array, "B T V"]:
        """Whole sequences, without a cache: tokens int32 [B, T] -> logits float32 [B, T, V]."""
        step, positions = WholeSequence(self.config), jnp.arange(tokens.shape[1], dtype=jnp.int32)
        of_row = lambda row: self.logits(self.hidden(row, positions, step))
        if any(isinstance(layer.mlp, MoESpec) for layer in self.config.layers):
            return jax.lax.map(of_row, tokens)  # ragged_dot cannot be vmapped over rows that share their experts
        return jax.vmap(of_row)(tokens)


def head_leaves(config: DecoderConfig) -> tuple[str, ...]:
    """The paths of what `head_logits` takes."""
    return ("embed.weight" if config.tie else "head.weight", *(("head_bias",) if config.head_bias else ()))


def head_logits(head: Sequence[Array], hidden: Float[Array, "E R"], config: DecoderConfig) -> Float32[Array, "R V"]:
    """Head W [V, E] times hidden [E, R] (+ b [V]) -> logits float32 [R, V]. head: (W,) or (W, b)."""
    weight, *bias = head
    # The barrier keeps XLA from folding the transpose into the product: on CPU that takes 65 ms for 2 rows instead of 5.
    logits = jax.lax.optimization_barrier(columns_product(weight, hidden, FLOAT32)).T
    for b in bias:
        logits = logits + b.astype(FLOAT32)[None]
    if config.logit_scale != 1.0:
        logits = logits * config.logit_scale
    cap = config.logit_soft_cap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


class WholeSequence:
    """The cacheless `Step`: attention among the tokens at hand, for training and as an oracle."""

    def __init__(self, config: DecoderConfig, axis: Axis = ONE):
        self.config, self.axis = config, axis

    def attend(self, layer: int, q: Array, k: Array, v: Array | None, sinks: Array | None) -> Array:
        spec = self.config.layers[layer]
        s, (T, H, D), G = spec.attention, q.shape, k.shape[1]
        v = k[..., : s.kv_rank] if isinstance(s, MLASpec) else v
        assert v is not None
        x = q.reshape(T, G, -1, D).astype(jnp.float32) * s.scale
        scores = jnp.einsum("sgqd,tgd->gqst", x, k.astype(jnp.float32))
        if s.soft_cap is not None:
            scores = s.soft_cap * jnp.tanh(scores / s.soft_cap)
        scores = jnp.where(_seen(spec, self.config.causal, T)[None, None], scores + _bias(s, G, T, self.axis), -jnp.inf)
        if sinks is not None:
            column = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(G, -1, 1, 1), (*scores.shape[:3], 1))
            scores = jnp.concatenate([scores, column], axis=-1)
        p = jax.nn.softmax(scores, axis=-1)[..., :T]
        return jnp.einsum("gqst,tgd->sgqd", p, v.astype(jnp.float32)).reshape(T, H, -1).astype(q.dtype)

    def grouped_matmul(self, x: Array, w: Array, group_sizes: Array) -> Array:
        return jax.lax.ragged_dot(x, w.transpose(0, 2, 1), group_sizes)

    def quantized_matmul(self, x: Array, w: Array, scales: Array, zeros: Array | None) -> Array:
        return ops.quantized_matmul(x, w, scales, zeros, implementation="reference")

    def adapt(self, x: Array, a: Array, b: Array) -> None:
        return None


def _seen(spec: LayerSpec, causal: bool, T: int) -> Array:
    """[T, T]: does the query (first axis) see the key?"""
    query, key = jnp.arange(T)[:, None], jnp.arange(T)[None]
    seen = (key <= query) | (not causal)
    if spec.window is not None:
        seen &= key > query - spec.window
    if spec.chunk is not None:
        seen &= key >= query // spec.chunk * spec.chunk
    return seen


def _bias(spec: AttentionSpec | MLASpec, G: int, T: int, axis: Axis) -> Array:
    """ALiBi, [G, H / G, T, T], or nothing."""
    if spec.alibi is None:
        return jnp.zeros((1, 1, 1, 1))
    slopes = axis.part(jnp.asarray(spec.alibi, jnp.float32), spec.num_heads).reshape(G, -1, 1, 1)
    at = jnp.arange(T, dtype=jnp.float32)
    return slopes * (at[None, :] - at[:, None])[None, None]
