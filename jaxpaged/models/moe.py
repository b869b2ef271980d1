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

    def __init__(self, num: int, n_in: int, n_out: int, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs, summed: bool = False):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (num, n_out, n_in), dtype) * n_in**-0.5)
        self.bias, self.summed = nnx.Param(jnp.zeros((num, n_out), dtype)) if bias else None, summed

    def __call__(self, x: Float[Array, "N in"], expert: Int32[Array, " N"], sizes: Int32[Array, " X"],
                 step: Step) -> Float[Array, "N out"]:  # fmt: skip
        """x: rows sorted by expert; `expert` of each, and how many each has."""
        return with_bias(step.grouped_matmul(x, self.weight[...], sizes), self.bias, self.summed, expert, step)


def with_bias(y: Array, bias: nnx.Param | None, summed: bool, expert: Array, step: Step) -> Array:
    """y [N, out] plus the bias [X, out] of each row's expert. summed: y is a share of a sum, see `Product`."""
    if bias is None:
        return y
    rows = bias[...].at[expert].get(mode="clip")
    return y + (step.axis.once(rows) if summed else rows)


class MoE(nnx.Module):
    """See `MoESpec`."""

    def __init__(self, embed_dim: int, spec: MoESpec, dtype: jnp.dtype, rngs: nnx.Rngs):
        X, F, s = spec.held or spec.num_experts, spec.ffn_dim, spec
        self.spec = spec
        self.router = Linear(embed_dim, s.num_experts, s.router_bias, dtype, rngs)
        self.correction = nnx.Param(jnp.zeros((s.num_experts,), jnp.float32)) if s.correction else None
        self.gate_up = Experts(X, embed_dim, 2 * F, s.bias, dtype, rngs)
        self.down = Experts(X, F, embed_dim, s.bias, dtype, rngs, summed=spec.held is None)
        self.shared = MLP(embed_dim, s.shared, dtype, rngs) if s.shared else None
        self.shared_gate = Linear(embed_dim, 1, False, dtype, rngs) if s.shared_gate else None

    def __call__(self, x: Float[Array, "E T"], step: Step) -> Float[Array, "E T"]:
        weights, experts = self.route(x)
        y = self._mixed(x.T, weights, experts, step).T
        return y if self.shared is None else y + self._shared(x, step)

    def sent(self, x: Float[Array, "E T"], step: Step) -> Float[Array, "E T"]:
        """The same where experts are on devices of their own, of this device's tokens only, and all of it, not a share of a
        sum: each token is sent to the devices that have its experts, and what they make of it comes back.

        Rows are sent sorted by expert; who gets them sorts them again, as they come from several devices.
        """
        axis, (T, k), X = step.axis, (x.shape[1], self.spec.top_k), self.spec.held
        assert X is not None
        weights, experts = self.route(x)
        flat = experts.reshape(-1)
        order, back = _sorted(flat)
        of_each = jnp.zeros((axis.size, X), jnp.int32).at[flat // X, flat % X].add(1)
        counts, coming = axis.all(of_each.sum(1, dtype=jnp.int32)), axis.tell(of_each)  # [N, N]; [N, X] of each device
        got = axis.send(self._weighed_in(x.T, weights, order), axis.size * T * k, counts)
        whose = jnp.tile(jnp.arange(X, dtype=jnp.int32), axis.size)
        whose = jnp.repeat(whose, coming.reshape(-1), total_repeat_length=len(got))
        whose = jnp.where(jnp.arange(len(got)) < coming.sum(), whose, X)  # rows behind those that came are nobody's
        by_expert, as_they_came = _sorted(whose)
        y = self._experts(got[by_expert], whose[by_expert], coming.sum(0, dtype=jnp.int32), step)[as_they_came]
        y = self._weighed_out(axis.send(y, T * k, counts.T)[back].reshape(T, k, -1), weights).astype(x.dtype).T
        return y if self.shared is None else y + axis.reduce(self._shared(axis.gather(x), step))

    def _shared(self, x: Float[Array, "E T"], step: Step) -> Float[Array, "E T"]:
        assert self.shared is not None
        shared = self.shared(x, step)
        return shared if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x, step)) * shared

    def route(self, x: Float[Array, "E T"]) -> tuple[Float32[Array, "T k"], Int32[Array, "T k"]]:
        """The weights of each token's experts, and which they are; all in float32: a rounding could choose another expert."""
        logits = columns_product(self.router.weight[...].astype(jnp.float32), x.astype(jnp.float32)).T
        if self.router.bias is not None:
            logits = logits + self.router.bias[...].astype(jnp.float32)[None]
        return choose(logits, self.spec, None if self.correction is None else self.correction[...])

    def _mixed(self, x: Float[Array, "T E"], weights: Float32[Array, "T k"], experts: Int32[Array, "T k"],
               step: Step) -> Float[Array, "T E"]:  # fmt: skip
        (T, E), k, flat = x.shape, self.spec.top_k, experts.reshape(-1)
        X = self.spec.held or self.spec.num_experts
        if self.spec.held is not None:
            flat = flat - step.axis.index() * X
            flat = jnp.where((flat >= 0) & (flat < X), flat, X)  # the other devices' come last: they are nobody's rows here
        order, back = _sorted(flat)
        sizes = jnp.zeros((X,), jnp.int32).at[flat].add(1, mode="drop")
        y = self._experts(self._weighed_in(x, weights, order), flat[order], sizes, step)[back].reshape(T, k, E)
        if self.spec.held is not None:
            y = jnp.where((flat < X).reshape(T, k, 1), y, jnp.zeros((), y.dtype))  # they have biases
        return self._weighed_out(y, weights).astype(x.dtype)

    def _experts(self, rows: Float[Array, "N E"], expert: Int32[Array, " N"], sizes: Int32[Array, " X"],
                 step: Step) -> Float[Array, "N E"]:  # fmt: skip
        """rows: sorted by expert."""
        gate, up = jnp.split(self.gate_up(rows, expert, sizes, step), 2, axis=1)
        return self.down(glu(self.spec.activation, gate, up), expert, sizes, step)

    def _weighed_in(self, x: Float[Array, "T E"], weights: Float32[Array, "T k"],
                    order: Int32[Array, " N"]) -> Float[Array, "N E"]:  # fmt: skip
        """What goes into the experts: of pair number order[n] of a token and one of its experts."""
        rows = x[order // self.spec.top_k]
        return rows * weights.reshape(-1)[order][:, None].astype(x.dtype) if self.spec.weigh_input else rows

    def _weighed_out(self, y: Float[Array, "T k E"], weights: Float32[Array, "T k"]) -> Float32[Array, "T E"]:
        """What comes out of a token's experts, added up in the order in which it chose them."""
        y = y.astype(jnp.float32)
        return (y if self.spec.weigh_input else y * weights[:, :, None]).sum(1)


def _sorted(keys: Int32[Array, " N"]) -> tuple[Int32[Array, " N"], Int32[Array, " N"]]:
    """The order that sorts keys, and the one that undoes it."""
    order = jnp.argsort(keys, stable=True).astype(jnp.int32)
    return order, jnp.zeros_like(order).at[order].set(jnp.arange(len(keys), dtype=jnp.int32))


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
