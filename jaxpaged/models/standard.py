"""What nearly all families share: the keys of a Hugging Face config and the names of a checkpoint's tensors."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from jaxpaged.models.decoder import DecoderConfig, LayerSpec
from jaxpaged.models.rope import DEFAULT_THETA, Rope, make_rope

HF_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class HF(Protocol):
    """A Hugging Face config that records which keys were read (jaxpaged.hf_config)."""

    def get(self, key: str, default: Any = None) -> Any: ...
    def __getitem__(self, key: str) -> Any: ...


class Name(NamedTuple):
    """A rule: the checkpoint tensor `pattern` is part number `part` (of `parts`, joined on axis 0) of the leaf `path`.
    `{i}` in both stands for a layer's number."""

    pattern: str
    path: str
    part: int = 0
    parts: int = 1


def _linear(theirs: str, path: str, part: int = 0, parts: int = 1) -> list[Name]:
    return [Name(f"{theirs}.{kind}", f"{path}.{kind}", part, parts) for kind in ("weight", "bias")]


_LAYER = "model.layers.{i}."
NAMES: tuple[Name, ...] = (
    Name("model.embed_tokens.weight", "embed.weight"),
    Name("model.norm.weight", "norm.weight"),
    Name("lm_head.weight", "head.weight"),
    Name(_LAYER + "input_layernorm.weight", "layers.{i}.attention_norm.weight"),
    Name(_LAYER + "self_attn.q_norm.weight", "layers.{i}.attention.q_norm.weight"),
    Name(_LAYER + "self_attn.k_norm.weight", "layers.{i}.attention.k_norm.weight"),
    *_linear(_LAYER + "self_attn.q_proj", "layers.{i}.attention.qkv", 0, 3),
    *_linear(_LAYER + "self_attn.k_proj", "layers.{i}.attention.qkv", 1, 3),
    *_linear(_LAYER + "self_attn.v_proj", "layers.{i}.attention.qkv", 2, 3),
    *_linear(_LAYER + "self_attn.o_proj", "layers.{i}.attention.out"),
    *_linear(_LAYER + "mlp.gate_proj", "layers.{i}.mlp.gate_up", 0, 2),
    *_linear(_LAYER + "mlp.up_proj", "layers.{i}.mlp.gate_up", 1, 2),
    *_linear(_LAYER + "mlp.down_proj", "layers.{i}.mlp.down"),
)
PRE_NORM = (Name(_LAYER + "post_attention_layernorm.weight", "layers.{i}.mlp_norm.weight"),)
PRE_AND_POST_NORM = (
    Name(_LAYER + "post_attention_layernorm.weight", "layers.{i}.attention_post_norm.weight"),
    Name(_LAYER + "pre_feedforward_layernorm.weight", "layers.{i}.mlp_norm.weight"),
    Name(_LAYER + "post_feedforward_layernorm.weight", "layers.{i}.mlp_post_norm.weight"),
)
IGNORED = ("model.layers.{i}.self_attn.rotary_emb.inv_freq",)
TIED = ("lm_head.weight",)  # some checkpoints carry a copy of the embedding


def decoder(hf: HF, layers: tuple[LayerSpec, ...], **choices: Any) -> DecoderConfig:
    """The DecoderConfig of the keys that mean the same in every family; `choices` are the family's own."""
    base = {
        "vocab_size": hf["vocab_size"],
        "embed_dim": hf["hidden_size"],
        "ffn_dim": hf["intermediate_size"],
        "num_heads": hf["num_attention_heads"],
        "num_kv_heads": hf.get("num_key_value_heads") or hf["num_attention_heads"],
        "head_dim": head_dim(hf),
        "layers": layers,
        "max_positions": hf["max_position_embeddings"],
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "activation": activation(hf.get("hidden_act", "silu")),
        "tie": bool(hf.get("tie_word_embeddings", False)),
    }
    return DecoderConfig(**{**base, **choices})


def head_dim(hf: HF, default: int | None = None) -> int:
    return hf.get("head_dim", default) or hf["hidden_size"] // hf["num_attention_heads"]


def activation(name: str) -> str:
    if name not in HF_ACTIVATIONS:
        raise ValueError(f"hidden_act {name!r} is not supported; supported: {', '.join(HF_ACTIVATIONS)}.")
    return HF_ACTIVATIONS[name]


def rope(
    hf: HF,
    theta_key: str = "rope_theta",
    kind: str | None = None,
    scaled: bool = True,
    dim: int | None = None,
    theta: float = DEFAULT_THETA,
) -> Rope:
    """The rotation of a config: `rope_theta` and `rope_scaling`, or `rope_parameters`, their later form, which may hold
    one dictionary for each `kind` of layer; what `rope_scaling` says beside it (hf_overrides) comes first.
    `scaled=False`: this kind of layer ignores `rope_scaling`. `dim`, `theta`: if not the usual ones."""
    scaling, parameters = hf.get("rope_scaling") or {}, hf.get("rope_parameters") or {}
    parameters = (parameters.get(kind, parameters) if kind else parameters) or {}
    if scaled and scaling:
        kind = scaling.get("rope_type") or scaling.get("type") or parameters.get("rope_type")
        parameters = {**parameters, **scaling, "rope_type": kind}
    theta = hf.get(theta_key) or parameters.get("rope_theta") or theta  # the older key: an override, where both are there
    return make_rope(dim or head_dim(hf), float(theta), parameters, hf["max_position_embeddings"])


def windows(hf: HF, window: int | None) -> tuple[int | None, ...]:
    """One window a layer from `layer_types`; without that key every layer has `window`."""
    kinds = hf.get("layer_types")
    if kinds is None:
        return (window,) * hf["num_hidden_layers"]
    known = {"full_attention": None, "sliding_attention": window}
    unknown = sorted(set(kinds) - set(known))
    if unknown or len(kinds) != hf["num_hidden_layers"]:
        raise ValueError(f"layer_types: {len(kinds)} entries for {hf['num_hidden_layers']} layers, unknown {unknown}.")
    return tuple(known[kind] for kind in kinds)
