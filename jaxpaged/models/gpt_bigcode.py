"""GPT-BigCode: SantaCoder and StarCoder 1 (Li et al. 2023): GPT-2 with one key and value for all heads; matrices are written
[out, in]."""

from jaxpaged.models import standard
from jaxpaged.models.spec import AttentionSpec, DecoderConfig, MLPSpec
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("gpt_bigcode",)
IGNORED = ("transformer.h.{i}.attn.bias", "transformer.h.{i}.attn.masked_bias")


def decoder_config(hf: HF) -> DecoderConfig:
    # how products are rounded and fused; classification
    standard.pass_over(hf, "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "num_key_value_heads", "n_ctx",
                       "inference_runner", "validate_runner_input", "pre_allocate_kv_cache", "max_sequence_length",
                       "max_batch_size", "pad_key_length", "summary_type", "summary_use_proj", "summary_activation",
                       "summary_proj_to_labels", "summary_first_dropout")  # fmt: skip
    standard.require(hf, add_cross_attention=False)
    dim = hf["n_embd"]
    activation = standard.activation(hf.get("activation_function", "gelu_pytorch_tanh"))
    mlp = MLPSpec(hf.get("n_inner") or 4 * dim, activation, gated=False, bias=True)
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        embed_dim=dim,
        layers=standard.layers(_attention(hf), mlp, None, (None,) * hf["n_layer"]),
        max_positions=hf["n_positions"],
        norm=standard.layer_norm(hf, "layer_norm_epsilon"),
        learned_positions=hf["n_positions"],
        tie=bool(hf.get("tie_word_embeddings", True)),
    )


def _attention(hf: HF) -> AttentionSpec:
    heads, dim = hf["n_head"], hf["n_embd"] // hf["n_head"]
    scale = dim**-0.5 if hf.get("scale_attn_weights", True) else 1.0
    groups = 1 if hf.get("multi_query", True) else heads
    return AttentionSpec(heads, groups, dim, bias=True, out_bias=True, query_scale=scale)


def names(config: DecoderConfig) -> tuple[Name, ...]:
    theirs, ours = "transformer.h.{i}.", "layers.{i}."
    return (
        Name("transformer.wte.weight", "embed.weight"),
        Name("transformer.wpe.weight", "positions.weight"),
        Name("lm_head.weight", "head.weight"),
        *standard.linear("transformer.ln_f", "norm"),
        *standard.linear(theirs + "ln_1", ours + "attention_norm"),
        *standard.linear(theirs + "ln_2", ours + "mlp_norm"),
        *standard.fused_qkv(theirs + "attn.c_attn", ours + "attention.qkv", config.layers[0].attention),
        *standard.linear(theirs + "attn.c_proj", ours + "attention.out"),
        *standard.linear(theirs + "mlp.c_fc", ours + "mlp.up"),
        *standard.linear(theirs + "mlp.c_proj", ours + "mlp.down"),
    )
