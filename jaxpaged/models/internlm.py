"""InternLM 2 and 2.5 (Cai et al. 2024): Llama with one tensor for q, k, v, group by group, and names of its own. InternLM 3
(2025): Llama's names again, biases that two keys decide."""

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig, LayerSpec
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("internlm2", "internlm3")
IGNORED = standard.IGNORED
HEAD_DIM, KV_HEADS = 128, 2  # of an InternLM 3 that does not say, as transformers has it


def decoder_config(hf: HF) -> DecoderConfig:
    standard.pass_over(hf, "auto_map")  # names code on the Hub
    standard.require(hf, pretraining_tp=1)
    if hf["model_type"] == "internlm2":
        return standard.decoder(hf, _second(hf))
    return standard.decoder(hf, _third(hf), norm=standard.rms_norm(hf, 1e-5))


def _second(hf: HF) -> tuple[LayerSpec, ...]:
    bias = bool(hf.get("bias", True))  # as its own code has it
    attention = standard.attention(hf, bias=bias, out_bias=bias)
    return standard.layers(attention, standard.mlp(hf), standard.rope(hf), (None,) * hf["num_hidden_layers"])


def _third(hf: HF) -> tuple[LayerSpec, ...]:
    bias = bool(hf.get("bias") or hf.get("mlp_bias", False))  # transformers' name for it is the second
    qkv_bias = bool(hf.get("qkv_bias") or hf.get("attention_bias", False))
    dim, groups = standard.head_dim(hf, HEAD_DIM), hf.get("num_key_value_heads", KV_HEADS) or hf["num_attention_heads"]
    attention = standard.attention(hf, head_dim=dim, num_kv_heads=groups, bias=qkv_bias, out_bias=bias)
    rope = standard.rope(hf, dim=dim)
    return standard.layers(attention, standard.mlp(hf, bias=bias), rope, (None,) * hf["num_hidden_layers"])


def names(config: DecoderConfig) -> tuple[Name, ...]:
    theirs, ours = "model.layers.{i}.", "layers.{i}."
    return (
        *standard.NAMES,
        *standard.PRE_NORM,
        Name("model.tok_embeddings.weight", "embed.weight"),
        Name("output.weight", "head.weight"),
        Name(theirs + "attention_norm.weight", ours + "attention_norm.weight"),
        Name(theirs + "ffn_norm.weight", ours + "mlp_norm.weight"),
        *standard.fused_qkv(theirs + "attention.wqkv", ours + "attention.qkv", config.layers[0].attention),
        *standard.linear(theirs + "attention.wo", ours + "attention.out"),
        Name(theirs + "feed_forward.w1.weight", ours + "mlp.gate_up.weight", 0, 2),
        Name(theirs + "feed_forward.w3.weight", ours + "mlp.gate_up.weight", 1, 2),
        Name(theirs + "feed_forward.w2.weight", ours + "mlp.down.weight"),
    )
