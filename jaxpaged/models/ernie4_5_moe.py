"""ERNIE 4.5 with experts (Baidu 2025): some layers have experts, chosen with a learned correction and weighted to a sum of 1,
beside an MLP that all tokens take; of the heads neighbouring numbers rotate as pairs."""

import numpy as np

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig, LayerSpec, MoESpec
from jaxpaged.models.standard import HF, Name, View

MODEL_TYPES = ("ernie4_5_moe",)
IGNORED = (*standard.IGNORED, "model.mtp_**")  # parts that guess the token after the next; the decoder does without them
THETA = 500_000.0  # of a config that does not say, as transformers has it


def decoder_config(hf: HF) -> DecoderConfig:
    standard.pass_over(hf, "output_router_logits", "router_aux_loss_coef", "moe_capacity")  # training only
    standard.pass_over(hf, "num_nextn_predict_layers", "auto_map")
    standard.require(hf, moe_gate="topk", moe_use_aux_free=True, use_rmsnorm=True)  # some configs say them
    bias = bool(hf.get("use_bias", False))
    attention, mlp = standard.attention(hf, bias=bias, out_bias=bias), standard.mlp(hf, bias=bias)
    experts, sparse = _experts(hf, bias), _sparse_layers(hf)
    rope = standard.rope(hf, theta=THETA, interleaved=True)
    layers = tuple(LayerSpec(attention, experts if i in sparse else mlp, rope) for i in range(hf["num_hidden_layers"]))
    tie = bool(hf.get("tie_word_embeddings", True))
    return standard.decoder(hf, layers, norm=standard.rms_norm(hf, 1e-5), tie=tie, head_bias=bias)


def _experts(hf: HF, bias: bool) -> MoESpec:
    width, shared = hf["moe_intermediate_size"], hf.get("moe_num_shared_experts", 2)
    standard.require(hf, moe_norm_min=1e-12)  # the least sum that weights are divided by: as good as none
    return MoESpec(
        num_experts=hf["moe_num_experts"],
        top_k=hf["moe_k"],
        ffn_dim=width,
        activation=standard.activation(hf.get("hidden_act", "silu")),
        normalise=True,
        correction=True,
        shared=standard.mlp(hf, ffn_dim=width * shared, bias=bias) if shared else None,
    )


def _sparse_layers(hf: HF) -> set[int]:
    """Each `moe_layer_interval`-th layer from the start index to the end index has experts; an end of -1 is the last one."""
    step, last = hf.get("moe_layer_interval", 1), hf.get("moe_layer_end_index", -1)
    last = hf["num_hidden_layers"] - 1 if last == -1 else last
    return set(range(step - 1, last + 1, step)) - set(range(hf.get("moe_layer_start_index", 1)))


def names(config: DecoderConfig) -> tuple[Name, ...]:
    theirs, ours = "model.layers.{i}.mlp.", "layers.{i}.mlp."
    row = View(lambda x: x.reshape(-1), lambda x: np.reshape(x, (1, -1)))
    return (
        *standard.NAMES,
        *standard.PRE_NORM,
        *standard.experts("mlp.experts"),
        Name(theirs + "gate.weight", ours + "router.weight"),
        Name(theirs + "moe_statics.e_score_correction_bias", ours + "correction", view=row),
        *standard.gated_mlp(theirs + "shared_experts", ours + "shared"),
        Name("lm_head.bias", "head_bias"),
    )
