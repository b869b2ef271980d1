"""MiniCPM 1, 2 and 4 (Hu et al. 2024): Llama with factors (muP, Yang et al. 2022) on the embedding, on what a branch adds and
on the logits."""

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("minicpm",)
IGNORED = standard.IGNORED


def decoder_config(hf: HF) -> DecoderConfig:
    # code on the Hub; a draft model's factor
    standard.pass_over(hf, "auto_map", "mup_denominator")
    standard.require(hf, pretraining_tp=1)
    bias, num = bool(hf.get("attention_bias", False)), hf["num_hidden_layers"]
    attention = standard.attention(hf, bias=bias, out_bias=bias)
    return standard.decoder(
        hf,
        standard.layers(attention, standard.mlp(hf), standard.rope(hf), (None,) * num),
        embed_scale=hf.get("scale_emb", 1.0),
        residual_scale=hf.get("scale_depth", 1.0) / num**0.5,
        logit_scale=hf.get("dim_model_base", 1.0) / hf["hidden_size"],
        tie=bool(hf.get("tie_word_embeddings", True)),
    )


def names(config: DecoderConfig) -> tuple[Name, ...]:
    return standard.NAMES + standard.PRE_NORM
