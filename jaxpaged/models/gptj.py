"""GPT-J (Wang & Komatsuzaki 2021): attention and MLP side by side after one norm, the first `rotary_dim` numbers of each head
rotated in neighbouring pairs, a head with a bias. CodeGen (Nijkamp et al. 2022): the same with queries, values and keys fused
in four blocks, one for each of the four machines that it was trained with."""

import numpy as np

from jaxpaged.models import standard
from jaxpaged.models.rope import DEFAULT_THETA, make_rope
from jaxpaged.models.spec import AttentionSpec, DecoderConfig, MLPSpec
from jaxpaged.models.standard import HF, Name, View

MODEL_TYPES = ("gptj", "codegen")
BLOCKS = 4
_ATTENTION = "transformer.h.{i}.attn."
IGNORED = (_ATTENTION + "bias", _ATTENTION + "masked_bias", _ATTENTION + "embed_positions", _ATTENTION + "causal_mask")


def decoder_config(hf: HF) -> DecoderConfig:
    # what GPT-2's configs say too and this family does not heed; classification
    standard.pass_over(hf, "scale_attn_weights", "rotary", "n_ctx", "summary_type", "summary_use_proj", "summary_activation",
                       "summary_proj_to_labels", "summary_first_dropout")  # fmt: skip
    dim, heads = hf["n_embd"], hf["n_head"]
    rotated = hf.get("rotary_dim", 64)
    if not rotated:
        raise ValueError(f"rotary_dim={rotated} is not supported; give the number of a head's dimensions that are rotated.")
    if hf["model_type"] == "codegen" and dim % BLOCKS:
        raise ValueError(f"n_embd={dim} is not supported; it must be a multiple of {BLOCKS}.")
    rope = make_rope(rotated, DEFAULT_THETA, interleaved=True)
    activation = standard.activation(hf.get("activation_function", "gelu_new"))
    mlp = MLPSpec(hf.get("n_inner") or 4 * dim, activation, gated=False, bias=True)
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        embed_dim=dim,
        layers=standard.layers(AttentionSpec(heads, heads, dim // heads), mlp, rope, (None,) * hf["n_layer"]),
        max_positions=hf["n_positions"],
        norm=standard.layer_norm(hf, "layer_norm_epsilon"),
        block="parallel",
        head_bias=True,
        tie=bool(hf.get("tie_word_embeddings", False)),
    )


def _blocks() -> View:
    """[4 blocks of q, v, k] -> q, k, v, along the first axis."""

    def to_ours(x: np.ndarray) -> np.ndarray:
        q, v, k = np.moveaxis(x.reshape(BLOCKS, 3, -1, *x.shape[1:]), 1, 0)
        return np.stack([q, k, v]).reshape(x.shape)

    def to_theirs(x: np.ndarray) -> np.ndarray:
        q, k, v = x.reshape(3, BLOCKS, -1, *x.shape[1:])
        return np.stack([q, v, k], axis=1).reshape(x.shape)

    return View(to_ours, to_theirs)


def names(config: DecoderConfig) -> tuple[Name, ...]:
    theirs, ours = "transformer.h.{i}.", "layers.{i}."
    qkv = [Name(f"{theirs}attn.{part}_proj.weight", ours + "attention.qkv.weight", k, 3) for k, part in enumerate("qkv")]
    return (
        Name("transformer.wte.weight", "embed.weight"),
        Name("lm_head.weight", "head.weight"),
        Name("lm_head.bias", "head_bias"),
        *standard.linear("transformer.ln_f", "norm"),
        *standard.linear(theirs + "ln_1", ours + "attention_norm"),
        Name(theirs + "attn.qkv_proj.weight", ours + "attention.qkv.weight", view=_blocks()),
        *qkv,
        *standard.linear(theirs + "attn.out_proj", ours + "attention.out"),
        *standard.linear(theirs + "mlp.fc_in", ours + "mlp.up"),
        *standard.linear(theirs + "mlp.fc_out", ours + "mlp.down"),
    )
