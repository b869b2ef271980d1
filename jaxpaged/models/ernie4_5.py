"""ERNIE 4.5, dense (Baidu 2025), and Helium 1 (Kyutai 2025): Llama, of whose heads neighbouring numbers rotate as pairs."""

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("ernie4_5", "helium")
IGNORED = standard.IGNORED
HEAD_DIM = 128  # of a config that does not say, as transformers has it; the others likewise
KV_HEADS, THETAS = {"ernie4_5": 2, "helium": 20}, {"ernie4_5": 500_000.0, "helium": 100_000.0}
EPS, TIED = {"ernie4_5": 1e-5, "helium": 1e-8}, {"ernie4_5": True, "helium": False}


def decoder_config(hf: HF) -> DecoderConfig:
    kind = hf["model_type"]
    if kind == "ernie4_5":
        bias = out_bias = mlp_bias = bool(hf.get("use_bias", False))
    else:
        bias, out_bias, mlp_bias = bool(hf.get("attention_bias", False)), False, bool(hf.get("mlp_bias", False))
    dim, groups = standard.head_dim(hf, HEAD_DIM), hf.get("num_key_value_heads", KV_HEADS[kind]) or hf["num_attention_heads"]
    attention = standard.attention(hf, head_dim=dim, num_kv_heads=groups, bias=bias, out_bias=out_bias)
    rope = standard.rope(hf, dim=dim, theta=THETAS[kind], interleaved=True)
    layers = standard.layers(attention, standard.mlp(hf, bias=mlp_bias), rope, (None,) * hf["num_hidden_layers"])
    tie = bool(hf.get("tie_word_embeddings", TIED[kind]))
    return standard.decoder(hf, layers, norm=standard.rms_norm(hf, EPS[kind]), tie=tie)


def names(config: DecoderConfig) -> tuple[Name, ...]:
    return standard.NAMES + standard.PRE_NORM
