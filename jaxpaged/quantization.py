"""Quantised checkpoints: what `quantization_config` says, as forms of products and rules for their tensors.

Formats: FP8 (per tensor, per row, blocks of 128 x 128: DeepSeek's, fbgemm's), compressed-tensors (int8, fp8, packed int4),
GPTQ and AWQ (int4 in groups), MXFP4 (gpt-oss's experts). Everything else is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxpaged.checkpoint import Checkpoint
from jaxpaged.gguf_blocks import KEPT, Kept, KeptCheckpoint
from jaxpaged.gguf_file import GGUFCheckpoint
from jaxpaged.models.quantized import Form, pack
from jaxpaged.models.standard import Name, View
from jaxpaged.weights import regex_of

ON_THE_FLY = {"int8": Form("int8"), "fp8": Form("fp8"), "int4": Form("int4", 128, zeros=True)}
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where the eight numbers of an AWQ word are
IGNORED = ("input_scale", "activation_scale", "weight_shape", "g_idx", "input_zero_point")  # say nothing about the weights


@dataclass(frozen=True)
class Tensor:
    """One of a product's tensors in the checkpoint: its suffix, which of our arrays it is, and how it is turned into it
    (given the rows of the matrix)."""

    suffix: str
    array: str
    view: Callable[[int], View | None] = lambda rows: None


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint keeps its products. The first of `tensors` holds the small numbers. ending: of the rules for what can
    be so kept; joint: what comes between a product's name, which is what comes before, and a tensor's suffix."""

    form: Form
    tensors: tuple[Tensor, ...]
    ending: str = ".weight"
    joint: str = "."


def scheme(config: Mapping[str, Any]) -> Scheme:
    """The scheme of a checkpoint's `quantization_config`. ValueError names what is not supported."""
    method = str(config.get("quant_method", "")).replace("_", "-")
    readers = {"fp8": _fp8, "fbgemm-fp8": _fbgemm, "gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed,
               "mxfp4": _mxfp4}  # fmt: skip
    if method not in readers:
        known = ", ".join(readers)
        raise ValueError(f"quantization_config: quant_method {config.get('quant_method')!r} is not supported; supported: "
                         f"{known}, GGUF files, and quantization='int8', 'int4' or 'fp8' for others.")  # fmt: skip
    return readers[method](config)


def _refuse(config: Mapping[str, Any], key: str, allowed: str) -> ValueError:
    method = config.get("quant_method")
    return ValueError(f"quantization_config: {key}={config.get(key)!r} is not supported ({method}); {allowed}.")


# -- formats ----------------------------------------------------------------------------------------------------------------


def _view(to_ours: Callable[[np.ndarray], np.ndarray]) -> View:
    def not_back(x: np.ndarray) -> np.ndarray:
        raise ValueError("quantised tensors are not written back in their checkpoint's format.")

    return View(to_ours, not_back)


def _by_row(block: int = 1) -> Callable[[int], View]:
    """A scale for the tensor, for each row, or for each block of so many rows -> for each row: [rows, n]."""

    def of(rows: int) -> View:
        def to_ours(x: np.ndarray) -> np.ndarray:
            x = x.reshape(1, 1) if x.size == 1 else x.reshape(len(x), -1)
            return np.broadcast_to(x, (rows, x.shape[1])) if len(x) == 1 else np.repeat(x, block, axis=0)[:rows]

        return _view(to_ours)

    return of


def _fp8(config: Mapping[str, Any]) -> Scheme:
    block = config.get("weight_block_size")
    if config.get("fmt", "e4m3") != "e4m3":
        raise _refuse(config, "fmt", "e4m3 is")
    group, scales = (None, _by_row()) if block is None else (int(block[1]), _by_row(int(block[0])))
    names = "weight_scale_inv", "weight_scale"
    return Scheme(Form("fp8", group), (Tensor("weight", "weight"), *(Tensor(name, "scales", scales) for name in names)))


def _fbgemm(config: Mapping[str, Any]) -> Scheme:
    tensors = Tensor("weight", "weight"), Tensor("weight_scale", "scales", _by_row())
    return Scheme(Form("fp8"), tensors)


def _bits4(config: Mapping[str, Any], key: str = "bits") -> None:
    if config.get(key) != 4:
        raise _refuse(config, key, "4 bits are")


def _gptq(config: Mapping[str, Any]) -> Scheme:
    _bits4(config)
    if config.get("desc_act"):
        raise _refuse(config, "desc_act", "False is: with it a group's inputs lie anywhere; quantise with desc_act=False")
    if config.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2"):
        raise _refuse(config, "checkpoint_format", "gptq and gptq_v2 are")
    group, plus = int(config["group_size"]), int(config.get("checkpoint_format", "gptq") == "gptq")  # v1 writes zeros less 1
    if group < 1:
        raise _refuse(config, "group_size", "32, 64 and 128 are")
    numbers = lambda rows: _view(lambda x: pack(_nibbles(x, 0).T.reshape(x.shape[1], -1, group)))
    zeros = lambda rows: _view(lambda x: (_nibbles(x, 1).T + plus).astype(np.float32))
    scales = lambda rows: _view(lambda x: x.T)
    tensors = Tensor("qweight", "weight", numbers), Tensor("qzeros", "zeros", zeros), Tensor("scales", "scales", scales)
    return Scheme(Form("int4", group, zeros=True), tensors)


def _awq(config: Mapping[str, Any]) -> Scheme:
    _bits4(config, "bits" if "bits" in config else "w_bit")
    if str(config.get("version", "gemm")).lower() != "gemm":
        raise _refuse(config, "version", "gemm is")
    group = int(config.get("group_size") or config.get("q_group_size") or 128)
    numbers = lambda rows: _view(lambda x: pack(_nibbles(x, 1, AWQ_ORDER).T.reshape(8 * x.shape[1], -1, group)))
    zeros = lambda rows: _view(lambda x: _nibbles(x, 1, AWQ_ORDER).T.astype(np.float32))
    scales = lambda rows: _view(lambda x: x.T)
    tensors = Tensor("qweight", "weight", numbers), Tensor("qzeros", "zeros", zeros), Tensor("scales", "scales", scales)
    return Scheme(Form("int4", group, zeros=True), tensors)


def _nibbles(words: np.ndarray, axis: int, order: Sequence[int] = tuple(range(8))) -> np.ndarray:
    """int32 words -> the eight numbers of each, along `axis` (0 or 1): uint8. order: where in the word number i is."""
    shifts = 4 * np.asarray(order, np.uint32)
    parts = (words.view(np.uint32)[..., None] >> shifts & 15).astype(np.uint8)  # [a, b, 8]
    a, b = words.shape
    return parts.transpose(0, 2, 1).reshape(8 * a, b) if axis == 0 else parts.reshape(a, 8 * b)


def _compressed(config: Mapping[str, Any]) -> Scheme:
    groups = list((config.get("config_groups") or {}).values())
    if len(groups) != 1:
        raise _refuse(config, "config_groups", "one group of modules is")
    weights = groups[0]["weights"]
    kind, bits, group = weights.get("type"), weights.get("num_bits"), weights.get("group_size")
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise ValueError(f"quantization_config: actorder={weights['actorder']!r} is not supported; quantise without it.")
    block = weights.get("block_structure") or (1, group)
    scales = Tensor("weight_scale", "scales", _by_row(int(block[0])))
    if bits == 8 and kind in ("int", "float") and weights.get("symmetric", True):
        return Scheme(Form("int8" if kind == "int" else "fp8", block[1]), (Tensor("weight", "weight"), scales))
    if bits == 4 and kind == "int":
        return _packed4(weights, group, scales)
    raise ValueError(f"quantization_config: weights of {bits} bits, type {kind!r}, symmetric={weights.get('symmetric')} are "
                     "not supported; int and float of 8 bits, symmetric, and int of 4 bits are.")  # fmt: skip


def _packed4(weights: Mapping[str, Any], group: int | None, scales: Tensor) -> Scheme:
    if not group or group < 2:
        raise ValueError(f"quantization_config: group_size={group!r} is not supported for 4 bits; groups of 32 to 128 are.")
    unpacked = _view(lambda x: pack(_nibbles(x, 1).reshape(len(x), -1, group)))
    numbers = Tensor("weight_packed", "weight", lambda rows: unpacked)
    if weights.get("symmetric", True):
        return Scheme(Form("int4", group), (numbers, scales))
    zeros = Tensor("weight_zero_point", "zeros", lambda rows: _view(lambda x: _nibbles(x, 0)[:rows].astype(np.float32)))
    return Scheme(Form("int4", group, zeros=True), (numbers, scales, zeros))


def _mxfp4(config: Mapping[str, Any]) -> Scheme:
    """Experts, as blocks [X, out, groups, 16] and scales [X, out, groups]. What modules_to_not_convert lists has none."""
    bytes_of = lambda rows: _view(lambda x: x.reshape(*x.shape[:2], -1))
    tensors = Tensor("blocks", "weight", bytes_of), Tensor("scales", "scales")
    return Scheme(Form("mxfp4", 32), tensors, ending="_blocks", joint="_")


# -- rules ------------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What loading a quantised checkpoint takes: the form of each quantised product by its path, rules for their tensors, and
    patterns of tensors that say nothing about the weights."""

    forms: Mapping[str, Form]
    names: tuple[Name, ...]
    ignored: tuple[str, ...]


def plan(checkpoint: Checkpoint, given: Scheme, names: Sequence[Name]) -> Plan:
    """A product is quantised if the checkpoint has scales for it, whatever its config lists; the others are floats."""
    forms: dict[str, Form] = {}
    rules: list[Name] = []
    modules = [
        (name, name.pattern.removesuffix(given.ending))
        for name in names
        if name.path.endswith(".weight") and name.pattern.endswith(given.ending)
    ]
    suffixes = [t.suffix for t in given.tensors if t.array == "scales"]
    for name, module in modules:
        found = [m for suffix in suffixes for m in _matches(checkpoint, f"{module}{given.joint}{suffix}")]
        forms |= {name.path.removesuffix(".weight").format(**m.groupdict()): given.form for m in found}
        if found:
            rules += [
                _rule(checkpoint, name, module + given.joint, tensor, given.tensors[0].suffix) for tensor in given.tensors
            ]
    ignored = tuple(f"{module}{given.joint}{suffix}" for _, module in modules for suffix in IGNORED)
    return Plan(forms, (*rules, *names), ignored)


GGUF = Scheme(Form("int8", 16), (Tensor("weight", "weight"), Tensor("scales", "scales"), Tensor("zeros", "zeros")))
"""Of `gguf_blocks.KeptCheckpoint`; each product has a form of its own."""


def plan_gguf(checkpoint: GGUFCheckpoint, names: Sequence[Name]) -> tuple[KeptCheckpoint, Plan]:
    """Products all of whose tensors are of types that are kept, in a form that holds all of them."""
    forms: dict[str, Kept | None] = {}
    parts: dict[str, str] = {}
    for name in names:
        for m in _matches(checkpoint, name.pattern) if name.path.endswith(".weight") else ():
            form, path = KEPT.get(checkpoint.type_of(m.string)), name.path.removesuffix(".weight").format(**m.groupdict())
            before = forms.get(path, form)
            forms[path], parts[m.string] = form.join(before) if form and before else None, path
    embeddings = ("embed", "head")
    kept = {tensor: form for tensor, path in parts.items() if (form := forms[path]) and path not in embeddings}
    wrapped = KeptCheckpoint(checkpoint, kept)
    found = plan(wrapped, GGUF, names)
    return wrapped, found._replace(forms={path: Form(*form) for path, form in forms.items() if form and path in found.forms})


def _matches(checkpoint: Checkpoint, pattern: str) -> list[re.Match[str]]:
    return [m for tensor in checkpoint.names() if (m := regex_of(pattern).fullmatch(tensor))]


def _rule(checkpoint: Checkpoint, name: Name, module: str, tensor: Tensor, numbers: str) -> Name:
    """module: its name and the joint. numbers: the suffix of the tensor that holds the small numbers."""
    rows = checkpoint.shape(_matches(checkpoint, f"{module}{numbers}")[0].string)[0]
    path = f"{name.path.removesuffix('.weight')}.{tensor.array}"
    return name._replace(pattern=f"{module}{tensor.suffix}", path=path, view=_chained(tensor.view(rows), name.view))


def _chained(first: View | None, then: View | None) -> View | None:
    """Both, one after the other; the second works on whole rows, of which there are as many in every array."""
    if first is None or then is None:
        return first or then
    return View(lambda x: then.to_ours(first.to_ours(x)), lambda x: first.to_theirs(then.to_theirs(x)))
