"""StableLM (Bellagente et al. 2024): Llama with LayerNorm, a quarter of each head rotated, and, in the 12B, parallel branches
after one norm and a norm for each head's queries and keys."""

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig, QKNorm
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("stablelm",)
IGNORED = standard.IGNORED


def decoder_config(hf: HF) -> DecoderConfig:
    norm = standard.layer_norm(hf, "layer_norm_eps")
    head_norm = standard.layer_norm(hf, "layer_norm_eps", bias=False)
    qk_norm = QKNorm(head_norm, over="heads") if hf.get("qk_layernorm", False) else None
    attention = standard.attention(hf, bias=bool(hf.get("use_qkv_bias", False)), qk_norm=qk_norm)
    rope = standard.rope(hf, share=0.25)
    block = "parallel" if hf.get("use_parallel_residual", False) else "pre"
    layers = standard.layers(attention, standard.mlp(hf), rope, (None,) * hf["num_hidden_layers"])
    return standard.decoder(hf, layers, norm=norm, block=block)


def names(config: DecoderConfig) -> tuple[Name, ...]:
    theirs, ours = "model.layers.{i}.self_attn.", "layers.{i}.attention."
    head_norms = [Name(f"{theirs}{x}_layernorm.norms.{{head}}.weight", f"{ours}{x}_norm.weight") for x in "qk"]
    return (*standard.NAMES, *standard.PRE_NORM, *standard.NORM_BIASES, *head_norms)
