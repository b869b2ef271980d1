"""Granite 3's experts (IBM 2024), with or without an MLP that all tokens share, and those Granite 4 models that have attention
in every layer; each with Granite's four factors."""

from jaxpaged.models import standard
from jaxpaged.models.rope import Rope
from jaxpaged.models.spec import DecoderConfig, MLPSpec, MoESpec
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("granitemoe", "granitemoeshared", "granitemoehybrid")
IGNORED = standard.IGNORED
SHARED = {"granitemoe": 0, "granitemoeshared": 0, "granitemoehybrid": 1024}  # width, of a config that does not say
ATTENTION = ("attention", "full_attention")  # what a layer with attention is called; others are "mamba", "linear_attention"
MAMBA = ("n_heads", "n_groups", "d_state", "d_head", "d_conv", "expand", "chunk_size", "conv_bias", "proj_bias")


def decoder_config(hf: HF) -> DecoderConfig:
    standard.pass_over(hf, "output_router_logits", "router_aux_loss_coef", "init_method")  # training only
    standard.require(hf, mlp_bias=False, normalization_function="rmsnorm")
    bias = bool(hf.get("attention_bias", False))
    attention = standard.attention(hf, bias=bias, out_bias=bias, query_scale=hf.get("attention_multiplier", 1.0))
    rope = _hybrid_rope(hf) if hf["model_type"] == "granitemoehybrid" else standard.rope(hf)
    return standard.decoder(
        hf,
        standard.layers(attention, _mlp(hf), rope, (None,) * hf["num_hidden_layers"]),
        embed_scale=hf.get("embedding_multiplier", 1.0),
        residual_scale=hf.get("residual_multiplier", 1.0),
        logit_scale=1 / hf.get("logits_scaling", 1.0),
    )


def _mlp(hf: HF) -> MLPSpec | MoESpec:
    """Without experts, what experts would share beside them."""
    width = hf.get("shared_intermediate_size", SHARED[hf["model_type"]])
    num, top_k = hf["num_local_experts"], hf.get("num_experts_per_tok", 2)
    shared, experts = standard.mlp(hf, ffn_dim=width) if width else None, standard.mlp(hf)
    if num == 0 and shared:
        return shared
    return MoESpec(num, top_k, experts.ffn_dim, experts.activation, router="softmax_top", shared=shared)


def _hybrid_rope(hf: HF) -> Rope | None:
    """Of a Granite 4, if it rotates. (Mamba layers have a state that no page of a cache holds.)"""
    standard.pass_over(hf, *(f"mamba_{key}" for key in MAMBA), "time_step_limit")
    num = hf["num_hidden_layers"]
    kinds = hf.get("layer_types") or hf.get("layers_block_type") or ("mamba",) * num
    other = [f"{i} ({kind})" for i, kind in enumerate(kinds) if kind not in ATTENTION]
    if other:
        listed = ", ".join(other[:8]) + (", ..." if len(other) > 8 else "")
        raise ValueError(
            f"layer_types: mamba layers are not supported, and {len(other)} of {num} layers are such: {listed}. Supported: "
            "Granite 4 models whose layers all are 'attention', as granite-4.0-micro."
        )
    embedding = hf.get("position_embedding_type")
    if len(kinds) != num or embedding not in (None, "nope", "rope"):
        raise ValueError(
            f"layer_types has {len(kinds)} entries for {num} layers, position_embedding_type is {embedding!r}; supported: as "
            "many entries as layers, and 'rope' or 'nope'."
        )
    rope = standard.rope(hf)
    return rope if embedding == "rope" else None


def names(config: DecoderConfig) -> tuple[Name, ...]:
    experts, shared, ours = "model.layers.{i}.block_sparse_moe.", "model.layers.{i}.shared_mlp.", "layers.{i}.mlp."
    return (
        Name(experts + "router.layer.weight", ours + "router.weight"),
        Name(experts + "input_linear.weight", ours + "gate_up.weight"),
        Name(experts + "output_linear.weight", ours + "down.weight"),
        *(Name(shared + "input_linear.weight", f"{ours}{place}gate_up.weight") for place in ("shared.", "")),
        *(Name(shared + "output_linear.weight", f"{ours}{place}down.weight") for place in ("shared.", "")),
        *standard.NAMES,
        *standard.PRE_NORM,
    )
