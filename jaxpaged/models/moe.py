"""Mixture of experts: a router sends each token to `top_k` of many MLPs, whose results are added up by weight.

No token is dropped: tokens are sorted by expert and each expert multiplies the rows it has (`grouped_matmul`). What a token
gets depends on nobody else: its experts' results are added in the order in which it chose them.

Source: Shazeer et al. 2017; Fedus et al. 2021; Jiang et al. 2024 (Mixtral); DeepSeek-AI 2024 (V2, V3).

Dims: T tokens, E embed, X experts, k experts a token, F ffn of an expert.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Float32, Int32

from jaxpaged.models.layers import MLP, Linear, Step, columns_product, glu
from jaxpaged.models.spec import Groups, MoESpec


class Experts(nnx.Module):
    """A matrix for each expert: W [X, out, in]."""

    def __init__(self, num: int, n_in: int, n_out: int, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (num, n_out, n_in), dtype) * n_in**-0.5)
        self.bias = nnx.Param(jnp.zeros((num, n_out), dtype)) if bias else None

    def __call__(self, x: Float[Array, "N in"], expert: Int32[Array, " N"], sizes: Int32[Array, " X"],
                 step: Step) -> Float[Array, "N out"]:  # fmt: skip
        """x: rows sorted by expert; `expert` of each, and how many each has."""
        y = step.grouped_matmul(x, self.weight[...], sizes)
        return y if self.bias is None else y + self.bias[...][expert]


class MoE(nnx.Module):
    """See `MoESpec`."""

    def __init__(self, embed_dim: int, spec: MoESpec, dtype: jnp.dtype, rngs: nnx.Rngs):
        X, F, s = spec.num_experts, spec.ffn_dim, spec
        self.spec = spec
        self.router = Linear(embed_dim, X, s.router_bias, dtype, rngs)
        self.correction = nnx.Param(jnp.zeros((X,), jnp.float32)) if s.correction else None
        self.gate_up = Experts(X, embed_dim, 2 * F, s.bias, dtype, rngs)
        self.down = Experts(X, F, embed_dim, s.bias, dtype, rngs)
        self.shared = MLP(embed_dim, s.shared, dtype, rngs) if s.shared else None
        self.shared_gate = Linear(embed_dim, 1, False, dtype, rngs) if s.shared_gate else None

    def __call__(self, x: Float[Array, "E T"], step: Step) -> Float[Array, "E T"]:
        weights, experts = self.route(x)
        y = self._mixed(x.T, weights, experts, step).T
        if self.shared is None:
            return y
        shared = self.shared(x, step)
        if self.shared_gate is not None:
            shared = jax.nn.sigmoid(self.shared_gate(x, step)) * shared
        return y + shared

    def route(self, x: Float[Array, "E T"]) -> tuple[Float32[Array, "T k"], Int32[Array, "T k"]]:
        """The weights of each token's experts, and which they are; all in float32: a rounding could choose another expert."""
        logits = columns_product(self.router.weight[...].astype(jnp.float32), x.astype(jnp.float32)).T
        if self.router.bias is not None:
            logits = logits + self.router.bias[...].astype(jnp.float32)[None]
        return choose(logits, self.spec, None if self.correction is None else self.correction[...])

    def _mixed(self, x: Float[Array, "T E"], weights: Float32[Array, "T k"], experts: Int32[Array, "T k"],
               step: Step) -> Float[Array, "T E"]:  # fmt: skip
        (T, E), k, X = x.shape, self.spec.top_k, self.spec.num_experts
        flat = experts.reshape(-1)
        order = jnp.argsort(flat, stable=True).astype(jnp.int32)
        sizes = jnp.zeros((X,), jnp.int32).at[flat].add(1)
        rows, sorted_experts = x[order // k], flat[order]
        if self.spec.weigh_input:
            rows = rows * weights.reshape(-1)[order][:, None].astype(x.dtype)
        gate, up = jnp.split(self.gate_up(rows, sorted_experts, sizes, step), 2, axis=1)
        y = self.down(glu(self.spec.activation, gate, up), sorted_experts, sizes, step)
        back = jnp.zeros((T * k,), jnp.int32).at[order].set(jnp.arange(T * k, dtype=jnp.int32))
        y = y[back].reshape(T, k, E).astype(jnp.float32)
        if not self.spec.weigh_input:
            y = y * weights[:, :, None]
        return y.sum(1).astype(x.dtype)


def choose(logits: Float32[Array, "T X"], spec: MoESpec, correction: Float32[Array, " X"] | None
           ) -> tuple[Float32[Array, "T k"], Int32[Array, "T k"]]:  # fmt: skip
    """Weights and experts of each token, the best first. See `MoESpec`."""
    if spec.router == "sparsemixer":
        weights, experts = _sparsemixer(logits, spec)
    elif spec.router == "softmax_top":
        best, experts = jax.lax.top_k(logits, spec.top_k)
        weights = jax.nn.softmax(best, axis=-1)
    else:
        scores = jax.nn.sigmoid(logits) if spec.router == "sigmoid" else jax.nn.softmax(logits, axis=-1)
        wanted = scores if correction is None else scores + correction[None]
        if spec.groups is not None:
            wanted = _in_best_groups(wanted, spec.groups)
        _, experts = jax.lax.top_k(wanted, spec.top_k)
        weights = jnp.take_along_axis(scores, experts, axis=1)
    if spec.normalise:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return weights * spec.scale, experts.astype(jnp.int32)


def _in_best_groups(scores: Float32[Array, "T X"], groups: Groups) -> Float32[Array, "T X"]:
    """Scores outside the best groups count as nothing."""
    parted = scores.reshape(len(scores), groups.num, -1)
    value = jax.lax.top_k(parted, 2)[0].sum(-1) if groups.by_two else parted.max(-1)
    _, best = jax.lax.top_k(value, groups.top)
    chosen = jnp.zeros(value.shape, bool).at[jnp.arange(len(scores))[:, None], best].set(True)
    return jnp.where(chosen[:, :, None], parted, -jnp.inf).reshape(scores.shape)


def _sparsemixer(logits: Float32[Array, "T X"], spec: MoESpec) -> tuple[Float32[Array, "T 2"], Int32[Array, "T 2"]]:
    """The best expert, then the best of the others; each weighed among those whose logit is within a share of its own
    (Liu et al. 2024, as Phi-3.5-MoE runs it)."""
    weights, experts, left = [], [], logits
    for _ in range(spec.top_k):
        best = left.max(-1, keepdims=True)
        scale = jnp.maximum(jnp.abs(logits), best)
        near = jnp.where((best - logits) / scale > 2 * spec.jitter, -jnp.inf, left)
        expert = jnp.argmax(left, axis=-1)[:, None]
        weights.append(jnp.take_along_axis(jax.nn.softmax(near, axis=-1), expert, axis=1))
        experts.append(expert)
        left = left.at[jnp.arange(len(left))[:, None], expert].set(-jnp.inf)
    return jnp.concatenate(weights, axis=1), jnp.concatenate(experts, axis=1)
