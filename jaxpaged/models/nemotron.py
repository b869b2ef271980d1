"""Nemotron-4 and Minitron (Parmar et al. 2024): LayerNorm of 1 + weight, half of each head rotated, a plain MLP with squared
ReLU. Arcee's AFM (2025): Llama with that MLP."""

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("nemotron", "arcee")
IGNORED = standard.IGNORED


def decoder_config(hf: HF) -> DecoderConfig:
    if hf["model_type"] == "nemotron":
        norm, rope = standard.layer_norm(hf, "norm_eps", offset=1.0), standard.rope(hf, share=0.5)
    else:
        norm, rope = standard.rms_norm(hf, 1e-5), standard.rope(hf)
    bias, activation = bool(hf.get("attention_bias", False)), standard.activation(hf.get("hidden_act", "relu2"))
    attention = standard.attention(hf, bias=bias, out_bias=bias)
    mlp = standard.mlp(hf, activation=activation, gated=False, bias=bool(hf.get("mlp_bias", False)))
    return standard.decoder(hf, standard.layers(attention, mlp, rope, (None,) * hf["num_hidden_layers"]), norm=norm)


def names(config: DecoderConfig) -> tuple[Name, ...]:
    return (
        *standard.NAMES,
        *standard.PRE_NORM,
        *standard.NORM_BIASES,
        *standard.linear("model.layers.{i}.mlp.up_proj", "layers.{i}.mlp.up"),
    )
