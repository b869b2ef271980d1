"""Phi-3, 3.5 and 4 (Abdin et al. 2024): Llama with one tensor for q, k, v and one for gate and up, and positions that
LongRoPE stretches. Phi-4-mini rotates a part of each head."""

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("phi3",)
IGNORED = standard.IGNORED


def decoder_config(hf: HF) -> DecoderConfig:
    standard.pass_over(hf, "auto_map")  # names code on the Hub that transformers has as well
    standard.require(hf, full_attn_mod=1, interpolate_factor=1)  # Phi-4-mini says them
    rope = standard.rope(hf, share=1.0)
    windows = standard.windows(hf, hf.get("sliding_window"))
    layers = standard.layers(standard.attention(hf), standard.mlp(hf), rope, windows)
    return standard.decoder(hf, layers, norm=standard.rms_norm(hf, 1e-5))


def names(config: DecoderConfig) -> tuple[Name, ...]:
    qkv = Name("model.layers.{i}.self_attn.qkv_proj.weight", "layers.{i}.attention.qkv.weight")
    gate_up = Name("model.layers.{i}.mlp.gate_up_proj.weight", "layers.{i}.mlp.gate_up.weight")
    return (qkv, gate_up, *standard.NAMES, *standard.PRE_NORM)  # whole ones first: their first part is all
