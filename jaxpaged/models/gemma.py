"""Gemma 1 to 3, text: scaled embedding, norms of 1 + weight (Gemma team 2024); from 2 on norms before and after, sliding
layers and soft caps (2024b); in 3 norms of q and k, five sliding layers to a full one (2025)."""

from jaxpaged.models import standard
from jaxpaged.models.spec import AttentionSpec, DecoderConfig, LayerSpec, QKNorm
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("gemma", "gemma2", "gemma3_text")
IGNORED = standard.IGNORED
HEAD_DIM, FULL_THETA, WINDOW = 256, 1_000_000.0, 4096  # of a config that does not say, as transformers has it
CAPS = {"gemma2": (50.0, 30.0), "gemma3_text": (None, None)}  # of attention, of logits


def decoder_config(hf: HF) -> DecoderConfig:
    kind = hf["model_type"]
    layers = {"gemma": _plain, "gemma2": _alternating, "gemma3_text": _two_thetas}[kind]
    later = {"block": "both", "logit_soft_cap": hf.get("final_logit_softcapping", CAPS[kind][1])} if kind in CAPS else {}
    return standard.decoder(
        hf,
        layers(hf),
        norm=standard.rms_norm(hf, offset=1.0),
        embed_scale=hf["hidden_size"] ** 0.5,
        tie=bool(hf.get("tie_word_embeddings", True)),
        **later,
    )


def _attention(hf: HF, **choices) -> AttentionSpec:
    bias = bool(hf.get("attention_bias", False))
    return standard.attention(hf, head_dim=standard.head_dim(hf, HEAD_DIM), bias=bias, out_bias=bias, **choices)


def _capped_attention(hf: HF, **choices) -> AttentionSpec:
    cap = hf.get("attn_logit_softcapping", CAPS[hf["model_type"]][0])
    return _attention(hf, query_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5, soft_cap=cap, **choices)


def _mlp(hf: HF):
    """The first releases say "gelu" and mean its tanh form; later ones say it right, by another key."""
    name = hf.get("hidden_activation") or hf.get("hidden_act", "gelu_pytorch_tanh")
    return standard.mlp(hf, activation="gelu_tanh" if name == "gelu" else standard.activation(name))


def _plain(hf: HF) -> tuple[LayerSpec, ...]:
    rope = standard.rope(hf, dim=standard.head_dim(hf, HEAD_DIM))
    return standard.layers(_attention(hf), _mlp(hf), rope, (None,) * hf["num_hidden_layers"])


def _alternating(hf: HF) -> tuple[LayerSpec, ...]:
    rope, windows = standard.rope(hf, dim=standard.head_dim(hf, HEAD_DIM)), standard.windows(hf, _window(hf), 2)
    return standard.layers(_capped_attention(hf), _mlp(hf), rope, windows)


def _two_thetas(hf: HF) -> tuple[LayerSpec, ...]:
    """Sliding layers rotate by another base than full ones."""
    attention = _capped_attention(hf, qk_norm=QKNorm(standard.rms_norm(hf, offset=1.0)))
    mlp, dim = _mlp(hf), standard.head_dim(hf, HEAD_DIM)
    full = standard.rope(hf, "rope_theta", "full_attention", dim=dim, theta=FULL_THETA)
    local = standard.rope(hf, "rope_local_base_freq", "sliding_attention", scaled=False, dim=dim)
    windows = standard.windows(hf, _window(hf), hf.get("sliding_window_pattern", 6))  # layer_types decides if it is there
    return tuple(LayerSpec(attention, mlp, full if w is None else local, w) for w in windows)


def _window(hf: HF) -> int:
    return hf.get("sliding_window", WINDOW)


def names(config: DecoderConfig) -> tuple[Name, ...]:
    return standard.NAMES + (standard.PRE_NORM if config.block == "pre" else standard.PRE_AND_POST_NORM)
