"""Llama 4 (Meta 2025), its text part: layers that rotate and see a block of positions only, between layers that do neither;
experts, of which a token takes one beside an MLP that all take."""

from jaxpaged.hf_config import HFConfig
from jaxpaged.models import standard
from jaxpaged.models.spec import AttentionSpec, DecoderConfig, LayerSpec, MoESpec, NormSpec, QKNorm
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("llama4", "llama4_text")
IGNORED = (*standard.IGNORED, "vision_model.**", "multi_modal_projector.**")  # images are not taken
WHOLE = "language_model."  # before the names of the text part, in a checkpoint that has the other one too
THETA = 500000.0


def ignored(config: DecoderConfig) -> tuple[str, ...]:
    return (f"{WHOLE}lm_head.weight",) if config.tie else ()


def decoder_config(hf: HF) -> DecoderConfig:
    if hf["model_type"] == "llama4_text":
        return _text(hf)
    standard.pass_over(hf, "vision_config", "image_token_index", "boi_token_index", "eoi_token_index")
    standard.require(hf, tie_word_embeddings=False)
    text = HFConfig(hf["text_config"], source="text_config of the config")
    config = _text(text)
    text.finish()
    return config


def _text(hf: HF) -> DecoderConfig:
    standard.pass_over(hf, "output_router_logits", "router_aux_loss_coef", "router_jitter_noise")  # training only
    standard.pass_over(hf, "for_llm_compressor")
    rotates, chunk = _rotates(hf), hf.get("attention_chunk_size", 8192)
    rope, chunks = standard.rope(hf, theta=THETA, interleaved=True), _chunks(hf, rotates, chunk)
    dense, experts = standard.mlp(hf, ffn_dim=hf.get("intermediate_size_mlp", 16384)), _experts(hf)
    step, moe = hf.get("interleave_moe_layer_step", 1), hf.get("moe_layers")
    moe = range(step - 1, len(rotates), step) if moe is None else moe
    attention, still = _attention(hf)
    layers = tuple(
        LayerSpec(attention if turns else still, experts if i in moe else dense, rope if turns else None, chunk=chunks[i])
        for i, turns in enumerate(rotates)
    )
    return standard.decoder(hf, layers, norm=standard.rms_norm(hf, default=1e-5))


def _rotates(hf: HF) -> list[bool]:
    """Of each layer. (In `no_rope_layers` a 1 stands for a layer that does.)"""
    every, number = hf.get("no_rope_layer_interval", 4), hf["num_hidden_layers"]
    given = hf.get("no_rope_layers") or [(i + 1) % every for i in range(number)]
    if len(given) < number:
        raise ValueError(f"no_rope_layers has {len(given)} entries for {number} layers.")
    return [bool(flag) for flag in given[:number]]


def _chunks(hf: HF, rotates: list[bool], chunk: int | None) -> list[int | None]:
    """Of each layer."""
    kinds = hf.get("layer_types") or ["chunked_attention" if flag else "full_attention" for flag in rotates]
    unknown = sorted(set(kinds) - {"chunked_attention", "full_attention"})
    if unknown or len(kinds) != len(rotates):
        raise ValueError(f"layer_types: {len(kinds)} entries for {len(rotates)} layers, unknown {unknown}.")
    return [chunk if kind == "chunked_attention" else None for kind in kinds]


def _attention(hf: HF) -> tuple[AttentionSpec, AttentionSpec]:
    """Of layers that rotate, and of those that do not, whose queries grow with the sequence (Nakanishi 2025)."""
    bias = bool(hf.get("attention_bias", False))
    norm = QKNorm(NormSpec(hf.get("rms_norm_eps", 1e-5), weight=False), after_rope=True)
    temperature = float(hf.get("floor_scale", 8192)), float(hf.get("attn_scale", 0.1))
    of = lambda **choices: standard.attention(hf, bias=bias, out_bias=bias, **choices)
    return (
        of(qk_norm=norm if hf.get("use_qk_norm", True) else None),
        of(temperature=temperature if hf.get("attn_temperature_tuning", True) else None),
    )


def _experts(hf: HF) -> MoESpec:
    width = hf["intermediate_size"]
    return MoESpec(
        num_experts=hf.get("num_local_experts", 16),
        top_k=hf.get("num_experts_per_tok", 1),
        ffn_dim=width,
        activation=standard.activation(hf.get("hidden_act", "silu")),
        router="sigmoid",
        weigh_input=True,
        shared=standard.mlp(hf),
    )


def names(config: DecoderConfig) -> tuple[Name, ...]:
    theirs, ours = "model.layers.{i}.feed_forward", "layers.{i}.mlp"
    transposed = standard.transposed()
    rules = (
        *standard.NAMES,
        *standard.PRE_NORM,
        *standard.gated_mlp(theirs, ours),
        Name(theirs + ".router.weight", ours + ".router.weight"),
        Name(theirs + ".experts.gate_up_proj", ours + ".gate_up.weight", view=transposed),
        Name(theirs + ".experts.down_proj", ours + ".down.weight", view=transposed),
        *standard.experts("feed_forward.experts"),  # as quantised checkpoints have them
        *standard.gated_mlp(theirs + ".shared_expert", ours + ".shared"),
    )
    return (*rules, *(rule._replace(pattern=WHOLE + rule.pattern) for rule in rules))
