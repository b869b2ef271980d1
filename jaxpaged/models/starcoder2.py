"""StarCoder2 (Lozhkov et al. 2024): LayerNorm, plain MLPs and biases around grouped, rotated attention that may slide."""

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("starcoder2",)
IGNORED = standard.IGNORED


def decoder_config(hf: HF) -> DecoderConfig:
    for key, supported in (("norm_type", "layer_norm"), ("mlp_type", "default")):
        if hf.get(key, supported) != supported:
            raise ValueError(f"{key}={hf[key]!r} is not supported; supported: {supported!r}.")
    # training; what hidden_act and norm_epsilon say again; scores are in float32 and scaled here, as in transformers
    standard.pass_over(hf, "residual_dropout", "embedding_dropout", "activation_function", "layer_norm_epsilon",
                       "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "scale_attn_weights")  # fmt: skip
    bias = bool(hf.get("use_bias", True))
    activation = standard.activation(hf.get("hidden_act", "gelu_pytorch_tanh"))
    mlp = standard.mlp(hf, activation=activation, gated=False, bias=bias)
    attention = standard.attention(hf, bias=bias, out_bias=bias)
    windows = (hf.get("sliding_window"),) * hf["num_hidden_layers"]
    return standard.decoder(
        hf,
        standard.layers(attention, mlp, standard.rope(hf), windows),
        norm=standard.layer_norm(hf, "norm_epsilon"),
        tie=bool(hf.get("tie_word_embeddings", True)),
    )


def names(config: DecoderConfig) -> tuple[Name, ...]:
    theirs, ours = "model.layers.{i}.mlp.", "layers.{i}.mlp."
    mlp = (*standard.linear(theirs + "c_fc", ours + "up"), *standard.linear(theirs + "c_proj", ours + "down"))
    return (*standard.NAMES, *standard.PRE_NORM, *standard.NORM_BIASES, *mlp)
