"""Qwen2, Qwen2.5 (biases on q, k, v) and Qwen3 (norms on q and k instead)."""

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig, QKNorm
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("qwen2", "qwen3")
IGNORED = standard.IGNORED


def decoder_config(hf: HF) -> DecoderConfig:
    if hf["model_type"] == "qwen2":
        attention = standard.attention(hf, bias=True)
    else:
        bias = bool(hf.get("attention_bias", False))
        attention = standard.attention(hf, bias=bias, out_bias=bias, qk_norm=QKNorm(standard.rms_norm(hf)))
    return standard.decoder(hf, standard.layers(attention, standard.mlp(hf), standard.rope(hf), _windows(hf)))


def _windows(hf: HF) -> tuple[int | None, ...]:
    """Layers from `max_window_layers` on slide, if `use_sliding_window` says so; it mostly does not. Absent keys are what
    transformers takes them for."""
    window, first = hf.get("sliding_window", 4096), hf.get("max_window_layers", 28)
    if not hf.get("use_sliding_window", False):
        window = None
    if hf.get("layer_types") is not None:
        return standard.windows(hf, window)
    return tuple(window if i >= first else None for i in range(hf["num_hidden_layers"]))


def names(config: DecoderConfig) -> tuple[Name, ...]:
    return standard.NAMES + standard.PRE_NORM
