"""Llama 1 to 3.x, SmolLM2, Mistral: RMSNorm, rotary positions, grouped queries, SwiGLU (Touvron et al. 2023)."""

from jaxpaged.models import standard
from jaxpaged.models.decoder import DecoderConfig, LayerSpec
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("llama", "mistral")
IGNORED = standard.IGNORED


def decoder_config(hf: HF) -> DecoderConfig:
    if hf.get("pretraining_tp", 1) not in (None, 1):
        raise ValueError(f"pretraining_tp={hf['pretraining_tp']} changes the products' order and is not supported.")
    turn = standard.rope(hf)
    unsaid = 4096 if hf["model_type"] == "mistral" else None  # as transformers has it
    layers = tuple(LayerSpec(turn, w) for w in standard.windows(hf, hf.get("sliding_window", unsaid)))
    bias = bool(hf.get("attention_bias", False))
    return standard.decoder(hf, layers, attention_bias=bias, out_bias=bias, mlp_bias=bool(hf.get("mlp_bias", False)))


def names(config: DecoderConfig) -> tuple[Name, ...]:
    return standard.NAMES + standard.PRE_NORM
