"""Granite 3 (IBM 2024): Llama with four factors: on the embedding, on what a branch adds, on attention's products, and (it
divides) on the logits. With sliding windows (granite_swa) also a sink a head and a base of the rotation for each layer."""

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig, LayerSpec
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("granite", "granite_swa")
IGNORED = standard.IGNORED
WINDOW, KV_HEADS = 128, 4  # of a granite_swa that does not say, as transformers has it


def decoder_config(hf: HF) -> DecoderConfig:
    sliding = hf["model_type"] == "granite_swa"
    return standard.decoder(
        hf,
        _sliding(hf) if sliding else _full(hf),
        norm=standard.rms_norm(hf, 1e-5 if sliding else 1e-6),
        embed_scale=hf.get("embedding_multiplier", 1.0),
        residual_scale=hf.get("residual_multiplier", 1.0),
        logit_scale=1 / hf.get("logits_scaling", 1.0),
        tie=bool(hf.get("tie_word_embeddings", sliding)),
    )


def _attention(hf: HF, **choices):
    bias = bool(hf.get("attention_bias", False))
    return standard.attention(hf, bias=bias, out_bias=bias, query_scale=hf.get("attention_multiplier", 1.0), **choices)


def _mlp(hf: HF):
    return standard.mlp(hf, bias=bool(hf.get("mlp_bias", False)))


def _full(hf: HF) -> tuple[LayerSpec, ...]:
    return standard.layers(_attention(hf), _mlp(hf), standard.rope(hf), (None,) * hf["num_hidden_layers"])


def _sliding(hf: HF) -> tuple[LayerSpec, ...]:
    groups = hf.get("num_key_value_heads", KV_HEADS) or hf["num_attention_heads"]
    attention, mlp, usual = _attention(hf, num_kv_heads=groups, sinks=True), _mlp(hf), standard.rope(hf)
    windows, num = _windows(hf), hf["num_hidden_layers"]
    thetas = hf.get("layer_rope_theta")
    if thetas is None:
        return standard.layers(attention, mlp, usual, windows)
    if len(thetas) != num:
        raise ValueError(f"layer_rope_theta has {len(thetas)} entries for {num} layers; it must have one for each.")
    ropes = {theta: standard.rope(hf, base=theta) if theta else None for theta in thetas}  # 0: does not rotate
    return tuple(LayerSpec(attention, mlp, ropes[theta], window) for theta, window in zip(thetas, windows))


def _windows(hf: HF) -> tuple[int | None, ...]:
    """From `layer_types`; without that key all layers slide but the first and each fourth after it."""
    window, num = hf.get("sliding_window", WINDOW), hf["num_hidden_layers"]
    if hf.get("layer_types") is not None:
        return standard.windows(hf, window)
    return tuple(window if i % 4 else None for i in range(num))


def names(config: DecoderConfig) -> tuple[Name, ...]:
    sinks = Name("model.layers.{i}.self_attn.sinks", "layers.{i}.attention.sinks")
    return (*standard.NAMES, *standard.PRE_NORM, sinks)
