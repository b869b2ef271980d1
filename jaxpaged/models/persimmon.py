"""Persimmon (Adept 2023): queries, keys and values fused head by head, a norm of each head's queries and keys, half of a
head rotated, a plain MLP with squared ReLU, biases everywhere."""

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig, QKNorm
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("persimmon",)
IGNORED = standard.IGNORED


def decoder_config(hf: HF) -> DecoderConfig:
    norm = standard.layer_norm(hf, "layer_norm_eps")
    qk_norm = QKNorm(norm) if hf.get("qk_layernorm", True) else None
    attention = standard.attention(hf, bias=True, out_bias=True, qk_norm=qk_norm)
    mlp = standard.mlp(hf, activation=standard.activation(hf.get("hidden_act", "relu2")), gated=False, bias=True)
    rope = standard.rope(hf, share=0.5)
    return standard.decoder(hf, standard.layers(attention, mlp, rope, (None,) * hf["num_hidden_layers"]), norm=norm)


def names(config: DecoderConfig) -> tuple[Name, ...]:
    theirs, ours = "model.layers.{i}.", "layers.{i}."
    return (
        *standard.NAMES,
        *standard.PRE_NORM,
        *standard.NORM_BIASES,
        *standard.linear("model.final_layernorm", "norm"),
        *standard.fused_qkv(theirs + "self_attn.query_key_value", ours + "attention.qkv", config.layers[0].attention),
        *standard.linear(theirs + "self_attn.dense", ours + "attention.out"),
        *standard.linear(theirs + "self_attn.q_layernorm", ours + "attention.q_norm"),
        *standard.linear(theirs + "self_attn.k_layernorm", ours + "attention.k_norm"),
        *standard.linear(theirs + "mlp.dense_h_to_4h", ours + "mlp.up"),
        *standard.linear(theirs + "mlp.dense_4h_to_h", ours + "mlp.down"),
    )
