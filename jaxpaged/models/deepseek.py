"""DeepSeek V2 and V3 (DeepSeek-AI 2024) and models of their kind, as Kimi K2: latent attention, and from some layer on many
small experts, of which a token takes a few, beside an MLP that all take."""

import math

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig, Groups, LayerSpec, MLASpec, MoESpec, NormSpec
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2")
IGNORED = standard.IGNORED


def ignored(config: DecoderConfig) -> tuple[str, ...]:
    """The layer after the last one guesses the token after the next (V3, section 2.2); the decoder does without it."""
    return (f"model.layers.{len(config.layers)}.**",)


def decoder_config(hf: HF) -> DecoderConfig:
    standard.pass_over(hf, "num_key_value_heads", "head_dim", "qk_head_dim")  # latent attention has other sizes
    standard.pass_over(hf, "num_nextn_predict_layers", "auto_map")
    standard.pass_over(hf, "aux_loss_alpha", "seq_aux", "output_router_logits", "pretraining_tp", "ep_size")  # training only
    standard.require(hf, moe_layer_freq=1)
    v2 = hf["model_type"] == "deepseek_v2"
    interleaved = v2 or bool(hf.get("rope_interleave", True))
    rope = standard.rope(hf, dim=hf["qk_rope_head_dim"], interleaved=interleaved)
    dense, attention = standard.mlp(hf, bias=bool(hf.get("mlp_bias", False))), _attention(hf)
    experts, first = (_v2_experts if v2 else _v3_experts)(hf), hf.get("first_k_dense_replace", 0 if v2 else 3)
    return standard.decoder(hf, tuple(
        LayerSpec(attention, dense if i < first else experts, rope) for i in range(hf["num_hidden_layers"])
    ))  # fmt: skip


def _attention(hf: HF) -> MLASpec:
    nope, rotated = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"]
    return MLASpec(
        num_heads=hf["num_attention_heads"],
        kv_rank=hf["kv_lora_rank"],
        nope_dim=nope,
        rope_dim=rotated,
        value_dim=hf["v_head_dim"],
        scale=(nope + rotated) ** -0.5 * _yarn_factor(hf),
        norm=NormSpec(eps=1e-6),  # whatever rms_norm_eps is
        q_rank=hf.get("q_lora_rank", 1536),
        bias=bool(hf.get("attention_bias", False)),
    )


def _yarn_factor(hf: HF) -> float:
    """What YaRN multiplies scores by; `mscale_all_dim` moves it from the rotated numbers to all (V2, section 3.1.4)."""
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    weight = scaling.get("mscale_all_dim")
    if (scaling.get("rope_type") or scaling.get("type") or "default") == "default" or not weight:
        return 1.0
    return (0.1 * weight * math.log(max(scaling["factor"], 1.0)) + 1.0) ** 2


def _experts(hf: HF, groups: Groups | None, shared: int, **choices) -> MoESpec:
    """shared: how many experts as wide as these the shared MLP is, if the config does not say."""
    width, bias = hf["moe_intermediate_size"], bool(hf.get("mlp_bias", False))
    number = hf.get("n_shared_experts", shared)
    return MoESpec(
        num_experts=hf["n_routed_experts"],
        top_k=hf["num_experts_per_tok"],
        ffn_dim=width,
        activation=standard.activation(hf.get("hidden_act", "silu")),
        groups=groups if groups and groups.num > 1 else None,
        shared=standard.mlp(hf, ffn_dim=width * number, bias=bias) if number else None,
        **choices,
    )


def _v2_experts(hf: HF) -> MoESpec:
    """What V2 does with norm_topk_prob differs among its implementations, and no published model has it."""
    standard.require(hf, scoring_func="softmax", norm_topk_prob=False)
    method, num, top = hf.get("topk_method", "greedy"), hf.get("n_group"), hf.get("topk_group")
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"topk_method={method!r} is not supported; supported: 'greedy' and 'group_limited_greedy'.")
    groups = Groups(num, top) if method == "group_limited_greedy" else None
    return _experts(hf, groups, 2, scale=hf.get("routed_scaling_factor", 1.0))


def _v3_experts(hf: HF) -> MoESpec:
    standard.require(hf, scoring_func="sigmoid", topk_method="noaux_tc")
    groups = Groups(hf.get("n_group", 8) or 1, hf.get("topk_group", 4) or 1, by_two=True)
    scale, normalise = hf.get("routed_scaling_factor", 2.5), bool(hf.get("norm_topk_prob", True))
    return _experts(hf, groups, 1, router="sigmoid", correction=True, scale=scale, normalise=normalise)


def names(config: DecoderConfig) -> tuple[Name, ...]:
    theirs, ours = "model.layers.{i}.", "layers.{i}."
    attention, mine = theirs + "self_attn.", ours + "attention."
    return (
        *standard.NAMES,
        *standard.PRE_NORM,
        *standard.linear(attention + "q_a_proj", mine + "q_down"),
        *standard.linear(attention + "q_a_layernorm", mine + "q_norm"),
        *standard.linear(attention + "q_b_proj", mine + "q"),
        *standard.linear(attention + "q_proj", mine + "q"),
        *standard.linear(attention + "kv_a_proj_with_mqa", mine + "kv_down"),
        *standard.linear(attention + "kv_a_layernorm", mine + "kv_norm"),
        *standard.linear(attention + "kv_b_proj", mine + "kv_up"),
        *standard.experts("mlp.experts"),
        Name(theirs + "mlp.gate.weight", ours + "mlp.router.weight"),
        Name(theirs + "mlp.gate.e_score_correction_bias", ours + "mlp.correction"),
        *standard.gated_mlp(theirs + "mlp.shared_experts", ours + "mlp.shared"),
    )
