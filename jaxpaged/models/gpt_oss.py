"""gpt-oss (OpenAI 2025): every other layer sees a window, a learned sink in each softmax, and experts with biases that all
layers have. Published with the experts' weights in MXFP4."""

import numpy as np

from jaxpaged.models import standard
from jaxpaged.models.rope import Rope, make_rope
from jaxpaged.models.spec import DecoderConfig, MoESpec
from jaxpaged.models.standard import HF, Name, View

MODEL_TYPES = ("gpt_oss",)
IGNORED = standard.IGNORED
THETA = 150000.0
YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096}  # of a config that says nothing  # fmt: skip


def decoder_config(hf: HF) -> DecoderConfig:
    standard.pass_over(hf, "output_router_logits", "router_aux_loss_coef")  # training only
    standard.pass_over(hf, "experts_per_token", "initial_context_length")  # other names of what other keys say
    standard.require(hf, hidden_act="silu", swiglu_alpha=1.702, swiglu_limit=7.0)
    bias = bool(hf.get("attention_bias", True))
    attention = standard.attention(hf, head_dim=hf.get("head_dim", 64), bias=bias, out_bias=bias, sinks=True)
    experts = MoESpec(
        num_experts=hf["num_local_experts"],
        top_k=hf.get("num_experts_per_tok", 4),
        ffn_dim=hf["intermediate_size"],
        activation="clamped_swiglu",
        router="softmax_top",
        router_bias=True,
        bias=True,
    )
    windows = standard.windows(hf, hf.get("sliding_window", 128), every=2)
    layers = standard.layers(attention, experts, _rope(hf), windows)
    return standard.decoder(hf, layers, norm=standard.rms_norm(hf, default=1e-5))


def _rope(hf: HF) -> Rope:
    if hf.get("rope_scaling") or hf.get("rope_parameters"):
        return standard.rope(hf, theta=THETA, dim=hf.get("head_dim", 64))
    return make_rope(hf.get("head_dim", 64), hf.get("rope_theta", THETA), YARN)


def _in_turn() -> View:
    """Rows (the second axis) of gate and up in turn become all of gate, then all of up."""
    swapped = lambda x, *pair: x.reshape(len(x), *pair, *x.shape[2:]).swapaxes(1, 2).reshape(x.shape)
    return View(lambda x: swapped(x, x.shape[1] // 2, 2), lambda x: swapped(x, 2, x.shape[1] // 2))


def _in_turn_transposed() -> View:
    """The same of matrices [X, in, out]."""
    rows = _in_turn()
    return View(lambda x: rows.to_ours(np.swapaxes(x, 1, 2)), lambda x: np.swapaxes(rows.to_theirs(x), 1, 2))


def names(config: DecoderConfig) -> tuple[Name, ...]:
    theirs, ours = "model.layers.{i}.", "layers.{i}."
    experts, in_turn = theirs + "mlp.experts.", _in_turn()
    wide, narrow = ours + "mlp.gate_up", ours + "mlp.down"
    return (
        *standard.NAMES,
        *standard.PRE_NORM,
        Name(theirs + "self_attn.sinks", ours + "attention.sinks"),
        *standard.linear(theirs + "mlp.router", ours + "mlp.router"),
        Name(experts + "gate_up_proj", wide + ".weight", view=_in_turn_transposed()),
        Name(experts + "gate_up_proj_bias", wide + ".bias", view=in_turn),
        Name(experts + "down_proj", narrow + ".weight", view=standard.transposed()),
        Name(experts + "down_proj_bias", narrow + ".bias"),
        # In MXFP4 matrices are [X, out, in].
        Name(experts + "gate_up_proj_blocks", wide + ".weight", view=in_turn),
        Name(experts + "down_proj_blocks", narrow + ".weight"),
    )
