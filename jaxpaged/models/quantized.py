"""Products with weights of 8 or 4 bits, in the places of `Linear` and `Experts`; and how numbers become such weights.

A matrix W [out, in] is kept as small numbers n and one scale for each row, or for each group of inputs of a row:

    W[f, e] = (n[f, e] - zeros[f, e // s]) * scales[f, e // s]         s = form.group, or all inputs

Activations stay in the model's dtype ("W8A16", "W4A16"), also where a checkpoint was made for quantised ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax import Array

from jaxpaged.models.decoder import Decoder
from jaxpaged.models.layers import Linear, Product, Step, columns_product
from jaxpaged.models.moe import Experts, with_bias

SMALL = ("router", "shared_gate")
ROWS = 4096  # that are quantised at a time: bounds the memory it takes


@dataclass(frozen=True)
class Form:
    """kind: "int8", "fp8" (e4m3), "int4" (two numbers a byte, 0..15) or "mxfp4" (two floats e2m1 a byte, the scales bytes too).
    group: inputs that share a scale; None: all. zeros: has numbers that stand for zero; else that is 0, of int4 8."""

    kind: str
    group: int | None = None
    zeros: bool = False

    @property
    def dtype(self) -> np.dtype:
        return np.dtype({"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}.get(self.kind, np.uint8))

    @property
    def per_byte(self) -> int:
        """Numbers in a byte."""
        return 2 if self.kind in ("int4", "mxfp4") else 1

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """What a matrix [..., out, in] is kept as: name -> shape, dtype. ValueError if the groups do not fit."""
        *rows, n_in = shape
        group = self.group or n_in
        if n_in % group or group % self.per_byte:
            raise ValueError(f"{n_in} inputs cannot be quantised in groups of {group}.")
        scales, dtype = (*rows, n_in // group), np.dtype(np.uint8 if self.kind == "mxfp4" else np.float32)
        found = {"weight": ((*rows, n_in // self.per_byte), self.dtype), "scales": (scales, dtype)}
        return found | ({"zeros": (scales, np.dtype(np.float32))} if self.zeros else {})


FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The numbers of a float e2m1; those of 8 and more are the same, negative."""


def microscaled(numbers: Array, scales: Array, dtype: jnp.dtype) -> Array:
    """MXFP4: uint8 [..., n / 2], whose byte j holds number 2 j in its low half and 2 j + 1 in its high one, and scales
    2^(s - 127), uint8 [..., n / 32] -> floats [..., n].

    Source: OCP Microscaling Formats (MX) specification 1.0. A scale of 2^-127 counts as 0, and 255 (NaN) as infinity."""
    codes = jnp.stack([numbers & 15, numbers >> 4], axis=-1).reshape(*scales.shape, -1)
    powers = jax.lax.bitcast_convert_type(scales.astype(jnp.uint32) << 23, jnp.float32)  # s as the exponent of a float
    table = jnp.asarray((*FP4, *(-x for x in FP4)), jnp.float32)
    return (table[codes] * powers[..., None]).reshape(*scales.shape[:-1], -1).astype(dtype)


class _Quantized(nnx.Module):
    """weight, scales and zeros of a matrix, and what it is as floats."""

    def __init__(self, shape: tuple[int, ...], form: Form, bias: nnx.Param | None, summed: bool = False):
        self.form, self.bias, self.summed = form, bias, summed
        arrays = {name: jnp.zeros(*spec) for name, spec in form.shapes(shape).items()}
        self.weight, self.scales = nnx.Param(arrays["weight"]), nnx.Param(arrays["scales"])
        self.zeros = nnx.Param(arrays["zeros"]) if form.zeros else None

    def dense(self, dtype: jnp.dtype, places: Array | None = None) -> Array:
        """The matrix in floats, [..., out, in]. places [N]: of several matrices these, [N, out, in]."""
        taken = lambda x: x[...] if places is None else x[...][places]
        numbers, scales = taken(self.weight), taken(self.scales)
        if self.form.kind == "mxfp4":
            return microscaled(numbers, scales, dtype)
        parts = numbers.reshape(*scales.shape, -1)
        zero = jnp.float32(0.0)
        if self.form.kind == "int4":
            parts, zero = jnp.concatenate([parts & 15, parts >> 4], axis=-1), jnp.float32(8.0)
        offset = zero if self.zeros is None else taken(self.zeros)[..., None]
        return ((parts.astype(jnp.float32) - offset) * scales[..., None]).reshape(*scales.shape[:-1], -1).astype(dtype)


class QuantizedLinear(_Quantized, Product):
    """In the place of `Linear`."""

    def __init__(self, shape: tuple[int, int], form: Form, bias: nnx.Param | None, summed: bool = False):
        super().__init__(shape, form, bias, summed)
        self.shape, self.adapters = shape, nnx.data(None)

    def product(self, x: Array, step: Step) -> Array:
        if self.form.group is None and not self.form.zeros and self.form.kind != "int4":
            # One scale a row comes after the product: the small numbers are turned to floats as they are multiplied.
            y = columns_product(self.weight[...].astype(x.dtype), x, jnp.dtype(jnp.float32))
            return (y * self.scales[...]).astype(x.dtype)
        if self.form.kind in ("fp8", "mxfp4"):
            return columns_product(self.dense(x.dtype), x)
        zeros = None if self.zeros is None else self.zeros[...]
        return step.quantized_matmul(x.T, self.weight[...], self.scales[...], zeros).T


class QuantizedExperts(_Quantized):
    """In the place of `Experts`."""

    def __call__(self, x: Array, expert: Array, sizes: Array, step: Step) -> Array:
        if len(x) < len(sizes):  # the matrices of these rows only become floats
            own = jnp.minimum(expert, len(sizes) - 1)
            y = jnp.einsum("noi,ni->no", self.dense(x.dtype, own), x, preferred_element_type=jnp.float32).astype(x.dtype)
        else:
            y = step.grouped_matmul(x, self.dense(x.dtype), sizes)
        return with_bias(y, self.bias, self.summed, expert, step)


Forms = Mapping[str, Form]
"""Dotted path of a product -> how its weights are kept. Others are kept as they are."""
NO_FORMS: Forms = {}
KINDS = {Linear: QuantizedLinear, Experts: QuantizedExperts}


def products(model: Decoder) -> Iterator[tuple[str, nnx.Module, str]]:
    """(dotted path, parent, attribute) of every product."""
    for path, parent in list(nnx.iter_graph(model)):
        if isinstance(parent, nnx.Module):
            for name, child in list(vars(parent).items()):
                if type(child) in KINDS:
                    yield ".".join(map(str, (*path, name))), parent, name


def quantize_modules(model: Decoder, forms: Forms) -> Decoder:
    """The decoder with quantised products in the places that `forms` names."""
    for path, parent, name in products(model):
        if path in forms:
            child = getattr(parent, name)
            setattr(parent, name, KINDS[type(child)](child.weight.shape, forms[path], child.bias, child.summed))
    return model


def all_products(model: Decoder, form: Form) -> dict[str, Form]:
    """`form` for every product of the layers but the small ones that decide who computes. Where its groups do not fit, smaller
    ones; where none does, one group of all inputs (of a device, if `model` is a device's part: groups are not shared)."""
    found = {}
    for path, parent, name in products(model):
        if name not in SMALL:
            n_in = getattr(parent, name).weight.shape[-1]
            fits = next((g for g in (form.group, 64, 32, 16) if n_in % g == 0), n_in) if form.group else None
            found[path] = replace(form, group=fits)
    return found


# -- making small numbers ---------------------------------------------------------------------------------------------------


def quantize(w: np.ndarray, form: Form) -> dict[str, np.ndarray]:
    """A matrix [..., out, in] of floats as `form` keeps it. int8 and fp8: the largest |number| of a group is 127 or 448; int4:
    the smallest is 0 and the largest 15."""
    flat = w.reshape(-1, w.shape[-1])
    specs = form.shapes(w.shape)
    out = {name: np.empty((len(flat), shape[-1]), dtype) for name, (shape, dtype) in specs.items()}
    for at in range(0, len(flat), ROWS):
        for name, part in _quantize_rows(flat[at : at + ROWS].astype(np.float32), form).items():
            out[name][at : at + ROWS] = part
    return {name: array.reshape(specs[name][0]) for name, array in out.items()}


def _quantize_rows(w: np.ndarray, form: Form) -> dict[str, np.ndarray]:
    parts = w.reshape(len(w), -1, form.group or w.shape[1])
    tiny = np.finfo(np.float32).tiny
    if form.zeros:
        low, high = np.minimum(parts.min(-1), 0), np.maximum(parts.max(-1), 0)
        scales = np.maximum((high - low) / 15, tiny)
        zeros = np.round(-low / scales)
        numbers = np.clip(np.round(parts / scales[..., None]) + zeros[..., None], 0, 15).astype(np.uint8)
        return {"weight": pack(numbers), "scales": scales, "zeros": zeros}
    if form.kind == "mxfp4":
        return _to_microscaled(parts)
    largest = {"int8": 127, "fp8": 448, "int4": 7}[form.kind]
    scales = np.maximum(np.abs(parts).max(-1) / largest, tiny)
    numbers = np.clip(parts / scales[..., None], -largest, largest)
    if form.kind == "fp8":
        return {"weight": numbers.reshape(w.shape).astype(form.dtype), "scales": scales}
    numbers = np.round(numbers)
    if form.kind == "int4":
        return {"weight": pack((numbers + 8).astype(np.uint8)), "scales": scales}
    return {"weight": numbers.reshape(w.shape).astype(np.int8), "scales": scales}


def _to_microscaled(parts: np.ndarray) -> dict[str, np.ndarray]:
    """[rows, groups, s] floats in MXFP4; the scale is the least power of two with which a group's largest number is one."""
    values = np.array(FP4, np.float32)
    largest = np.abs(parts).max(-1) / values[-1]
    exponents = np.clip(np.ceil(np.log2(np.maximum(largest, np.finfo(np.float32).tiny))), -126, 127)
    scaled = parts / np.exp2(exponents)[..., None].astype(np.float32)
    codes = (
        np.searchsorted((values[1:] + values[:-1]) / 2, np.abs(scaled)).astype(np.uint8) | (scaled < 0).astype(np.uint8) << 3
    )
    pairs = codes.reshape(len(parts), -1, 2)
    return {"weight": pairs[..., 0] | pairs[..., 1] << 4, "scales": (exponents + 127).astype(np.uint8)}


def pack(numbers: np.ndarray) -> np.ndarray:
    """Numbers 0..15 [rows, groups, s] -> bytes [rows, groups * s / 2]: byte j of a group holds number j in its low half and
    number j + s/2 in its high half (the order of `pallas_kernels.ops.quantized_matmul`)."""
    half = numbers.shape[-1] // 2
    return (numbers[..., :half] | numbers[..., half:] << 4).reshape(len(numbers), -1)
