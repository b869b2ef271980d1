"""GGUF's blocks as small numbers with a scale for each group of inputs, instead of floats: the same values, to rounding.

    w[e] = (n[e] - zeros[e // group]) * scales[e // group]

Format: ggml's block structures, https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from jaxpaged.gguf_file import GGUFCheckpoint

PARTS = ("weight", "scales", "zeros")


class Kept(NamedTuple):
    """A form: "int4" (0..15) or "int8" numbers, inputs that share a scale, and whether there are zeros."""

    kind: str
    group: int
    zeros: bool = False

    def join(self, other: Kept) -> Kept:
        """A form that holds what either does."""
        kind = "int4" if self.kind == other.kind == "int4" and self.zeros == other.zeros else "int8"
        return Kept(kind, math.gcd(self.group, other.group), self.zeros or other.zeros)


KEPT = {"Q4_0": Kept("int4", 32), "Q4_K": Kept("int4", 32, True), "Q6_K": Kept("int8", 16), "Q8_0": Kept("int8", 32)}
"""Types whose blocks are kept. Others become floats when they are loaded."""


class Blocks(NamedTuple):
    """numbers int8 [rows, n] as they are multiplied (of Q4_0 less 8); scales, zeros float32 [rows, n / group]."""

    numbers: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray


def unpack(raw: np.ndarray, kind: str) -> Blocks:
    """raw: u8 [rows, bytes of a row], of a type of KEPT."""
    return {"Q4_0": _q4_0, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q6_K": _q6_k}[kind](raw)


def _halves(block: np.ndarray) -> np.ndarray:
    """The float16 that pairs of bytes [..., 2 k] are, as float32 [..., k]."""
    return np.ascontiguousarray(block).view("<f2").astype(np.float32)


def _without_zeros(numbers: np.ndarray, scales: np.ndarray) -> Blocks:
    rows = len(numbers)
    scales = scales.reshape(rows, -1)
    return Blocks(numbers.astype(np.int8).reshape(rows, -1), scales, np.zeros_like(scales))


def _q4_0(raw: np.ndarray) -> Blocks:
    blocks = raw.reshape(len(raw), -1, 18)
    low, high = blocks[..., 2:] & 15, blocks[..., 2:] >> 4
    return _without_zeros(np.concatenate([low, high], -1).astype(np.int8) - 8, _halves(blocks[..., :2]))


def _q8_0(raw: np.ndarray) -> Blocks:
    blocks = raw.reshape(len(raw), -1, 34)
    return _without_zeros(np.ascontiguousarray(blocks[..., 2:]).view(np.int8), _halves(blocks[..., :2]))


def _q4_k(raw: np.ndarray) -> Blocks:
    """w = d * scale * n - dmin * min, in 8 groups a block. A group whose scale is 0 is -dmin * min throughout: n is made 0."""
    blocks = raw.reshape(len(raw), -1, 144)
    d, dmin, packed = _halves(blocks[..., :2]), _halves(blocks[..., 2:4]), blocks[..., 4:16]
    low, middle, high = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scale = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], -1)
    least = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], -1)
    pairs = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 1, 32)
    numbers = np.concatenate([pairs & 15, pairs >> 4], axis=3)  # [rows, blocks, 4, 2, 32]
    scales, least = (d * scale).reshape(len(raw), -1), (dmin * least).reshape(len(raw), -1)
    empty = scales == 0
    numbers = np.where(empty[..., None], 0, numbers.reshape(len(raw), -1, 32))
    scales = np.where(empty, 1, scales)
    return Blocks(numbers.astype(np.int8).reshape(len(raw), -1), scales, least / scales)


def _q6_k(raw: np.ndarray) -> Blocks:
    blocks = raw.reshape(len(raw), -1, 210)
    low = blocks[..., :128].reshape(*blocks.shape[:2], 2, 2, 32)  # two halves of 128 numbers, each two times 32 bytes
    high = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32)
    nibbles = np.concatenate([low & 15, low >> 4], axis=3)  # [..., 2, 4, 32]
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    numbers = (nibbles | (high >> shifts & 3) << 4).astype(np.int8) - 32
    scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8).astype(np.float32) * _halves(blocks[..., 208:])
    return _without_zeros(numbers, scales)


class KeptCheckpoint:
    """A GGUF checkpoint of whose tensors some are kept in blocks: in the place of X.weight they have X.weight (small numbers),
    X.scales and perhaps X.zeros. forms: of these, by the name X.weight."""

    def __init__(self, checkpoint: GGUFCheckpoint, forms: dict[str, Kept]):
        self.inner, self.forms = checkpoint, forms
        self.config, self.generation_config = checkpoint.config, checkpoint.generation_config
        self._virtual = {
            f"{name.removesuffix('weight')}{part}": (name, part)
            for name, form in forms.items()
            for part in PARTS[: 2 + form.zeros]
        }

    def names(self) -> list[str]:
        return [*(name for name in self.inner.names() if name not in self.forms), *self._virtual]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._virtual:
            return self.inner.shape(name)
        tensor, part = self._virtual[name]
        (rows, n), form = self.inner.shape(tensor), self.forms[tensor]
        return rows, n // form.group if part != "weight" else n // 2 if form.kind == "int4" else n

    def dtype(self, name: str) -> np.dtype:
        if name not in self._virtual:
            return self.inner.dtype(name)
        tensor, part = self._virtual[name]
        return np.dtype(np.float32 if part != "weight" else np.uint8 if self.forms[tensor].kind == "int4" else np.int8)

    def read(self, name: str) -> np.ndarray:
        if name not in self._virtual:
            return self.inner.read(name)
        tensor, part = self._virtual[name]
        raw, kind = self.inner.raw_rows(tensor)
        return in_form(unpack(raw, kind), KEPT[kind], self.forms[tensor])[part]

    def read_into(self, name: str, out: np.ndarray) -> None:
        if name in self._virtual:
            out[...] = self.read(name)
        else:
            self.inner.read_into(name, out)

    def close(self) -> None:
        self.inner.close()


def in_form(blocks: Blocks, have: Kept, want: Kept) -> dict[str, np.ndarray]:
    """Arrays of a form that holds what the blocks' own does (`Kept.join`)."""
    times = have.group // want.group
    scales, zeros = (np.repeat(x, times, axis=1) for x in (blocks.scales, blocks.zeros))
    if want.kind == "int8":
        return {"weight": blocks.numbers, "scales": scales, "zeros": zeros}
    numbers = (blocks.numbers if have.zeros else blocks.numbers + 8).astype(np.uint8).reshape(len(scales), -1, want.group)
    half = want.group // 2
    packed = (numbers[..., :half] | numbers[..., half:] << 4).reshape(len(scales), -1)
    return {"weight": packed, "scales": scales, "zeros": zeros}
