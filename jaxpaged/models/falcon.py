"""Falcon (Almazrouei et al. 2023): 7B with one key and value for all heads and one norm before both branches, 40B and 180B
with groups and two norms, RW (RefinedWeb) with ALiBi and one branch after the other."""

from jaxpaged.models import standard
from jaxpaged.models.spec import AttentionSpec, DecoderConfig, MLPSpec
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("falcon",)
IGNORED = ("transformer.h.{i}.self_attention.rotary_emb.inv_freq",)
MAX_POSITIONS = 2048  # of a config that does not say, as transformers has it


def decoder_config(hf: HF) -> DecoderConfig:
    standard.pass_over(hf, "apply_residual_connection_post_layernorm", "ff_factor")  # left over; ffn_hidden_size decides
    longest, attention = hf.get("max_position_embeddings") or MAX_POSITIONS, _attention(hf)
    rope = standard.rope(hf, max_positions=longest)
    width = hf.get("ffn_hidden_size") or 4 * hf["hidden_size"]
    activation = standard.activation(hf.get("activation", "gelu"))
    mlp = MLPSpec(width, activation, gated=False, bias=bool(hf.get("bias", False)))
    return standard.decoder(
        hf,
        standard.layers(attention, mlp, None if attention.alibi else rope, (None,) * hf["num_hidden_layers"]),
        max_positions=longest,
        norm=standard.layer_norm(hf, "layer_norm_epsilon"),
        block=_block(hf),
        tie=bool(hf.get("tie_word_embeddings", True)),
    )


def _attention(hf: HF) -> AttentionSpec:
    heads, bias = hf["num_attention_heads"], bool(hf.get("bias", False))
    dim, groups = hf["hidden_size"] // heads, hf.get("num_kv_heads") or heads
    one_for_all = hf.get("multi_query", True)
    if not hf.get("new_decoder_architecture", False):
        groups = 1 if one_for_all else heads
    # the slopes are added to the products before these are scaled
    alibi = tuple(slope * dim**-0.5 for slope in standard.alibi_slopes(heads)) if hf.get("alibi", False) else None
    return AttentionSpec(heads, groups, dim, bias=bias, out_bias=bias, alibi=alibi)


def _block(hf: HF) -> str:
    parallel, norms = hf.get("parallel_attn", True), hf.get("num_ln_in_parallel_attn")
    if hf.get("new_decoder_architecture", False):
        return "parallel" if norms == 1 else "parallel2"
    return "parallel" if parallel else "pre"


def names(config: DecoderConfig) -> tuple[Name, ...]:
    theirs, ours = "transformer.h.{i}.", "layers.{i}."
    attention = config.layers[0].attention
    return (
        Name("transformer.word_embeddings.weight", "embed.weight"),
        Name("lm_head.weight", "head.weight"),
        *standard.linear("transformer.ln_f", "norm"),
        *standard.linear(theirs + ("ln_attn" if config.block == "parallel2" else "input_layernorm"), ours + "attention_norm"),
        *standard.linear(theirs + ("ln_mlp" if config.block == "parallel2" else "post_attention_layernorm"), ours + "mlp_norm"),
        *standard.fused_qkv(theirs + "self_attention.query_key_value", ours + "attention.qkv", attention),
        *standard.linear(theirs + "self_attention.dense", ours + "attention.out"),
        *standard.linear(theirs + "mlp.dense_h_to_4h", ours + "mlp.up"),
        *standard.linear(theirs + "mlp.dense_4h_to_h", ours + "mlp.down"),
    )
