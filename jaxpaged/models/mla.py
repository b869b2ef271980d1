"""Multi-head latent attention (DeepSeek-AI 2024, V2, section 2.1), in its absorbed form.

A token leaves `[latent | rotated key]` in the cache, one head of `kv_rank + rope_dim` numbers. A head's key is `W_k latent`
and its value `W_v latent`; instead of making them for every cached token, its query is multiplied by `W_k` and what it
attended to by `W_v`: attention is then multi-query attention over the latent vectors, whose values are the keys' own first
numbers.

Dims: T tokens, E embed, H heads, C kv_rank, N nope_dim, R rope_dim, D value_dim.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from jaxpaged.models.layers import Linear, Norm, Positions, Step
from jaxpaged.models.spec import LayerSpec, MLASpec


class LatentAttention(nnx.Module):
    """See `MLASpec`."""

    def __init__(self, embed_dim: int, spec: LayerSpec, dtype: jnp.dtype, rngs: nnx.Rngs):
        assert isinstance(spec.attention, MLASpec)
        s = self.spec = spec.attention
        self.rope = spec.rope
        H, C, head = s.num_heads, s.kv_rank, s.nope_dim + s.rope_dim
        if s.q_rank is None:
            self.q_down = self.q_norm = None
        else:
            self.q_down = Linear(embed_dim, s.q_rank, s.bias, dtype, rngs)
            self.q_norm = Norm(s.norm, (s.q_rank,), dtype)
        self.q = Linear(s.q_rank or embed_dim, H * head, False, dtype, rngs)
        self.kv_down = Linear(embed_dim, C + s.rope_dim, s.bias, dtype, rngs)
        self.kv_norm = Norm(s.norm, (C,), dtype)
        self.kv_up = Linear(C, H * (s.nope_dim + s.value_dim), False, dtype, rngs)
        self.out = Linear(H * s.value_dim, embed_dim, s.bias, dtype, rngs, summed=True)

    def __call__(self, x: Float[Array, "E T"], layer: int, positions: Positions, step: Step) -> Float[Array, "E T"]:
        s = self.spec
        H, C, N = s.num_heads, s.kv_rank, s.nope_dim
        up = self.kv_up.dense(x.dtype).reshape(H, N + s.value_dim, C)
        q = self._queries(x, step)  # [T, H, N + R]
        q_latent = jnp.einsum("thn,hnc->thc", q[..., :N], up[:, :N])
        q = jnp.concatenate([q_latent, positions.rotate(q[..., N:], self.rope)], axis=-1)
        down = self.kv_down(x, step)
        rotated = positions.rotate(down[C:].T[:, None], self.rope)
        k = jnp.concatenate([self.kv_norm(down[:C]).T[:, None], rotated], axis=-1)  # [T, 1, C + R]
        y = step.attend(layer, q, k, None, None)  # [T, H, C]
        y = jnp.einsum("thc,hvc->thv", y, up[:, N:])
        return self.out(y.reshape(-1, H * s.value_dim).T, step)

    def _queries(self, x: Float[Array, "E T"], step: Step) -> Float[Array, "T H D"]:
        if self.q_down is not None and self.q_norm is not None:
            x = self.q_norm(self.q_down(x, step))
        s = self.spec
        return self.q(x, step).reshape(s.num_heads, s.nope_dim + s.rope_dim, -1).transpose(2, 0, 1)
