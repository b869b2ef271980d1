"""What nearly all families share: the keys of a Hugging Face config and the names of a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxpaged.models.rope import DEFAULT_THETA, Rope, make_rope
from jaxpaged.models.spec import AttentionSpec, DecoderConfig, LayerSpec, MLASpec, MLPSpec, MoESpec, NormSpec

HF_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "relu2": "relu2",
}


class HF(Protocol):
    """A Hugging Face config that records which keys were read (jaxpaged.hf_config)."""

    def get(self, key: str, default: Any = None) -> Any: ...
    def __getitem__(self, key: str) -> Any: ...


class View(NamedTuple):
    """How a tensor of a checkpoint becomes ours, and back: what one does the other undoes, to the bit."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


class Name(NamedTuple):
    """A rule: the checkpoint tensor `pattern` is part number `part` (of `parts`, joined on axis 0) of the leaf `path`.
    `{i}` in both stands for a layer's number. `{x}` in the pattern alone is a place along the leaf's first axis: the tensor
    is (a part of) `leaf[x]`, and every x must be there. `view`: what is done to it first."""

    pattern: str
    path: str
    part: int = 0
    parts: int = 1
    view: View | None = None


def transposed() -> View:
    """A matrix written [in, out], as GPT-2's."""
    return View(lambda x: np.swapaxes(x, -1, -2), lambda x: np.swapaxes(x, -1, -2))


def by_head(groups: int, per_group: tuple[int, ...], head_dim: int) -> View:
    """Queries, keys and values that lie group by group (as many heads of each as `per_group` says) become all queries, then
    all keys, then all values: along the first axis."""
    total, ends = sum(per_group), np.cumsum(per_group)[:-1].tolist()

    def to_ours(x: np.ndarray) -> np.ndarray:
        parts = np.split(x.reshape(groups, total, head_dim, *x.shape[1:]), ends, axis=1)
        return np.concatenate([part.reshape(-1, *x.shape[1:]) for part in parts])

    def to_theirs(x: np.ndarray) -> np.ndarray:
        parts = np.split(x, [groups * head_dim * end for end in ends])
        parts = [part.reshape(groups, n, head_dim, *x.shape[1:]) for part, n in zip(parts, per_group)]
        return np.concatenate(parts, axis=1).reshape(x.shape)

    return View(to_ours, to_theirs)


def linear(theirs: str, path: str, part: int = 0, parts: int = 1, view: View | None = None) -> list[Name]:
    """Rules for weight and bias of a product or norm. (Of a transposed matrix the bias is as it is: give no view then.)"""
    return [Name(f"{theirs}.{kind}", f"{path}.{kind}", part, parts, view) for kind in ("weight", "bias")]


def fused_qkv(theirs: str, path: str, attention: AttentionSpec | MLASpec) -> list[Name]:
    """Rules for one product that makes, group by group, the queries that share a key and a value, these two, and so on."""
    assert isinstance(attention, AttentionSpec)
    groups, queries = attention.num_kv_heads, attention.num_heads // attention.num_kv_heads
    return linear(theirs, path, view=by_head(groups, (queries, 1, 1), attention.head_dim))


def experts(theirs: str, products: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> list[Name]:
    """Rules for experts that are saved one by one, in a layer's `theirs`: each the gate, the up and the down product."""
    gate, up, down = (f"model.layers.{{i}}.{theirs}.{{x}}.{product}.weight" for product in products)
    wide, narrow = "layers.{i}.mlp.gate_up.weight", "layers.{i}.mlp.down.weight"
    return [Name(gate, wide, 0, 2), Name(up, wide, 1, 2), Name(down, narrow)]


def gated_mlp(theirs: str, path: str) -> list[Name]:
    """Rules for a gated MLP that is saved as three products."""
    wide = path + ".gate_up"
    parts = (*linear(theirs + ".gate_proj", wide, 0, 2), *linear(theirs + ".up_proj", wide, 1, 2))
    return [*parts, *linear(theirs + ".down_proj", path + ".down")]


_linear = linear
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
    *gated_mlp(_LAYER + "mlp", "layers.{i}.mlp"),
)
PRE_NORM = (Name(_LAYER + "post_attention_layernorm.weight", "layers.{i}.mlp_norm.weight"),)
PRE_AND_POST_NORM = (
    Name(_LAYER + "post_attention_layernorm.weight", "layers.{i}.attention_post_norm.weight"),
    Name(_LAYER + "pre_feedforward_layernorm.weight", "layers.{i}.mlp_norm.weight"),
    Name(_LAYER + "post_feedforward_layernorm.weight", "layers.{i}.mlp_post_norm.weight"),
)
IGNORED = ("model.layers.{i}.self_attn.rotary_emb.inv_freq",)
TIED = ("lm_head.weight", "embed_out.weight")  # some checkpoints carry a copy of the embedding
NORM_BIASES = (
    Name("model.norm.bias", "norm.bias"),
    Name(_LAYER + "input_layernorm.bias", "layers.{i}.attention_norm.bias"),
    Name(_LAYER + "post_attention_layernorm.bias", "layers.{i}.mlp_norm.bias"),
)  # with NAMES + PRE_NORM, for norms that have them


def ignored(family: Any, config: DecoderConfig) -> tuple[str, ...]:
    """Patterns of a checkpoint's tensors that are not used: of a door, always (`IGNORED`) or by the config (`ignored`)."""
    of_config = getattr(family, "ignored", lambda config: ())(config)
    return (*getattr(family, "IGNORED", ()), *of_config, *(TIED if config.tie else ()))


def attention(hf: HF, **choices: Any) -> AttentionSpec:
    """The heads of a config; `choices` are the family's own."""
    base = {
        "num_heads": hf["num_attention_heads"],
        "num_kv_heads": hf.get("num_key_value_heads") or hf["num_attention_heads"],
        "head_dim": head_dim(hf),
    }
    return AttentionSpec(**{**base, **choices})


def mlp(hf: HF, width_key: str = "intermediate_size", **choices: Any) -> MLPSpec:
    base = {"ffn_dim": hf[width_key], "activation": activation(hf.get("hidden_act", "silu"))}
    return MLPSpec(**{**base, **choices})


def layers(
    attention: AttentionSpec, mlp: MLPSpec | MoESpec, rope: Rope | None, windows: tuple[int | None, ...]
) -> tuple[LayerSpec, ...]:
    """Layers that differ in how far back they see and in nothing else."""
    return tuple(LayerSpec(attention, mlp, rope, window) for window in windows)


def decoder(hf: HF, layers: tuple[LayerSpec, ...], **choices: Any) -> DecoderConfig:
    """The DecoderConfig of the keys that mean the same in every family; `choices` are the family's own."""
    base = {
        "vocab_size": hf["vocab_size"],
        "embed_dim": hf["hidden_size"],
        "layers": layers,
        "tie": bool(hf.get("tie_word_embeddings", False)),
        "causal": hf.get("is_causal") is not False,
    }
    if "max_positions" not in choices:
        base["max_positions"] = hf["max_position_embeddings"]
    if "norm" not in choices:
        base["norm"] = rms_norm(hf)
    return DecoderConfig(**{**base, **choices})


def rms_norm(hf: HF, default: float = 1e-6, **choices: Any) -> NormSpec:
    return NormSpec(hf.get("rms_norm_eps", default), **choices)


def layer_norm(hf: HF, key: str, **choices: Any) -> NormSpec:
    """`key`: where the family has its epsilon, 1e-5 if it does not say."""
    return NormSpec(**{"eps": hf.get(key, 1e-5), "kind": "layer", "bias": True, **choices})


def either(hf: HF, *keys: str) -> Any:
    """The value of the first of these keys that says something: some families have two names for one number."""
    found = [value for value in map(hf.get, keys) if value is not None]
    return found[0] if found else hf[keys[0]]


def pass_over(hf: HF, *keys: str) -> None:
    """Keys that such configs carry and no inference step reads."""
    for key in keys:
        hf.get(key)


def require(hf: HF, **values: Any) -> None:
    """Keys that tell what the family always does: the only value that is supported, if the key is there."""
    for key, value in values.items():
        if hf.get(key, value) not in (None, value):
            raise ValueError(f"{key}={hf.get(key)!r} is not supported; supported: {value!r}.")


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """Press et al. 2022: 2^-(8 / n), its square, its cube, ... for n heads; where n is no power of two, those of the power
    below, then every other one of those of the power above."""
    power = 2 ** (num_heads.bit_length() - 1)
    slopes = lambda n: [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]
    return tuple(slopes(power) + slopes(2 * power)[::2][: num_heads - power])


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
    interleaved: bool = False,
    share: float | None = None,
    max_positions: int | None = None,
    base: float | None = None,
) -> Rope:
    """The rotation of a config: `rope_theta` and `rope_scaling`, or `rope_parameters`, their later form, which may hold
    one dictionary for each `kind` of layer; what `rope_scaling` says beside it (hf_overrides) comes first.
    `scaled=False`: this kind of layer ignores `rope_scaling`. `dim`, `theta`, `max_positions`: if not the usual ones. `share`:
    of a head's numbers this part is rotated, unless `partial_rotary_factor` says otherwise; None: the family rotates all,
    always. `base`: theta, whatever these keys say."""
    scaling, parameters = hf.get("rope_scaling") or {}, hf.get("rope_parameters") or {}
    parameters = (parameters.get(kind, parameters) if kind else parameters) or {}
    if scaled and scaling:
        kind = scaling.get("rope_type") or scaling.get("type") or parameters.get("rope_type")
        parameters = {**parameters, **scaling, "rope_type": kind}
    trained = hf.get("original_max_position_embeddings")  # beside the dictionary, as Phi-3 has it
    parameters = {**parameters, "original_max_position_embeddings": trained} if trained else parameters
    theta = base or hf.get(theta_key) or parameters.get("rope_theta") or theta  # the older key is an override
    dim = dim or head_dim(hf)
    if share is not None:
        parameters = dict(parameters)
        dim = int(dim * (parameters.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor") or share))
    return make_rope(dim, float(theta), parameters, max_positions or hf["max_position_embeddings"], interleaved)


def windows(hf: HF, window: int | None, every: int = 0) -> tuple[int | None, ...]:
    """One window a layer from `layer_types`; without that key layers have `window`, but each `every`-th sees all."""
    kinds = hf.get("layer_types")
    if kinds is None:
        return tuple(None if every and (i + 1) % every == 0 else window for i in range(hf["num_hidden_layers"]))
    known = {"full_attention": None, "sliding_attention": window}
    unknown = sorted(set(kinds) - set(known))
    if unknown or len(kinds) != hf["num_hidden_layers"]:
        raise ValueError(f"layer_types: {len(kinds)} entries for {hf['num_hidden_layers']} layers, unknown {unknown}.")
    return tuple(known[kind] for kind in kinds)
