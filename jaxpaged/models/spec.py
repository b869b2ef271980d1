"""What a decoder computes, as frozen values: its mathematical choices, and never a family's name.

A door makes a `DecoderConfig` of a Hugging Face config; `decoder.py` makes modules of it. What may differ from layer to
layer hangs on the layer's `LayerSpec`: how it attends, what its MLP is, how it rotates, how far back it sees.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxpaged.models.rope import Rope


@dataclass(frozen=True)
class NormSpec:
    """y = x / sqrt(mean(x^2) + eps) * (offset + weight) + bias; "layer" subtracts the mean from x first."""

    eps: float = 1e-6
    kind: str = "rms"  # or "layer"
    offset: float = 0.0
    weight: bool = True
    bias: bool = False


@dataclass(frozen=True)
class QKNorm:
    """Normalises queries and keys. over: "head" (each head's D numbers, one weight [D] for all heads), "heads" (the same with
    a weight [H, D]), "all" (all heads' numbers together, weight [H D])."""

    norm: NormSpec
    over: str = "head"
    after_rope: bool = False


@dataclass(frozen=True)
class AttentionSpec:
    """Grouped-query attention (Ainslie et al. 2023); with as many KV heads as heads, multi-head; with one, multi-query."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool = False  # of q, k, v
    out_bias: bool = False
    qk_norm: QKNorm | None = None
    query_scale: float | None = None  # None: head_dim ** -0.5
    soft_cap: float | None = None
    clip: float | None = None  # q, k, v are clipped to [-clip, clip]
    sinks: bool = False  # a learned logit a head that takes a share of the softmax (gpt-oss)
    alibi: tuple[float, ...] | None = None  # a slope for each head (Press et al. 2022)
    temperature: tuple[float, float] | None = None  # (length, weight): q *= 1 + weight * log(1 + (position + 1) // length)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    @property
    def cached(self) -> tuple[int, int, int]:
        """What a token leaves in the cache: heads, numbers of a key and of a value."""
        return self.num_kv_heads, self.head_dim, self.head_dim


@dataclass(frozen=True)
class MLASpec:
    """Multi-head latent attention (DeepSeek-V2, 2024): a token leaves one latent vector of `kv_rank` numbers, of which every
    head makes its key and value, and one rotated key of `rope_dim` numbers that all heads share."""

    num_heads: int
    kv_rank: int
    nope_dim: int  # numbers of a head's query and key that are not rotated
    rope_dim: int
    value_dim: int
    scale: float
    norm: NormSpec
    q_rank: int | None = None  # queries are made of a latent vector too
    bias: bool = False
    soft_cap: float | None = None
    alibi: None = None

    @property
    def cached(self) -> tuple[int, int, int]:
        """As of `AttentionSpec`: the value is the latent part of the key."""
        return 1, self.kv_rank + self.rope_dim, 0


@dataclass(frozen=True)
class MLPSpec:
    """W_down act(W_up x), or, gated, W_down (act(W_gate x) * (W_up x)) (Shazeer 2020)."""

    ffn_dim: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True)
class Groups:
    """Experts are chosen from the best `top` of `num` groups only; a group is as good as its best expert, or as the sum of
    its best two (DeepSeek-V2 and V3)."""

    num: int
    top: int
    by_two: bool = False


@dataclass(frozen=True)
class MoESpec:
    """Of `num_experts` gated MLPs each token takes `top_k`, weighted by its router.

    router: how logits become the experts' scores, of which the top_k are taken:
      "softmax"      over all experts
      "softmax_top"  over the chosen ones' logits only
      "sigmoid"      each for itself
      "sparsemixer"  Phi-3.5-MoE's: two experts, each with a softmax over those within a threshold of it
    """

    num_experts: int
    top_k: int
    ffn_dim: int  # of an expert
    activation: str = "silu"
    router: str = "softmax"
    normalise: bool = False  # the chosen scores are divided by their sum
    scale: float = 1.0  # and multiplied by this
    router_bias: bool = False
    correction: bool = False  # a learned bias decides, with the scores, who is chosen; it does not weigh (DeepSeek-V3)
    groups: Groups | None = None
    bias: bool = False  # of the experts' products
    weigh_input: bool = False  # the scores multiply what goes into the experts, not what comes out (Llama 4)
    shared: MLPSpec | None = None  # an MLP that every token takes as well
    shared_gate: bool = False  # weighted by a sigmoid of its own
    jitter: float = 0.0  # sparsemixer's threshold is twice this
    held: int | None = None  # experts of this device, where each has some of them; None: it has all


@dataclass(frozen=True)
class LayerSpec:
    """One layer. rope: how it rotates, None: not at all. window: how far back it sees; None: to the beginning. chunk: it
    sees its own block of so many positions only."""

    attention: AttentionSpec | MLASpec
    mlp: MLPSpec | MoESpec
    rope: Rope | None = None
    window: int | None = None
    chunk: int | None = None


@dataclass(frozen=True)
class DecoderConfig:
    """The mathematical choices of a decoder.

    block: where the norms are, and what is added to the stream x (A: attention, M: MLP, N: norms, all different):
      "pre"       x += A(N(x)); x += M(N(x))
      "post"      x += N(A(x)); x += N(M(x))
      "both"      x += N(A(N(x))); x += N(M(N(x)))
      "parallel"  h = N(x); x += A(h) + M(h)
      "parallel2" x += A(N(x)) + M(N(x))
    """

    vocab_size: int
    embed_dim: int
    layers: tuple[LayerSpec, ...]
    max_positions: int  # the longest sequence the model was made for
    norm: NormSpec = NormSpec()
    block: str = "pre"
    residual_scale: float = 1.0  # what a branch is multiplied by before it is added
    embed_scale: float = 1.0
    embed_norm: bool = False
    learned_positions: int = 0  # rows of a table of position embeddings
    position_offset: int = 0  # position 0 has this row
    final_norm: bool = True
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None
    tie: bool = False  # the head is the embedding
    causal: bool = True  # a token sees those before it; False: all of the sequence, to make vectors of texts

    def __post_init__(self) -> None:
        limited = any(s.window or s.chunk or s.attention.alibi for s in self.layers)
        if not self.causal and limited:
            raise ValueError("is_causal=False is not supported with sliding windows, chunked attention or ALiBi.")

    def for_length(self, max_model_len: int) -> DecoderConfig:
        """The decoder for sequences of at most so many tokens: a rotation that was scaled for longer ones may differ."""
        layers = [replace(s, rope=s.rope.for_length(max_model_len)) if s.rope else s for s in self.layers]
        return replace(self, layers=tuple(layers))

    @property
    def widest(self) -> int:
        """Numbers a token has at the widest place of a layer."""
        return max(self.embed_dim, *(_width(spec) for spec in self.layers))


def _width(spec: LayerSpec) -> int:
    mlp = spec.mlp
    if isinstance(mlp, MLPSpec):
        return mlp.ffn_dim * (1 + mlp.gated)
    return 2 * mlp.top_k * mlp.ffn_dim + (2 * mlp.shared.ffn_dim if mlp.shared else 0)
