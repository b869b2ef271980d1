"""Hunyuan 1, dense (Tencent 2025): Llama with norms of each head's queries and keys, after the rotation, whose base is
stretched by a fixed `alpha`."""

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig, QKNorm
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("hunyuan_v1_dense",)
IGNORED = standard.IGNORED


def decoder_config(hf: HF) -> DecoderConfig:
    # the tokenizer's; what other models of the house have
    standard.pass_over(hf, "eod_token_id", "im_end_id", "im_newline_id", "im_start_id", "sep_token_id", "org_vocab_size",
                       "pad_id", "attention_head_dim", "cla_share_factor")  # fmt: skip
    # keys of theirs that tell what this one always does
    standard.require(hf, pretraining_tp=1, use_qk_norm=True, norm_type="rms", use_cla=False, mlp_bias=False)
    norm, bias = standard.rms_norm(hf, 1e-5), bool(hf.get("attention_bias", False))
    attention = standard.attention(hf, bias=bias, out_bias=bias, qk_norm=QKNorm(norm, after_rope=True))
    layers = standard.layers(attention, standard.mlp(hf), standard.rope(hf), (None,) * hf["num_hidden_layers"])
    return standard.decoder(hf, layers, norm=norm)


def names(config: DecoderConfig) -> tuple[Name, ...]:
    theirs, ours = "model.layers.{i}.self_attn.", "layers.{i}.attention."
    return (
        *standard.NAMES,
        *standard.PRE_NORM,
        Name(theirs + "query_layernorm.weight", ours + "q_norm.weight"),
        Name(theirs + "key_layernorm.weight", ours + "k_norm.weight"),
    )
