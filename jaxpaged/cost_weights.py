"""The matrices of a decoder, and the bytes that its weights and its cache take. Arithmetic only; `runner.abstract_decoder` and
`kv_cache.page_bytes` must say the same (`tests/test_cost.py`).

Dims: E embed, H query heads, G KV heads, D head dim, F ffn, X experts, V vocab.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from jaxpaged.models.decoder import NORMS
from jaxpaged.models.quantized import NO_FORMS, Form, Forms
from jaxpaged.models.spec import AttentionSpec, DecoderConfig, LayerSpec, MLASpec, MLPSpec, MoESpec, NormSpec

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1}


class Matrix(NamedTuple):
    """A product of a layer: `num` matrices [out, in]. path: of the product in the layer. biases: numbers beside it."""

    path: str
    n_out: int
    n_in: int
    num: int = 1
    biases: int = 0

    @property
    def numbers(self) -> int:
        return self.num * self.n_out * self.n_in


def matrices(config: DecoderConfig, spec: LayerSpec) -> list[Matrix]:
    """Of one layer."""
    E = config.embed_dim
    attention = _latent(spec.attention, E) if isinstance(spec.attention, MLASpec) else _attention(spec.attention, E)
    mlp = _experts(spec.mlp, E) if isinstance(spec.mlp, MoESpec) else _mlp("mlp", spec.mlp, E)
    return [*attention, *mlp]


def _matrix(path: str, n_out: int, n_in: int, bias: bool) -> Matrix:
    return Matrix(path, n_out, n_in, biases=n_out * bias)


def _attention(s: AttentionSpec, E: int) -> list[Matrix]:
    joined = (s.num_heads + 2 * s.num_kv_heads) * s.head_dim
    return [_matrix("attention.qkv", joined, E, s.bias), _matrix("attention.out", E, s.num_heads * s.head_dim, s.out_bias)]


def _latent(s: MLASpec, E: int) -> list[Matrix]:
    H, queries = s.num_heads, s.nope_dim + s.rope_dim
    down = [_matrix("attention.q_down", s.q_rank, E, s.bias)] if s.q_rank else []
    return [*down, _matrix("attention.q", H * queries, s.q_rank or E, False),
            _matrix("attention.kv_down", s.kv_rank + s.rope_dim, E, s.bias),
            _matrix("attention.kv_up", H * (s.nope_dim + s.value_dim), s.kv_rank, False),
            _matrix("attention.out", E, H * s.value_dim, s.bias)]  # fmt: skip


def _mlp(path: str, s: MLPSpec, E: int) -> list[Matrix]:
    first = _matrix(f"{path}.gate_up", 2 * s.ffn_dim, E, s.bias) if s.gated else _matrix(f"{path}.up", s.ffn_dim, E, s.bias)
    return [first, _matrix(f"{path}.down", E, s.ffn_dim, s.bias)]


def held(s: MoESpec) -> int:
    """Experts that this device has."""
    return s.num_experts if s.held is None else s.held


def _experts(s: MoESpec, E: int) -> list[Matrix]:
    X, F = held(s), s.ffn_dim
    found = [_matrix("mlp.router", s.num_experts, E, s.router_bias),
             Matrix("mlp.gate_up", 2 * F, E, X, X * 2 * F * s.bias), Matrix("mlp.down", E, F, X, X * E * s.bias)]  # fmt: skip
    found += _mlp("mlp.shared", s.shared, E) if s.shared else []
    return [*found, Matrix("mlp.shared_gate", 1, E)] if s.shared_gate else found


def matrix_bytes(m: Matrix, form: Form | None, itemsize: int) -> int:
    """As it is kept, without biases."""
    if form is None:
        return m.numbers * itemsize
    shapes = form.shapes((m.num, m.n_out, m.n_in)).values()
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes)


def _layer_bytes(config: DecoderConfig, index: int, forms: Forms, itemsize: int) -> int:
    spec = config.layers[index]
    numbers = 0
    for m in matrices(config, spec):
        numbers += matrix_bytes(m, forms.get(f"layers.{index}.{m.path}"), itemsize) + m.biases * itemsize
    norm = _norm_numbers(config.norm) * config.embed_dim * sum(NORMS[config.block])
    correction = spec.mlp.num_experts * 4 if isinstance(spec.mlp, MoESpec) and spec.mlp.correction else 0
    return numbers + (norm + _small_attention(spec.attention)) * itemsize + correction


def _norm_numbers(norm: NormSpec) -> int:
    return norm.weight + norm.bias


def _small_attention(s: AttentionSpec | MLASpec) -> int:
    """Numbers of norms and sinks."""
    if isinstance(s, MLASpec):
        return _norm_numbers(s.norm) * (s.kv_rank + (s.q_rank or 0))
    sinks = s.num_heads * s.sinks
    if s.qk_norm is None:
        return sinks
    heads = {"head": 2, "heads": s.num_heads + s.num_kv_heads, "all": s.num_heads + s.num_kv_heads}[s.qk_norm.over]
    return sinks + _norm_numbers(s.qk_norm.norm) * heads * s.head_dim


def weight_bytes(config: DecoderConfig, dtype: str, forms: Forms = NO_FORMS, layers: range | None = None) -> int:
    """Of a decoder, or of the pipeline stage that has `layers` of it: the first has the embedding, the last norm and head."""
    layers, size, E, V = layers or range(len(config.layers)), BYTES[dtype], config.embed_dim, config.vocab_size
    first, last = layers.start == 0, layers.stop == len(config.layers)
    norm = _norm_numbers(config.norm) * E
    numbers = first * (V * E + config.learned_positions * E + config.embed_norm * norm)
    numbers += last * (config.final_norm * norm + config.head_bias * V)
    numbers += V * E if last and not (config.tie and first) else 0
    return numbers * size + sum(_layer_bytes(config, i, forms, size) for i in layers)


def cached_bytes(spec: AttentionSpec | MLASpec, dtype: str) -> int:
    """What a token leaves in the cache of one layer; small numbers have a scale a head."""
    heads, key, value = spec.cached
    scales = 4 * heads * (1 + bool(value)) if BYTES[dtype] == 1 else 0
    return heads * (key + value) * BYTES[dtype] + scales
