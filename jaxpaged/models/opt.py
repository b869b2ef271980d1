"""OPT (Zhang et al. 2022): LayerNorm before each branch, learned positions from row 2 on, ReLU, biases, a tied head."""

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig, NormSpec
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("opt",)
PREFIXES = ("model.decoder.", "decoder.")  # Meta's first files have the second
OFFSET = 2  # rows 0 and 1 of the table of positions were for padding


def decoder_config(hf: HF) -> DecoderConfig:
    _refuse(hf)
    standard.pass_over(hf, "layerdrop", "activation_dropout", "init_std", "prefix")  # training; the tokenizer's
    bias, affine = bool(hf.get("enable_bias", True)), bool(hf.get("layer_norm_elementwise_affine", True))
    activation = standard.activation(hf.get("activation_function", "relu"))
    mlp = standard.mlp(hf, "ffn_dim", activation=activation, gated=False, bias=bias)
    attention = standard.attention(hf, bias=bias, out_bias=bias)
    return standard.decoder(
        hf,
        standard.layers(attention, mlp, None, (None,) * hf["num_hidden_layers"]),
        norm=NormSpec(1e-5, "layer", weight=affine, bias=affine),
        learned_positions=hf["max_position_embeddings"] + OFFSET,
        position_offset=OFFSET,
        final_norm=not hf.get("_remove_final_layer_norm", False),
        tie=bool(hf.get("tie_word_embeddings", True)),
    )


def _refuse(hf: HF) -> None:
    """What OPT-350M alone has."""
    if not hf.get("do_layer_norm_before", True):
        raise ValueError("do_layer_norm_before=false (norms after the sum) is not supported; supported: true.")
    size = hf.get("word_embed_proj_dim")
    if size not in (None, hf["hidden_size"]):
        raise ValueError(f"word_embed_proj_dim={size} is not supported; supported: hidden_size ({hf['hidden_size']}).")


def names(config: DecoderConfig) -> tuple[Name, ...]:
    return (Name("lm_head.weight", "head.weight"), *(name for prefix in PREFIXES for name in _names(prefix)))


def _names(prefix: str) -> tuple[Name, ...]:
    theirs, ours = prefix + "layers.{i}.", "layers.{i}."
    qkv = [standard.linear(f"{theirs}self_attn.{part}_proj", ours + "attention.qkv", k, 3) for k, part in enumerate("qkv")]
    return (
        Name(prefix + "embed_tokens.weight", "embed.weight"),
        Name(prefix + "embed_positions.weight", "positions.weight"),
        *standard.linear(prefix + "final_layer_norm", "norm"),
        *standard.linear(theirs + "self_attn_layer_norm", ours + "attention_norm"),
        *standard.linear(theirs + "final_layer_norm", ours + "mlp_norm"),
        *sum(qkv, []),
        *standard.linear(theirs + "self_attn.out_proj", ours + "attention.out"),
        *standard.linear(theirs + "fc1", ours + "mlp.up"),
        *standard.linear(theirs + "fc2", ours + "mlp.down"),
    )
