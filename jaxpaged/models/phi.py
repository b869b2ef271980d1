"""Phi-1, 1.5 and 2 (Gunasekar et al. 2023): attention and a plain MLP side by side after one LayerNorm, a part of each head
rotated, biases everywhere, the head's too."""

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig, QKNorm
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("phi",)
IGNORED = standard.IGNORED


def decoder_config(hf: HF) -> DecoderConfig:
    norm = standard.layer_norm(hf, "layer_norm_eps")
    qk_norm = QKNorm(norm) if hf.get("qk_layernorm", False) else None
    attention = standard.attention(hf, bias=True, out_bias=True, qk_norm=qk_norm)
    activation = standard.activation(hf.get("hidden_act", "gelu_new"))
    mlp = standard.mlp(hf, activation=activation, gated=False, bias=True)
    rope = standard.rope(hf, share=0.5)
    layers = standard.layers(attention, mlp, rope, (None,) * hf["num_hidden_layers"])
    return standard.decoder(hf, layers, norm=norm, block="parallel", head_bias=True)


def names(config: DecoderConfig) -> tuple[Name, ...]:
    theirs, ours = "model.layers.{i}.", "layers.{i}."
    return (
        *standard.NAMES,
        *standard.NORM_BIASES,
        Name("lm_head.bias", "head_bias"),
        *standard.linear("model.final_layernorm", "norm"),
        *standard.linear(theirs + "self_attn.q_layernorm", ours + "attention.q_norm"),
        *standard.linear(theirs + "self_attn.k_layernorm", ours + "attention.k_norm"),
        *standard.linear(theirs + "self_attn.dense", ours + "attention.out"),
        *standard.linear(theirs + "mlp.fc1", ours + "mlp.up"),
        *standard.linear(theirs + "mlp.fc2", ours + "mlp.down"),
    )
