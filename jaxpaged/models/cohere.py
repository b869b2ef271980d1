"""Cohere's Command R and Aya: attention and MLP side by side after one LayerNorm without bias, neighbouring numbers rotated
as pairs, logits scaled. Command R7B and A (cohere2; Cohere team 2025): sliding layers, and full ones that do not rotate."""

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig, LayerSpec, QKNorm
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("cohere", "cohere2")
IGNORED = standard.IGNORED
# Of a config that does not say, as transformers has it.
LOGIT_SCALE, WINDOW, PATTERN = 0.0625, 4096, 4
THETAS = {"cohere": 500_000.0, "cohere2": 10_000.0}


def decoder_config(hf: HF) -> DecoderConfig:
    _check(hf)
    kind = hf["model_type"]
    norm, bias = standard.layer_norm(hf, "layer_norm_eps", bias=False), bool(hf.get("attention_bias", False))
    qk_norm = QKNorm(norm, over="heads") if hf.get("use_qk_norm", False) else None
    attention = standard.attention(hf, bias=bias, out_bias=bias, qk_norm=qk_norm)
    mlp, rope = standard.mlp(hf), standard.rope(hf, theta=THETAS[kind], interleaved=True)
    if kind == "cohere":
        layers = standard.layers(attention, mlp, rope, (None,) * hf["num_hidden_layers"])
    else:
        windows = standard.windows(hf, hf.get("sliding_window", WINDOW), hf.get("sliding_window_pattern", PATTERN))
        layers = tuple(LayerSpec(attention, mlp, rope if window else None, window) for window in windows)
    return standard.decoder(
        hf,
        layers,
        max_positions=hf.get("model_max_length") or hf["max_position_embeddings"],  # the first is longer
        norm=norm,
        block="parallel",
        logit_scale=hf.get("logit_scale", LOGIT_SCALE),
        tie=bool(hf.get("tie_word_embeddings", True)),
    )


def _check(hf: HF) -> None:
    """What the files on the Hub tell about themselves beside."""
    standard.pass_over(hf, "pretraining_tp", "use_parallel_embedding", "layer_switch")  # the last says the pattern again
    standard.require(hf, position_embedding_type="rope_gptj", rotary_pct=1.0, order_of_interleaved_layers="local_attn_first",
                     use_gated_activation=True, use_parallel_block=True, use_embedding_sharing=True)  # fmt: skip
    if hf["model_type"] == "cohere2":
        standard.require(hf, use_qk_norm=False)


def names(config: DecoderConfig) -> tuple[Name, ...]:
    return standard.NAMES
