"""Seed-OSS (ByteDance 2025): Llama with biases of q, k, v."""

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("seed_oss",)
IGNORED = standard.IGNORED
HEAD_DIM, KV_HEADS = 128, 8  # of a config that does not say, as transformers has it


def decoder_config(hf: HF) -> DecoderConfig:
    standard.pass_over(hf, "residual_dropout")  # training only
    standard.require(hf, pretraining_tp=1)
    dim, groups = standard.head_dim(hf, HEAD_DIM), hf.get("num_key_value_heads", KV_HEADS) or hf["num_attention_heads"]
    bias, out_bias = bool(hf.get("attention_bias", True)), bool(hf.get("attention_out_bias", False))
    attention = standard.attention(hf, head_dim=dim, num_kv_heads=groups, bias=bias, out_bias=out_bias)
    mlp = standard.mlp(hf, bias=bool(hf.get("mlp_bias", False)))
    layers = standard.layers(attention, mlp, standard.rope(hf, dim=dim), (None,) * hf["num_hidden_layers"])
    return standard.decoder(hf, layers)


def names(config: DecoderConfig) -> tuple[Name, ...]:
    return standard.NAMES + standard.PRE_NORM
