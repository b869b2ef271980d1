"""Llama 1 to 3.x, SmolLM2, Mistral: RMSNorm, rotary positions, grouped queries, SwiGLU (Touvron et al. 2023)."""

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("llama", "mistral")
IGNORED = standard.IGNORED


def decoder_config(hf: HF) -> DecoderConfig:
    if hf.get("pretraining_tp", 1) not in (None, 1):
        raise ValueError(f"pretraining_tp={hf['pretraining_tp']} changes the products' order and is not supported.")
    unsaid = 4096 if hf["model_type"] == "mistral" else None  # as transformers has it
    bias = bool(hf.get("attention_bias", False))
    attention = standard.attention(hf, bias=bias, out_bias=bias)
    mlp = standard.mlp(hf, bias=bool(hf.get("mlp_bias", False)))
    windows = standard.windows(hf, hf.get("sliding_window", unsaid))
    return standard.decoder(hf, standard.layers(attention, mlp, standard.rope(hf), windows))


def names(config: DecoderConfig) -> tuple[Name, ...]:
    return standard.NAMES + standard.PRE_NORM
