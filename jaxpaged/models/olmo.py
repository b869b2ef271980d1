"""OLMo: LayerNorm that learns nothing, clipped q, k, v (Groeneveld et al. 2024). OLMo 2: norms of what a branch gives, and of
all queries and all keys together (OLMo team 2025). OLMo 3: three sliding layers to a full one, which alone is stretched."""

from jaxpaged.models import standard
from jaxpaged.models.spec import AttentionSpec, DecoderConfig, LayerSpec, NormSpec, QKNorm
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("olmo", "olmo2", "olmo3")
IGNORED = standard.IGNORED
THETA, WINDOW = 500_000.0, 4096  # of an OLMo 3 that does not say, as transformers has it


def decoder_config(hf: HF) -> DecoderConfig:
    if hf["model_type"] == "olmo":
        layers = _all_full(hf, _attention(hf, clip=hf.get("clip_qkv")))
        return standard.decoder(hf, layers, norm=NormSpec(1e-5, "layer", weight=False))
    norm = standard.rms_norm(hf, 1e-5)
    attention = _attention(hf, qk_norm=QKNorm(norm, "all"))
    layers = _all_full(hf, attention) if hf["model_type"] == "olmo2" else _sliding(hf, attention)
    return standard.decoder(hf, layers, norm=norm, block="post")


def _attention(hf: HF, **choices) -> AttentionSpec:
    bias = bool(hf.get("attention_bias", False))
    return standard.attention(hf, bias=bias, out_bias=bias, **choices)


def _all_full(hf: HF, attention: AttentionSpec) -> tuple[LayerSpec, ...]:
    return standard.layers(attention, standard.mlp(hf), standard.rope(hf), (None,) * hf["num_hidden_layers"])


def _sliding(hf: HF, attention: AttentionSpec) -> tuple[LayerSpec, ...]:
    full = standard.rope(hf, kind="full_attention", theta=THETA)
    local = standard.rope(hf, kind="sliding_attention", scaled=False, theta=THETA)
    mlp, windows = standard.mlp(hf), standard.windows(hf, hf.get("sliding_window", WINDOW), 4)
    return tuple(LayerSpec(attention, mlp, full if w is None else local, w) for w in windows)


def names(config: DecoderConfig) -> tuple[Name, ...]:
    return standard.NAMES + (standard.PRE_NORM if config.block == "pre" else standard.PRE_AND_POST_NORM)
