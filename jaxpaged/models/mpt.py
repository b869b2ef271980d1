"""MPT (MosaicML 2023): ALiBi instead of positions, LayerNorm, nothing has a bias, a tied head."""

from jaxpaged.hf_config import HFConfig
from jaxpaged.models import standard
from jaxpaged.models.spec import AttentionSpec, DecoderConfig, MLPSpec
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("mpt",)


def decoder_config(hf: HF) -> DecoderConfig:
    # how it was trained; learned_pos_emb is for a table that ALiBi stands in for
    standard.pass_over(hf, "auto_map", "init_device", "init_config", "embedding_fraction", "norm_type", "emb_pdrop",
                       "learned_pos_emb", "tokenizer_name", "verbose")  # fmt: skip
    standard.require(hf, expansion_ratio=4, no_bias=True, logit_scale=None)
    dim = hf["d_model"]
    mlp = MLPSpec(4 * dim, "gelu", gated=False)
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        embed_dim=dim,
        layers=standard.layers(_attention(hf), mlp, None, (None,) * hf["n_layers"]),
        max_positions=hf.get("max_seq_len", 2048),
        norm=standard.layer_norm(hf, "layer_norm_epsilon", bias=False),
        tie=bool(hf.get("tie_word_embeddings", True)),
    )


def _attention(hf: HF) -> AttentionSpec:
    heads, inner = hf["n_heads"], HFConfig({**(hf.get("attn_config") or {}), "model_type": "mpt"}, source="attn_config")
    standard.pass_over(inner, "attn_impl")
    standard.require(inner, attn_type="multihead_attention", prefix_lm=False, qk_ln=False, attn_uses_sequence_id=False,
                     alibi=True, alibi_bias_max=8)  # fmt: skip
    scale, clip = inner.get("softmax_scale"), inner.get("clip_qkv") or None
    inner.finish()
    slopes = standard.alibi_slopes(heads)
    return AttentionSpec(heads, heads, hf["d_model"] // heads, query_scale=scale, clip=clip, alibi=slopes)


def names(config: DecoderConfig) -> tuple[Name, ...]:
    theirs, ours = "transformer.blocks.{i}.", "layers.{i}."
    return (
        Name("transformer.wte.weight", "embed.weight"),
        Name("transformer.norm_f.weight", "norm.weight"),
        Name("lm_head.weight", "head.weight"),
        Name(theirs + "norm_1.weight", ours + "attention_norm.weight"),
        Name(theirs + "norm_2.weight", ours + "mlp_norm.weight"),
        Name(theirs + "attn.Wqkv.weight", ours + "attention.qkv.weight"),
        Name(theirs + "attn.out_proj.weight", ours + "attention.out.weight"),
        Name(theirs + "ffn.up_proj.weight", ours + "mlp.up.weight"),
        Name(theirs + "ffn.down_proj.weight", ours + "mlp.down.weight"),
    )
