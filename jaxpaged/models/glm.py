"""GLM-4 (GLM team 2024): Llama with biases of q, k, v, half of each head rotated in neighbouring pairs, and one tensor for
gate and up. GLM-4-0414 (glm4) has norms after each branch too."""

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("glm", "glm4")
IGNORED = standard.IGNORED
HEAD_DIM, KV_HEADS, EPS = 128, 2, 1.5625e-7  # of a config that does not say, as transformers has it


def decoder_config(hf: HF) -> DecoderConfig:
    dim = standard.head_dim(hf, HEAD_DIM)
    groups = hf.get("num_key_value_heads", KV_HEADS) or hf["num_attention_heads"]
    bias = bool(hf.get("attention_bias", True))
    attention = standard.attention(hf, head_dim=dim, num_kv_heads=groups, bias=bias)
    rope = standard.rope(hf, dim=dim, share=0.5, interleaved=True)
    layers = standard.layers(attention, standard.mlp(hf), rope, (None,) * hf["num_hidden_layers"])
    block = "both" if hf["model_type"] == "glm4" else "pre"
    return standard.decoder(hf, layers, norm=standard.rms_norm(hf, EPS), block=block)


def names(config: DecoderConfig) -> tuple[Name, ...]:
    theirs, ours = "model.layers.{i}.", "layers.{i}."
    return (
        Name(theirs + "mlp.gate_up_proj.weight", ours + "mlp.gate_up.weight"),  # before those of its parts
        *standard.NAMES,
        *standard.PRE_NORM,
        Name(theirs + "post_self_attn_layernorm.weight", ours + "attention_post_norm.weight"),
        Name(theirs + "post_mlp_layernorm.weight", ours + "mlp_post_norm.weight"),
    )
