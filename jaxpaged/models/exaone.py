"""EXAONE 3 (LG AI Research 2024): Llama with names of its own. EXAONE 4 (2025): norms of what a branch gives and of queries
and keys; where layers slide, the full ones among them do not rotate."""

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig, LayerSpec, QKNorm
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("exaone", "exaone4")
IGNORED = (*standard.IGNORED, "transformer.h.{i}.attn.attention.rotary.inv_freq")
THETA, KV_HEADS = 500_000.0, 8  # of an EXAONE 3 that does not say, as transformers has it
WINDOW, PATTERN = 4096, 4  # and of an EXAONE 4


def decoder_config(hf: HF) -> DecoderConfig:
    return _third(hf) if hf["model_type"] == "exaone" else _fourth(hf)


def _third(hf: HF) -> DecoderConfig:
    standard.pass_over(hf, "auto_map", "embed_dropout")  # code on the Hub that does the same; training only
    bias = bool(hf.get("attention_bias", False))
    groups = hf.get("num_key_value_heads", KV_HEADS) or hf["num_attention_heads"]
    attention = standard.attention(hf, num_kv_heads=groups, bias=bias, out_bias=bias)
    activation = standard.activation(hf.get("activation_function") or hf.get("hidden_act", "silu"))
    mlp = standard.mlp(hf, activation=activation, bias=bool(hf.get("mlp_bias", False)))
    num = standard.either(hf, "num_hidden_layers", "num_layers")
    norm = standard.rms_norm(hf, hf.get("layer_norm_epsilon", 1e-5))
    return standard.decoder(hf, standard.layers(attention, mlp, standard.rope(hf, theta=THETA), (None,) * num), norm=norm)


def _fourth(hf: HF) -> DecoderConfig:
    norm, window = standard.rms_norm(hf, 1e-5), hf.get("sliding_window", WINDOW)
    attention, mlp, rope = standard.attention(hf, qk_norm=QKNorm(norm)), standard.mlp(hf), standard.rope(hf)
    layers = [LayerSpec(attention, mlp, rope if w or window is None else None, w) for w in _windows(hf, window)]
    return standard.decoder(hf, tuple(layers), norm=norm, block="post")


def _windows(hf: HF, window: int | None) -> tuple[int | None, ...]:
    """From `layer_types`; without that key from the pattern: a number n (each n-th layer is full) or letters, "LLLG", local
    and global, again and again, with a last layer that is global always."""
    pattern, num = hf.get("sliding_window_pattern", PATTERN), hf["num_hidden_layers"]
    if hf.get("layer_types") is not None or window is None or not isinstance(pattern, str):
        return standard.windows(hf, window, pattern or 0)
    if set(pattern) - set("LG") or not pattern:
        raise ValueError(f"sliding_window_pattern {pattern!r} is not supported; give a number or the letters L and G.")
    return tuple(window if i < num - 1 and pattern[i % len(pattern)] == "L" else None for i in range(num))


def names(config: DecoderConfig) -> tuple[Name, ...]:
    if config.block == "post":
        return standard.NAMES + standard.PRE_AND_POST_NORM
    theirs, ours = "transformer.h.{i}.", "layers.{i}."
    return (
        *standard.NAMES,
        *standard.PRE_NORM,
        Name("transformer.wte.weight", "embed.weight"),
        Name("transformer.ln_f.weight", "norm.weight"),
        Name(theirs + "ln_1.weight", ours + "attention_norm.weight"),
        Name(theirs + "ln_2.weight", ours + "mlp_norm.weight"),
        *(name for i, part in enumerate("qkv")
          for name in standard.linear(f"{theirs}attn.attention.{part}_proj", ours + "attention.qkv", i, 3)),
        *standard.linear(theirs + "attn.attention.out_proj", ours + "attention.out"),
        *standard.linear(theirs + "mlp.c_fc_0", ours + "mlp.gate_up", 0, 2),
        *standard.linear(theirs + "mlp.c_fc_1", ours + "mlp.gate_up", 1, 2),
        *standard.linear(theirs + "mlp.c_proj", ours + "mlp.down"),
    )  # fmt: skip
