"""Mixtral: Mistral's layers with eight experts, of which a token takes two, weighted to a sum of 1 (Jiang et al. 2024)."""

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig, MoESpec
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("mixtral",)
IGNORED = standard.IGNORED
THETA = 1e6  # of a config that does not say, as transformers has it


def decoder_config(hf: HF) -> DecoderConfig:
    standard.pass_over(hf, "output_router_logits", "router_aux_loss_coef", "router_jitter_noise")  # training only
    experts = MoESpec(
        num_experts=hf["num_local_experts"],
        top_k=hf.get("num_experts_per_tok", 2),
        ffn_dim=hf["intermediate_size"],
        activation=standard.activation(hf.get("hidden_act", "silu")),
        normalise=True,
    )
    windows = standard.windows(hf, hf.get("sliding_window"))
    layers = standard.layers(standard.attention(hf), experts, standard.rope(hf, theta=THETA), windows)
    return standard.decoder(hf, layers, norm=standard.rms_norm(hf, default=1e-5))


def names(config: DecoderConfig) -> tuple[Name, ...]:
    experts = standard.experts("block_sparse_moe.experts", ("w1", "w3", "w2"))
    router = Name("model.layers.{i}.block_sparse_moe.gate.weight", "layers.{i}.mlp.router.weight")
    return (*standard.NAMES, *standard.PRE_NORM, *experts, router)
