"""The metadata of a GGUF file as Hugging Face config keys.

A metadata key of the architecture that is not known here may change the mathematics, so it is refused by name.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
GEMMA3_LOCAL_THETA, GEMMA3_PATTERN, GEMMA3_27B_LAYERS = 10000.0, 6, 62
# Keys that never change the mathematics of these architectures.
HARMLESS = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "mm.tokens_per_image")
# Tokens that end a turn of a chat, by their text: many files name only the end of the text.
TURN_ENDS = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>")

Shapes = dict[str, tuple[int, ...]]


def architecture(path: Path, metadata: dict[str, Any]) -> str:
    arch = metadata.get("general.architecture")
    if arch not in MODEL_TYPES:
        raise ValueError(f"{path}: the architecture {arch!r} is not supported; supported: {', '.join(MODEL_TYPES)}.")
    if metadata.get("split.count", 0) > 1:
        raise ValueError(
            f"{path} is one of {metadata['split.count']} parts of a split GGUF; join them first with "
            "llama.cpp's `llama-gguf-split --merge`."
        )
    return arch


class _Keys:
    """Reads `arch.*` keys and remembers which."""

    def __init__(self, path: Path, arch: str, metadata: dict[str, Any]):
        self.path, self.prefix, self.metadata = path, arch + ".", metadata
        self.seen = set[str](HARMLESS)

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return self.metadata.get(self.prefix + key, default)

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ValueError(f"{self.path} lacks the metadata key {self.prefix}{key}.")
        return value

    def same(self, key: str, default: Any = None) -> int:
        """A number that may be given for each layer: they must be equal."""
        value = self.get(key, default) if default is not None else self.need(key)
        values = set(np.ravel(value).tolist())
        if len(values) != 1:
            raise ValueError(
                f"{self.path}: {self.prefix}{key} differs between layers ({sorted(values)}), which is not supported."
            )
        return values.pop()

    def must_be(self, key: str, wanted: Any) -> None:
        value = self.get(key, wanted)
        if value != wanted:
            raise ValueError(f"{self.path}: {self.prefix}{key} is {value!r}; only {wanted!r} is supported.")

    def finish(self) -> None:
        keys = [k for k in self.metadata if k.startswith(self.prefix) and k[len(self.prefix) :] not in self.seen]
        if keys:
            what = ", ".join(f"{k}={self.metadata[k]!r}" for k in keys)
            raise ValueError(f"{self.path} has metadata that may change the model and is not known here: {what}.")


def config(path: Path, metadata: dict[str, Any], shapes: Shapes, factors: np.ndarray | None) -> dict[str, Any]:
    """Hugging Face config keys of a GGUF file. `shapes`: of its tensors, by GGUF name. `factors`: the tensor
    rope_freqs.weight, float32 [head_dim / 2], what llama.cpp divides each RoPE frequency by."""
    arch = architecture(path, metadata)
    keys = _Keys(path, arch, metadata)
    hf = _base(keys, shapes, MODEL_TYPES[arch])
    hf["rope_scaling"] = _rope_scaling(keys, factors)
    if arch == "gemma3":
        hf |= _gemma3(keys, hf)
    elif arch == "llama":
        hf["sliding_window"] = keys.get("attention.sliding_window")
    hf |= _token_ids(metadata)
    keys.must_be("attention.causal", True)
    keys.must_be("expert_count", 0)
    keys.must_be("expert_used_count", 0)
    keys.finish()
    return {key: value for key, value in hf.items() if value is not None}


def _base(keys: _Keys, shapes: Shapes, model_type: str) -> dict[str, Any]:
    heads, embed = keys.same("attention.head_count"), keys.need("embedding_length")
    head_dim = keys.get("attention.key_length", embed // heads)
    keys.must_be("attention.value_length", head_dim)
    keys.must_be("rope.dimension_count", head_dim)
    if "token_embd.weight" not in shapes:
        raise ValueError(f"{keys.path} lacks the tensor token_embd.weight.")
    return {
        "model_type": model_type,
        "hidden_size": embed,
        "intermediate_size": keys.same("feed_forward_length"),
        "num_hidden_layers": keys.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.same("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _tidy(keys.need("attention.layer_norm_rms_epsilon")),
        "rope_theta": _tidy(keys.get("rope.freq_base", 10000.0)),
        "max_position_embeddings": keys.need("context_length"),
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
        "hidden_act": "silu" if model_type != "gemma3_text" else None,
        "attention_bias": None if model_type == "qwen2" else any(n.endswith("attn_q.bias") for n in shapes),
        "mlp_bias": any(n.endswith("ffn_down.bias") for n in shapes),
    }


def _tidy(x: float) -> float:
    """float32 metadata as the number that was meant: 9.999999747378752e-06 -> 1e-05."""
    return float(str(np.float32(x)))


def _rope_scaling(keys: _Keys, factors: np.ndarray | None) -> dict[str, Any] | None:
    kind = keys.get("rope.scaling.type", "none")
    factor, linear = keys.get("rope.scaling.factor", 1.0), keys.get("rope.scale_linear")
    original, attention = keys.get("rope.scaling.original_context_length"), keys.get("rope.scaling.attn_factor", 1.0)
    if linear is not None and kind == "none":  # files of 2023
        kind, factor = "linear", linear
    if factors is not None:
        if kind != "none":
            raise ValueError(f"{keys.path} has both rope_freqs.weight and the rope scaling {kind!r}: not supported.")
        return {"rope_type": "freq_factors", "factors": [float(f) for f in factors]}
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise ValueError(f"{keys.path}: the rope scaling {kind!r} is not supported; supported: none, linear, yarn.")
    return _yarn(keys, factor, original, attention)


def _yarn(keys: _Keys, factor: float, original: int | None, attention: float) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    if original:
        scaling["original_max_position_embeddings"] = original
    for name in ("beta_fast", "beta_slow"):
        value = keys.get(f"rope.scaling.yarn_{name}")
        if value is not None:
            scaling[name] = value
    keys.must_be("rope.scaling.yarn_ext_factor", 1.0)
    if attention != 1.0:  # llama.cpp multiplies YaRN's own factor, Hugging Face replaces it
        scaling["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return scaling


def _gemma3(keys: _Keys, hf: dict[str, Any]) -> dict[str, Any]:
    layers = hf["num_hidden_layers"]
    scalar = hf["hidden_size"] // hf["num_attention_heads"] if layers == GEMMA3_27B_LAYERS else hf["head_dim"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": keys.need("attention.sliding_window"),
        "layer_types": _layer_types(layers, keys.get("attention.sliding_window_pattern", GEMMA3_PATTERN)),
        "rope_local_base_freq": _tidy(keys.get("rope.freq_base_swa", GEMMA3_LOCAL_THETA)),
        "attn_logit_softcapping": keys.get("attn_logit_softcapping"),
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
    }


def _layer_types(layers: int, pattern: Any) -> list[str]:
    """pattern: a number n (every n-th layer is full), or for each layer whether it slides."""
    slides = [(i + 1) % pattern != 0 for i in range(layers)] if np.ndim(pattern) == 0 else list(pattern)[:layers]
    return ["sliding_attention" if s else "full_attention" for s in slides]


def _token_ids(metadata: dict[str, Any]) -> dict[str, Any]:
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    ids["pad"] = metadata.get("tokenizer.ggml.padding_token_id")
    return {f"{name}_token_id": value for name, value in ids.items()}


def generation_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """bos_token_id, and eos_token_id as a list: the end of the text and of a turn."""
    ids = _token_ids(metadata)
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    tokens, kinds = metadata.get("tokenizer.ggml.tokens", []), metadata.get("tokenizer.ggml.token_type")
    control = np.flatnonzero(np.asarray(kinds) == 3).tolist() if kinds is not None else []
    ends += [i for i in control if i < len(tokens) and tokens[i] in TURN_ENDS]
    ends = list(dict.fromkeys(i for i in ends if i is not None))
    found = {"bos_token_id": ids["bos_token_id"], "eos_token_id": ends or None}
    return {key: value for key, value in found.items() if value is not None}
