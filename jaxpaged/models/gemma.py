"""Gemma 3, text (Gemma team 2025): five sliding layers to one full, norms before and after, q/k norms, scaled embedding."""

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig, LayerSpec, QKNorm
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("gemma3_text",)
IGNORED = standard.IGNORED
HEAD_DIM, FULL_THETA = 256, 1_000_000.0  # of a config that does not say, as transformers has it


def decoder_config(hf: HF) -> DecoderConfig:
    return standard.decoder(
        hf,
        _layers(hf),
        norm=standard.rms_norm(hf, offset=1.0),
        block="both",
        logit_soft_cap=hf.get("final_logit_softcapping"),
        embed_scale=hf["hidden_size"] ** 0.5,
        tie=bool(hf.get("tie_word_embeddings", True)),
    )


def _layers(hf: HF) -> tuple[LayerSpec, ...]:
    dim, bias = standard.head_dim(hf, HEAD_DIM), bool(hf.get("attention_bias", False))
    attention = standard.attention(
        hf, head_dim=dim, bias=bias, out_bias=bias, qk_norm=QKNorm(standard.rms_norm(hf, offset=1.0)),
        query_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5, soft_cap=hf.get("attn_logit_softcapping"),
    )  # fmt: skip
    mlp = standard.mlp(hf, activation=standard.activation(hf.get("hidden_activation", "gelu_pytorch_tanh")))
    full = standard.rope(hf, "rope_theta", "full_attention", dim=dim, theta=FULL_THETA)
    local = standard.rope(hf, "rope_local_base_freq", "sliding_attention", scaled=False, dim=dim)
    if hf.get("layer_types") is not None:
        hf.get("sliding_window_pattern")  # said twice; layer_types decides
        windows = standard.windows(hf, hf["sliding_window"])
    else:
        every = hf.get("sliding_window_pattern", 6)
        window = hf["sliding_window"]
        windows = tuple(None if (i + 1) % every == 0 else window for i in range(hf["num_hidden_layers"]))
    return tuple(LayerSpec(attention, mlp, full if w is None else local, w) for w in windows)


def names(config: DecoderConfig) -> tuple[Name, ...]:
    return standard.NAMES + standard.PRE_AND_POST_NORM
