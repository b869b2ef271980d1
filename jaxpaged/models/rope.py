"""Rotary position embeddings and their scalings. Angles are float32: bfloat16 keeps 769 of the first 4,096 positions.

Source: Su et al. 2021 (RoPE); Peng et al. 2023 (YaRN); Llama 3.1's report for "llama3". Frequencies are computed with
numpy when the model is built, so that they are constants of the compiled step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

DEFAULT_THETA = 10000.0
KEYS = frozenset({
    "rope_type", "type", "rope_theta", "factor", "factors", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
    "short_factor", "long_factor", "short_mscale", "long_mscale",
    "finetuned",  # a remark
})  # fmt: skip


@dataclass(frozen=True)
class Rope:
    """What a layer rotates by. `frequencies`: radians per position, one for each pair of dimensions (rotary_dim / 2 of
    them; dimensions beyond are not rotated). `scale` multiplies cos and sin (YaRN's attention factor). interleaved: pairs
    are neighbours (GPT-J's order), not halves. short: the rotation for sequences of at most `trained` tokens."""

    frequencies: tuple[float, ...]
    scale: float = 1.0
    interleaved: bool = False
    short: Rope | None = None
    trained: int = 0

    def for_length(self, longest: int) -> Rope:
        """The rotation of a model that sees sequences of at most so many tokens."""
        return self.short if self.short is not None and longest <= self.trained else self

    def tables(self, positions: Array) -> tuple[Array, Array]:
        """positions int32 [T] -> cos, sin float32 [T, rotary_dim / 2]."""
        angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(self.frequencies, jnp.float32)[None]
        return jnp.cos(angles) * self.scale, jnp.sin(angles) * self.scale


def rotate(x: Array, cos: Array, sin: Array, interleaved: bool = False) -> Array:
    """x [T, heads, D]; the first half of the rotated dimensions pairs with the second (GPT-NeoX order, as in HF), or each
    even one with the next (GPT-J's)."""
    half = cos.shape[-1]
    cos, sin = cos[:, None].astype(x.dtype), sin[:, None].astype(x.dtype)
    rest = x[..., 2 * half :]
    if interleaved:
        a, b = x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2]
        pairs = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
        return jnp.concatenate([pairs.reshape(*x.shape[:-1], 2 * half), rest], axis=-1)
    a, b = x[..., :half], x[..., half : 2 * half]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def make_rope(dim: int, theta: float, scaling: dict[str, Any] | None = None, max_positions: int = 0,
              interleaved: bool = False) -> Rope:  # fmt: skip
    """`dim` rotated dimensions, base `theta`, and Hugging Face's `rope_scaling` (or `rope_parameters`) dictionary.

    `max_positions`: the config's max_position_embeddings, YaRN's fallback for the length the model was trained with.
    Raises ValueError for a kind that is not known and for a dictionary that lacks what its kind needs.
    """
    frequencies = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    scaling = scaling or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in (*_KINDS, *_LONG):
        raise ValueError(f"rope_scaling kind {kind!r} is not supported; supported: {', '.join((*_KINDS, *_LONG))}.")
    known = KEYS | {"alpha"} if kind == "dynamic" else KEYS
    unknown = sorted(k for k, v in scaling.items() if k not in known and v is not None and v is not False)
    if unknown:
        raise ValueError(f"rope_scaling has keys that are not known here and may change the rotation: {', '.join(unknown)}.")
    finished = lambda frequencies, scale, **more: Rope(tuple(map(float, frequencies)), float(scale), interleaved, **more)
    try:
        if kind in _LONG:
            (short, long), trained = _longrope(frequencies, scaling, max_positions)
            return finished(*long, short=finished(*short), trained=trained)
        return finished(*_KINDS[kind](frequencies, theta, scaling, max_positions))
    except KeyError as missing:
        raise ValueError(f"rope_scaling {scaling} lacks the key {missing}.") from None


def _default(frequencies, theta, scaling, max_positions):
    return frequencies, 1.0


def _longrope(frequencies, scaling, max_positions):
    """Ding et al. 2024 (LongRoPE), as Phi-3 uses it: a divisor for each frequency, other ones where sequences may be longer
    than in training. transformers chooses by the length of the sequence at hand, which would break what is cached; here (as in
    vLLM) the longest sequence that the engine takes decides. Returns (frequencies, scale) for short and for long ones, and
    the length in training."""
    trained = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or max_positions / trained
    scale = scaling.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    found = []
    for kind in ("short", "long"):
        divisors = np.asarray(scaling[f"{kind}_factor"], np.float64)
        if divisors.shape != frequencies.shape:
            raise ValueError(f"rope_scaling: {kind}_factor has {divisors.size} numbers for {frequencies.size} frequencies.")
        found.append((frequencies / divisors, scaling.get(f"{kind}_mscale") or scale))
    return found, trained


def _linear(frequencies, theta, scaling, max_positions):
    return frequencies / scaling["factor"], 1.0


def _dynamic(frequencies, theta, scaling, max_positions):
    """NTK-aware: a greater base. Hunyuan's is `alpha` ** (dim / (dim - 2)) times theta at every length; without that key it
    grows beyond max_position_embeddings only, and longer sequences are not taken."""
    dim, alpha = 2 * len(frequencies), scaling.get("alpha")
    return (frequencies * alpha ** -(np.arange(0, dim, 2) / (dim - 2)) if alpha else frequencies), 1.0


def _freq_factors(frequencies, theta, scaling, max_positions):
    """llama.cpp stores the divisor of each frequency (Llama 3's scaling, worked out) in the tensor rope_freqs."""
    return frequencies / np.asarray(scaling["factors"], np.float64), 1.0


def _llama3(frequencies, theta, scaling, max_positions):
    """Long waves are slowed by `factor`, short ones kept, those between blended."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # turns over the trained length
    keep = np.clip((waves - low) / max(high - low, 1e-9), 0.0, 1.0)  # Llama 4 has nothing between
    return frequencies * (keep + (1 - keep) / factor), 1.0


def _yarn(frequencies, theta, scaling, max_positions):
    factor, dim = scaling["factor"], 2 * len(frequencies)
    trained = scaling.get("original_max_position_embeddings") or max_positions

    def dimension(turns: float) -> float:
        """The (fractional) pair of dimensions that turns so often over the trained length."""
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.get("beta_fast") or 32.0), dimension(scaling.get("beta_slow") or 1.0)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    slow = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    return frequencies * (1 - slow) + frequencies / factor * slow, _yarn_scale(scaling, factor)


def _yarn_scale(scaling, factor: float) -> float:
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)


_LONG = ("longrope", "su")
_KINDS = {
    "default": _default,
    "dynamic": _dynamic,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "freq_factors": _freq_factors,
}
