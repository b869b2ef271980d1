"""Phi-3.5-MoE (Abdin et al. 2024): LayerNorm with a bias, positions that LongRoPE stretches, and two experts a token, the
second chosen and weighed as if the first were not there (SparseMixer; Liu et al. 2024)."""

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig, MoESpec
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("phimoe",)
IGNORED = standard.IGNORED
THETA = 1e6  # of a config that does not say, as transformers has it


def decoder_config(hf: HF) -> DecoderConfig:
    standard.pass_over(hf, "output_router_logits", "router_aux_loss_coef", "input_jitter_noise")  # training only
    standard.pass_over(hf, "auto_map")  # names code on the Hub that transformers has as well
    standard.require(hf, num_experts_per_tok=2)
    bias = bool(hf.get("attention_bias", False))
    attention = standard.attention(hf, bias=bias, out_bias=bias)
    experts = MoESpec(
        num_experts=hf["num_local_experts"],
        top_k=2,
        ffn_dim=hf["intermediate_size"],
        activation=standard.activation(hf.get("hidden_act", "silu")),
        router="sparsemixer",
        jitter=hf.get("router_jitter_noise", 0.01),
    )
    windows = standard.windows(hf, hf.get("sliding_window"))
    layers = standard.layers(attention, experts, standard.rope(hf, theta=THETA), windows)
    norm = standard.layer_norm(hf, "rms_norm_eps")
    return standard.decoder(hf, layers, norm=norm, head_bias=bool(hf.get("lm_head_bias", False)))


def names(config: DecoderConfig) -> tuple[Name, ...]:
    return (
        *standard.NAMES,
        *standard.PRE_NORM,
        *standard.NORM_BIASES,
        *standard.experts("block_sparse_moe.experts", ("w1", "w3", "w2")),
        Name("model.layers.{i}.block_sparse_moe.gate.weight", "layers.{i}.mlp.router.weight"),
        Name("lm_head.bias", "head_bias"),
    )
