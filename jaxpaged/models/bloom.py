"""BLOOM (Le Scao et al. 2022): ALiBi instead of positions, a norm after the embedding, queries, keys and values fused head by
head, a tied head."""

from jaxpaged.models import standard
from jaxpaged.models.spec import AttentionSpec, DecoderConfig, MLPSpec
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("bloom",)
PREFIXES = ("transformer.", "")  # transformers saves the first; BigScience's files have none


def decoder_config(hf: HF) -> DecoderConfig:
    if hf.get("apply_residual_connection_post_layernorm", False):
        raise ValueError("apply_residual_connection_post_layernorm=true is not supported; supported: false.")
    # in which order products were summed in training, and other remarks of Megatron's
    standard.pass_over(hf, "pretraining_tp", "slow_but_exact", "attention_softmax_in_fp32", "masked_softmax_fusion",
                       "bias_dropout_fusion", "skip_bias_add", "skip_bias_add_qkv", "offset_alibi", "n_inner")  # fmt: skip
    dim, heads = standard.either(hf, "hidden_size", "n_embed"), standard.either(hf, "n_head", "num_attention_heads")
    attention = AttentionSpec(heads, heads, dim // heads, bias=True, out_bias=True, alibi=standard.alibi_slopes(heads))
    mlp = MLPSpec(4 * dim, "gelu_tanh", gated=False, bias=True)
    depth = standard.either(hf, "n_layer", "num_hidden_layers")
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        embed_dim=dim,
        layers=standard.layers(attention, mlp, None, (None,) * depth),
        max_positions=hf.get("seq_length") or 2048,  # of training; ALiBi knows no end
        norm=standard.layer_norm(hf, "layer_norm_epsilon"),
        embed_norm=True,
        tie=bool(hf.get("tie_word_embeddings", True)),
    )


def names(config: DecoderConfig) -> tuple[Name, ...]:
    rules, attention = [Name("lm_head.weight", "head.weight")], config.layers[0].attention
    for prefix in PREFIXES:
        theirs, ours = prefix + "h.{i}.", "layers.{i}."
        rules += [
            Name(prefix + "word_embeddings.weight", "embed.weight"),
            *standard.linear(prefix + "word_embeddings_layernorm", "embed_norm"),
            *standard.linear(prefix + "ln_f", "norm"),
            *standard.linear(theirs + "input_layernorm", ours + "attention_norm"),
            *standard.linear(theirs + "post_attention_layernorm", ours + "mlp_norm"),
            *standard.fused_qkv(theirs + "self_attention.query_key_value", ours + "attention.qkv", attention),
            *standard.linear(theirs + "self_attention.dense", ours + "attention.out"),
            *standard.linear(theirs + "mlp.dense_h_to_4h", ours + "mlp.up"),
            *standard.linear(theirs + "mlp.dense_4h_to_h", ours + "mlp.down"),
        ]
    return tuple(rules)
