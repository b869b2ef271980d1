"""A GGUF file (llama.cpp's format) as a checkpoint with Hugging Face's names, shapes and config keys.

The header is parsed here: the reader of the `gguf` package makes an array object of every string, which takes ten
seconds and more for a vocabulary of 262,144. `gguf` is needed (and imported) only to dequantise.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxpaged import gguf_config

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
STRING, ARRAY = 8, 9
SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
BLOCK_ELEMENTS = 1 << 22  # dequantised at a time: a tensor never exists twice


class QuantType(NamedTuple):
    """`block` elements of a row are stored in `nbytes` bytes."""

    name: str
    block: int
    nbytes: int


TYPES = {
    0: QuantType("F32", 1, 4),
    1: QuantType("F16", 1, 2),
    30: QuantType("BF16", 1, 2),
    2: QuantType("Q4_0", 32, 18),
    3: QuantType("Q4_1", 32, 20),
    6: QuantType("Q5_0", 32, 22),
    7: QuantType("Q5_1", 32, 24),
    8: QuantType("Q8_0", 32, 34),
    10: QuantType("Q2_K", 256, 84),
    11: QuantType("Q3_K", 256, 110),
    12: QuantType("Q4_K", 256, 144),
    13: QuantType("Q5_K", 256, 176),
    14: QuantType("Q6_K", 256, 210),
}
FLOATS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
# Kinds we cannot read, for the error message.
OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


class Tensor(NamedTuple):
    """An entry of the tensor list. `shape` in numpy's order (GGUF's is reversed); `offset` from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: QuantType
    offset: int

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.type.block * self.type.nbytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


class _Cursor:
    """Reads the header front to back; `_Short` when the file ends first."""

    def __init__(self, data: mmap.mmap):
        self.data, self.size, self.at = data, len(data), 0

    def take(self, n: int) -> int:
        """The position of the next n bytes, and moves past them."""
        at = self.at
        if n > self.size - at:
            raise _Short
        self.at = at + n
        return at

    def number(self, code: str) -> Any:
        return np.frombuffer(self.data, code, 1, self.take(np.dtype(code).itemsize))[0].item()

    def u32(self) -> int:
        return _U32(self.data, self.take(4))[0]

    def u64(self) -> int:
        return _U64(self.data, self.take(8))[0]

    def string(self) -> str:
        n = self.u64()
        at = self.take(n)
        return self.data[at : at + n].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A scalar, a str, a list of str, or a numpy array."""
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(_scalar(kind))
        kind, n = self.u32(), self.u64()
        if kind == STRING:
            return [self.string() for _ in range(n)]
        code = np.dtype(_scalar(kind))
        return np.frombuffer(self.data, code, n, self.take(n * code.itemsize))


class _Short(Exception):
    """The file ends inside its header."""


_U32, _U64 = struct.Struct("<I").unpack_from, struct.Struct("<Q").unpack_from


def _scalar(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"a metadata value has the unknown kind {kind}")
    return SCALARS[kind]


class Header(NamedTuple):
    """`metadata`: key -> scalar, str, list of str or numpy array. `tensors`: GGUF name -> Tensor, in file order."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read_header(path: str | Path) -> Header:
    """Metadata and tensor list of a GGUF file. ValueError names the file, and the tensor at fault, if it is cut short,
    not GGUF, or holds a kind of tensor that cannot be read."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        if size < 24:
            raise ValueError(f"{path} is not a GGUF file: it has {size} bytes.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, data)


def _parse(path: str | Path, data: mmap.mmap) -> Header:
    cursor = _Cursor(data)
    _check_start(path, data[:4], cursor)
    num_tensors, num_keys = cursor.u64(), cursor.u64()
    metadata: dict[str, Any] = {}
    entries: list[tuple[str, tuple[int, ...], int, int]] = []
    try:
        for _ in range(num_keys):
            key = cursor.string()
            value = cursor.value(cursor.u32())
            metadata[key] = value.copy() if isinstance(value, np.ndarray) else value
        for _ in range(num_tensors):
            entries.append(_entry(cursor))
    except _Short:
        where = f"after {len(metadata)} of {num_keys} metadata keys and {len(entries)} of {num_tensors} tensor names"
        raise ValueError(f"{path} is cut short: its header ends {where} ({len(data)} bytes). {AGAIN}") from None
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path} is not a readable GGUF file: {error}.") from None
    return Header(metadata, _tensors(path, entries, _data_start(path, metadata, cursor.at), len(data)))


AGAIN = "Fetch it again."


def _check_start(path: str | Path, magic: bytes, cursor: _Cursor) -> None:
    if magic != MAGIC:
        raise ValueError(f"{path} is not a GGUF file: it starts with {magic!r}, not {MAGIC!r}.")
    cursor.take(4)
    version = cursor.u32()
    if version & 0xFFFF == 0:
        raise ValueError(f"{path} is a big-endian GGUF file; only little-endian ones can be read.")
    if version not in VERSIONS:
        raise ValueError(f"{path} has GGUF version {version}; versions {VERSIONS} can be read.")


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, num_dims = cursor.string(), cursor.u32()
    shape = tuple(cursor.u64() for _ in range(num_dims))[::-1]
    return name, shape, cursor.u32(), cursor.u64()


def _data_start(path: str | Path, metadata: dict[str, Any], at: int) -> int:
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ValueError(f"{path}: general.alignment is {alignment!r}.")
    return -(-at // alignment) * alignment


def _tensors(path: str | Path, entries: list, start: int, size: int) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise ValueError(f"{path} has the tensor {name} twice.")
        tensors[name] = Tensor(name, shape, _quant_type(path, name, kind), start + offset)
        block = tensors[name].type.block
        if not shape or 0 in shape or shape[-1] % block:
            raise ValueError(
                f"{path}: tensor {name} of type {tensors[name].type.name} has the impossible shape "
                f"{list(shape)} (blocks of {block})."
            )
    for t in sorted(tensors.values(), key=lambda t: t.offset):
        if t.offset + t.nbytes > size:
            has = max(0, size - t.offset)
            raise ValueError(
                f"{path} is cut short: tensor {t.name} needs {t.nbytes} bytes from byte {t.offset} on, "
                f"the file has {has} of them ({size} bytes in all). {AGAIN}"
            )
    return tensors


def _quant_type(path: str | Path, name: str, kind: int) -> QuantType:
    if kind not in TYPES:
        known = ", ".join(t.name for t in TYPES.values())
        raise ValueError(
            f"{path}: tensor {name} has type {OTHER_TYPES.get(kind, kind)}, which cannot be read; types that can: {known}."
        )
    return TYPES[kind]


class GGUFCheckpoint:
    """A GGUF file as a Hugging Face checkpoint: see `jaxpaged.checkpoint.Checkpoint`. Tensors are read as float32.

    path: the file. ValueError for a damaged file, a type of tensor or an architecture that is not known.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.header = read_header(self.path)
        with open(self.path, "rb") as file:
            self._data: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        metadata, tensors = self.header
        self.arch = gguf_config.architecture(self.path, metadata)
        shapes = {name: t.shape for name, t in tensors.items()}
        factors = self._dequantised(tensors["rope_freqs.weight"]) if "rope_freqs.weight" in tensors else None
        self.config = gguf_config.config(self.path, metadata, shapes, factors)
        self.generation_config = gguf_config.generation_config(metadata)
        self._tensors = {hf_name(n, self.arch): t for n, t in tensors.items() if n != "rope_freqs.weight"}

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, name: str) -> np.ndarray:
        """float32, of the checkpoint's shape."""
        out = np.empty(self.shape(name), np.float32)
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Dequantises into `out` (its shape, any float dtype), some rows at a time."""
        tensor, (raw, _) = self._tensors[name], self.raw_rows(name)
        offset = -1.0 if self.arch == "gemma3" and name.endswith("norm.weight") else 0.0
        flat = out.reshape(-1, out.shape[-1])
        step = max(1, BLOCK_ELEMENTS // max(1, flat.shape[1]))
        for i in range(0, len(flat), step):
            values = dequantise(raw[i : i + step], tensor.type).reshape(flat[i : i + step].shape)
            flat[i : i + step] = values + offset if offset else values

    def type_of(self, name: str) -> str:
        """ggml's name of a tensor's type, such as "Q4_K"."""
        return self._tensors[name].type.name

    def raw_rows(self, name: str) -> tuple[np.ndarray, str]:
        """The blocks of a tensor, rows in Hugging Face's order: u8 [rows, row bytes]; and its type's name."""
        raw, heads = self._raw(self._tensors[name]), self._rotated_heads(name)
        return (unpermute(raw, heads) if heads else raw), self.type_of(name)

    def close(self) -> None:
        self._data = None

    def _raw(self, tensor: Tensor) -> np.ndarray:
        """The bytes of a tensor, a row a row: u8 [rows, row bytes]; a vector is one row."""
        if self._data is None:
            raise ValueError(f"{self.path} is closed.")
        raw = np.frombuffer(self._data, np.uint8, tensor.nbytes, tensor.offset)
        return raw.reshape(-1, tensor.row_bytes)

    def _dequantised(self, tensor: Tensor) -> np.ndarray:
        return dequantise(self._raw(tensor), tensor.type).reshape(tensor.shape)

    def _rotated_heads(self, name: str) -> int:
        """How many heads' rows the converter permuted (0: none): q and k of the llama architecture."""
        if self.arch != "llama":
            return 0
        if ".self_attn.q_proj." in name:
            return self.config["num_attention_heads"]
        return self.config["num_key_value_heads"] if ".self_attn.k_proj." in name else 0


def dequantise(raw: np.ndarray, kind: QuantType) -> np.ndarray:
    """u8 [rows, row bytes] -> float32 [rows, row elements]."""
    if kind.name in FLOATS:
        return raw.view(FLOATS[kind.name]).astype(np.float32)
    try:
        import gguf
    except ImportError:
        raise ValueError(f"Reading {kind.name} tensors needs the gguf package: pip install gguf.") from None
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind.name])


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring rows (2i, 2i+1) of a head, Hugging Face rows (i, i + D/2); its converter reorders
    them, and this puts them back. rows [heads * D, ...]; a bias comes as the single row [1, bytes] of float32."""
    if len(rows) == 1:
        return unpermute(rows.view("<f4").reshape(-1, 1), heads).reshape(1, -1).view(np.uint8)
    pairs = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


_GLOBAL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA3_LAYER = _LAYER | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def hf_name(name: str, arch: str) -> str:
    """blk.0.attn_q.weight -> model.layers.0.self_attn.q_proj.weight. A name that is not known stays as it is (and is
    then refused as a leftover when the weights are loaded)."""
    stem, _, kind = name.rpartition(".")
    if stem in _GLOBAL:
        return f"{_GLOBAL[stem]}.{kind}"
    block = _BLOCK.fullmatch(name)
    layer = _GEMMA3_LAYER if arch == "gemma3" else _LAYER
    if block is None or block[2] not in layer:
        return name
    return f"model.layers.{block[1]}.{layer[block[2]]}.{block[3]}"
