"""OLMoE (Muennighoff et al. 2024): OLMo's layers with small experts, norms of all queries and all keys together, and perhaps
clipped q, k, v."""

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig, MoESpec, QKNorm
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("olmoe",)
IGNORED = standard.IGNORED


def decoder_config(hf: HF) -> DecoderConfig:
    standard.pass_over(hf, "output_router_logits", "router_aux_loss_coef")  # training only
    norm, bias = standard.rms_norm(hf, 1e-5), bool(hf.get("attention_bias", False))
    attention = standard.attention(hf, bias=bias, out_bias=bias, qk_norm=QKNorm(norm, "all"), clip=hf.get("clip_qkv"))
    experts = MoESpec(
        num_experts=standard.either(hf, "num_experts", "num_local_experts"),
        top_k=hf["num_experts_per_tok"],
        ffn_dim=hf["intermediate_size"],
        activation=standard.activation(hf.get("hidden_act", "silu")),
        normalise=bool(hf.get("norm_topk_prob", False)),
    )
    layers = standard.layers(attention, experts, standard.rope(hf), (None,) * hf["num_hidden_layers"])
    return standard.decoder(hf, layers, norm=norm)


def names(config: DecoderConfig) -> tuple[Name, ...]:
    router = Name("model.layers.{i}.mlp.gate.weight", "layers.{i}.mlp.router.weight")
    return (*standard.NAMES, *standard.PRE_NORM, *standard.experts("mlp.experts"), router)
