"""GPT-NeoX and Pythia (Black et al. 2022; Biderman et al. 2023): parallel branches with a norm each, a quarter of each head
rotated, queries, keys and values fused head by head."""

from jaxpaged.models import standard
from jaxpaged.models.rope import DEFAULT_THETA
from jaxpaged.models.spec import DecoderConfig
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("gpt_neox",)
_ATTENTION = "gpt_neox.layers.{i}.attention."
IGNORED = (_ATTENTION + "bias", _ATTENTION + "masked_bias", _ATTENTION + "rotary_emb.inv_freq")


def decoder_config(hf: HF) -> DecoderConfig:
    standard.pass_over(hf, "classifier_dropout")
    bias = bool(hf.get("attention_bias", True))
    theta = hf.get("rope_theta") or DEFAULT_THETA  # said beside the family's own key by some versions of transformers
    rope = standard.rope(hf, "rotary_emb_base", theta=theta, share=hf.get("rotary_pct", 0.25))
    mlp = standard.mlp(hf, activation=standard.activation(hf.get("hidden_act", "gelu")), gated=False, bias=True)
    attention = standard.attention(hf, bias=bias, out_bias=bias)
    return standard.decoder(
        hf,
        standard.layers(attention, mlp, rope, (None,) * hf["num_hidden_layers"]),
        norm=standard.layer_norm(hf, "layer_norm_eps"),
        block="parallel2" if hf.get("use_parallel_residual", True) else "pre",
    )


def names(config: DecoderConfig) -> tuple[Name, ...]:
    theirs, ours = "gpt_neox.layers.{i}.", "layers.{i}."
    attention = config.layers[0].attention
    return (
        Name("gpt_neox.embed_in.weight", "embed.weight"),
        Name("embed_out.weight", "head.weight"),
        *standard.linear("gpt_neox.final_layer_norm", "norm"),
        *standard.linear(theirs + "input_layernorm", ours + "attention_norm"),
        *standard.linear(theirs + "post_attention_layernorm", ours + "mlp_norm"),
        *standard.fused_qkv(theirs + "attention.query_key_value", ours + "attention.qkv", attention),
        *standard.linear(theirs + "attention.dense", ours + "attention.out"),
        *standard.linear(theirs + "mlp.dense_h_to_4h", ours + "mlp.up"),
        *standard.linear(theirs + "mlp.dense_4h_to_h", ours + "mlp.down"),
    )
