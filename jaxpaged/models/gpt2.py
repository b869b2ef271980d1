"""GPT-2 (Radford et al. 2019): LayerNorm, learned positions, plain MLPs, a tied head; matrices are written [in, out]."""

from jaxpaged.models import standard
from jaxpaged.models.spec import AttentionSpec, DecoderConfig, LayerSpec, MLPSpec
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("gpt2",)
PREFIXES = ("transformer.", "")  # transformers saves the first; OpenAI's files on the Hub have none
IGNORED = tuple(f"{prefix}h.{{i}}.attn.{mask}" for prefix in PREFIXES for mask in ("bias", "masked_bias"))
TRANSPOSED = standard.transposed()


def decoder_config(hf: HF) -> DecoderConfig:
    # scores in float32, as everywhere here; the length said again; heads for classification
    standard.pass_over(hf, "reorder_and_upcast_attn", "n_ctx", "summary_type", "summary_use_proj", "summary_activation",
                       "summary_proj_to_labels", "summary_first_dropout")  # fmt: skip
    dim = hf["n_embd"]
    mlp = MLPSpec(hf.get("n_inner") or 4 * dim, standard.activation(hf.get("activation_function", "gelu_new")),
                  gated=False, bias=True)  # fmt: skip
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        embed_dim=dim,
        layers=tuple(LayerSpec(attention, mlp) for attention in _attentions(hf)),
        max_positions=hf["n_positions"],
        norm=standard.layer_norm(hf, "layer_norm_epsilon"),
        learned_positions=hf["n_positions"],
        tie=bool(hf.get("tie_word_embeddings", True)),
    )


def _attentions(hf: HF) -> list[AttentionSpec]:
    heads, dim = hf["n_head"], hf["n_embd"] // hf["n_head"]
    scale = dim**-0.5 if hf.get("scale_attn_weights", True) else 1.0
    deeper_is_flatter = hf.get("scale_attn_by_inverse_layer_idx", False)
    scales = [scale / (i + 1) if deeper_is_flatter else scale for i in range(hf["n_layer"])]
    return [AttentionSpec(heads, heads, dim, bias=True, out_bias=True, query_scale=scale) for scale in scales]


def names(config: DecoderConfig) -> tuple[Name, ...]:
    rules = [Name("lm_head.weight", "head.weight")]
    for prefix in PREFIXES:
        theirs, ours = prefix + "h.{i}.", "layers.{i}."
        rules += [
            Name(prefix + "wte.weight", "embed.weight"),
            Name(prefix + "wpe.weight", "positions.weight"),
            *standard.linear(prefix + "ln_f", "norm"),
            *standard.linear(theirs + "ln_1", ours + "attention_norm"),
            *standard.linear(theirs + "ln_2", ours + "mlp_norm"),
            *_conv1d(theirs + "attn.c_attn", ours + "attention.qkv"),
            *_conv1d(theirs + "attn.c_proj", ours + "attention.out"),
            *_conv1d(theirs + "mlp.c_fc", ours + "mlp.up"),
            *_conv1d(theirs + "mlp.c_proj", ours + "mlp.down"),
        ]
    return tuple(rules)


def _conv1d(theirs: str, path: str) -> list[Name]:
    return [Name(f"{theirs}.weight", f"{path}.weight", view=TRANSPOSED), Name(f"{theirs}.bias", f"{path}.bias")]
