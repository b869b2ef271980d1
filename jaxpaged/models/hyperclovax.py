"""HyperCLOVA X SEED (NAVER 2025): Llama with factors (muP, Yang et al. 2022) on the embedding, on what a branch adds, on
attention's products and on the logits, and norms after each branch too."""

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("hyperclovax",)
IGNORED = standard.IGNORED


def decoder_config(hf: HF) -> DecoderConfig:
    standard.pass_over(hf, "auto_map")  # names code on the Hub that transformers has as well
    standard.require(hf, pretraining_tp=1)
    bias = bool(hf.get("attention_bias", False))
    attention = standard.attention(hf, bias=bias, out_bias=bias, query_scale=hf.get("attention_multiplier"))
    mlp = standard.mlp(hf, bias=bool(hf.get("mlp_bias", False)))
    return standard.decoder(
        hf,
        standard.layers(attention, mlp, standard.rope(hf), (None,) * hf["num_hidden_layers"]),
        block="both" if hf.get("use_post_norm", True) else "pre",
        embed_scale=hf.get("embedding_multiplier", 1.0),
        residual_scale=hf.get("residual_multiplier", 1.0),
        logit_scale=hf.get("logits_scaling", 1.0),
    )


def names(config: DecoderConfig) -> tuple[Name, ...]:
    theirs, ours = "model.layers.{i}.", "layers.{i}."
    return (
        *standard.NAMES,
        *standard.PRE_NORM,
        Name(theirs + "post_norm1.weight", ours + "attention_post_norm.weight"),
        Name(theirs + "post_norm2.weight", ours + "mlp_post_norm.weight"),
    )
