"""GLM-4.5 and 4.6 (Zhipu AI 2025): from some layer on experts that a sigmoid scores, as DeepSeek-V3's, beside an MLP that all
tokens take; attention in groups, half of each head rotated, perhaps with norms on q and k."""

from jaxpaged.models import standard
from jaxpaged.models.spec import AttentionSpec, DecoderConfig, Groups, LayerSpec, MoESpec, QKNorm
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("glm4_moe",)
IGNORED = standard.IGNORED


def ignored(config: DecoderConfig) -> tuple[str, ...]:
    """The layer after the last one guesses the token after the next; the decoder does without it."""
    return (f"model.layers.{len(config.layers)}.**",)


def decoder_config(hf: HF) -> DecoderConfig:
    standard.pass_over(hf, "output_router_logits", "num_nextn_predict_layers", "num_mtp_layers")
    standard.require(hf, scoring_func="sigmoid", topk_method="noaux_tc")  # some configs say them, as DeepSeek's do
    attention, experts, mlp, rope = _attention(hf), _experts(hf), standard.mlp(hf), standard.rope(hf, share=0.5)
    dense = hf.get("first_k_dense_replace", 1)
    layers = tuple(LayerSpec(attention, mlp if i < dense else experts, rope) for i in range(hf["num_hidden_layers"]))
    return standard.decoder(hf, layers, norm=standard.rms_norm(hf, 1e-5))


def _attention(hf: HF) -> AttentionSpec:
    qk_norm = QKNorm(standard.rms_norm(hf, 1e-5)) if hf.get("use_qk_norm", False) else None
    return standard.attention(hf, bias=bool(hf.get("attention_bias", False)), qk_norm=qk_norm)


def _experts(hf: HF) -> MoESpec:
    width, shared = hf["moe_intermediate_size"], hf.get("n_shared_experts", 1)
    groups = Groups(hf.get("n_group", 1), hf.get("topk_group", 1), by_two=True)
    return MoESpec(
        num_experts=standard.either(hf, "n_routed_experts", "num_local_experts"),
        top_k=hf["num_experts_per_tok"],
        ffn_dim=width,
        activation=standard.activation(hf.get("hidden_act", "silu")),
        router="sigmoid",
        normalise=bool(hf.get("norm_topk_prob", True)),
        scale=hf.get("routed_scaling_factor", 1.0),
        correction=True,
        groups=groups if groups.num > 1 else None,
        shared=standard.mlp(hf, ffn_dim=width * shared) if shared else None,
    )


def names(config: DecoderConfig) -> tuple[Name, ...]:
    theirs, ours = "model.layers.{i}.mlp.", "layers.{i}.mlp."
    return (
        *standard.NAMES,
        *standard.PRE_NORM,
        *standard.experts("mlp.experts"),
        Name(theirs + "gate.weight", ours + "router.weight"),
        Name(theirs + "gate.e_score_correction_bias", ours + "correction"),
        *standard.gated_mlp(theirs + "shared_experts", ours + "shared"),
    )
