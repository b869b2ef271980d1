"""Qwen1.5-MoE, Qwen2-57B-A14B (Qwen team 2024: beside the experts an MLP that all tokens take, weighted by a sigmoid of its
own) and Qwen3's experts (2025: none such, norms on q and k). Some layers may have one MLP in place of the experts."""

from jaxpaged.models import standard
from jaxpaged.models.spec import AttentionSpec, DecoderConfig, LayerSpec, MoESpec, QKNorm
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("qwen2_moe", "qwen3_moe")
IGNORED = standard.IGNORED


def decoder_config(hf: HF) -> DecoderConfig:
    standard.pass_over(hf, "output_router_logits", "router_aux_loss_coef")  # training only
    attention, experts, windows = (_qwen2 if hf["model_type"] == "qwen2_moe" else _qwen3)(hf)
    mlp, rope, sparse = standard.mlp(hf), standard.rope(hf), _sparse_layers(hf)
    layers = tuple(LayerSpec(attention, experts if i in sparse else mlp, rope, w) for i, w in enumerate(windows))
    return standard.decoder(hf, layers)


Parts = tuple[AttentionSpec, MoESpec, tuple[int | None, ...]]


def _qwen2(hf: HF) -> Parts:
    shared = standard.mlp(hf, "shared_expert_intermediate_size")
    attention = standard.attention(hf, bias=bool(hf.get("qkv_bias", True)))
    return attention, _experts(hf, shared=shared, shared_gate=True), _qwen2_windows(hf)


def _qwen3(hf: HF) -> Parts:
    bias = bool(hf.get("attention_bias", False))
    attention = standard.attention(hf, bias=bias, out_bias=bias, qk_norm=QKNorm(standard.rms_norm(hf)))
    return attention, _experts(hf), _qwen3_windows(hf)


def _experts(hf: HF, **choices) -> MoESpec:
    return MoESpec(
        num_experts=standard.either(hf, "num_experts", "num_local_experts"),
        top_k=hf["num_experts_per_tok"],
        ffn_dim=hf["moe_intermediate_size"],
        activation=standard.activation(hf.get("hidden_act", "silu")),
        normalise=bool(hf.get("norm_topk_prob", False)),
        **choices,
    )


def _sparse_layers(hf: HF) -> set[int]:
    """Each `decoder_sparse_step`-th layer has experts, but not those of `mlp_only_layers`."""
    step = hf.get("decoder_sparse_step", 1)
    return set(range(step - 1, hf["num_hidden_layers"], step)) - set(hf.get("mlp_only_layers") or ())


def _qwen2_windows(hf: HF) -> tuple[int | None, ...]:
    """Each other layer of the first `max_window_layers` slides, if `use_sliding_window` says so; it mostly does not."""
    window, first = hf.get("sliding_window", 4096), hf.get("max_window_layers", 28)
    if not hf.get("use_sliding_window", False):
        window = None
    if hf.get("layer_types") is not None:
        return standard.windows(hf, window)
    return tuple(window if i % 2 == 0 and i < first else None for i in range(hf["num_hidden_layers"]))


def _qwen3_windows(hf: HF) -> tuple[int | None, ...]:
    """All layers slide or none does."""
    standard.pass_over(hf, "max_window_layers")
    window = hf.get("sliding_window", 4096)
    return (window if hf.get("use_sliding_window", False) else None,) * hf["num_hidden_layers"]


def names(config: DecoderConfig) -> tuple[Name, ...]:
    theirs, ours = "model.layers.{i}.mlp.", "layers.{i}.mlp."
    return (
        *standard.NAMES,
        *standard.PRE_NORM,
        *standard.experts("mlp.experts"),
        Name(theirs + "gate.weight", ours + "router.weight"),
        *standard.gated_mlp(theirs + "shared_expert", ours + "shared"),
        Name(theirs + "shared_expert_gate.weight", ours + "shared_gate.weight"),
    )
