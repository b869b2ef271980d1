"""Checkpoints: a config and named tensors, read lazily through mmap. Safetensors here, GGUF in `gguf_file`, Orbax in
`orbax_checkpoint`.

The safetensors header is parsed here (8 bytes of length, then JSON), so that bfloat16 and float8 come as ml_dtypes
without another framework and a damaged file is refused with the name of the tensor at fault.
Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import mmap
import shlex
import weakref
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from jaxpaged.folder import MARK
from jaxpaged.folder import read_json as read_json

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
MAX_HEADER_BYTES = 100_000_000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Checkpoint(Protocol):
    """What a model is loaded from. Names, shapes and config keys are Hugging Face's, whatever the file's own are."""

    config: dict[str, Any]
    generation_config: dict[str, Any]

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> np.dtype: ...
    def read(self, name: str) -> np.ndarray:
        """The tensor; may be a read-only view of the file."""
        ...

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Writes the tensor into `out`: its shape, any float dtype."""
        ...

    def close(self) -> None: ...


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A folder with config.json and safetensors, one that `jaxpaged convert` has written, or a .gguf file."""
    path = Path(path)
    if (path / MARK).is_file():
        from jaxpaged.orbax_checkpoint import OrbaxCheckpoint

        return OrbaxCheckpoint(path)
    if path.is_dir():
        return SafetensorsCheckpoint(path)
    if path.is_file() and path.suffix == ".gguf":
        from jaxpaged.gguf_file import GGUFCheckpoint

        return GGUFCheckpoint(path)
    raise ValueError(f"{path} is neither a folder with config.json and safetensors nor a .gguf file.")


class Entry(NamedTuple):
    """A tensor in a file: bytes [begin, end) counted from the file's start."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """One .safetensors file, mapped. ValueError names the file and the tensor if it is damaged."""

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "rb", buffering=0)
        self._close = weakref.finalize(self, self._file.close)
        self.entries = read_header(path, self._file)
        self._data: mmap.mmap | None = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, name: str) -> np.ndarray:
        """A read-only view of the file; nothing is copied."""
        return self._view(self.entries[name])

    def _view(self, e: Entry) -> np.ndarray:
        if self._data is None:
            raise ValueError(f"{self.path} is closed.")
        if e.end == e.begin:
            return np.empty(e.shape, e.dtype)
        return np.frombuffer(self._data, e.dtype, math.prod(e.shape), e.begin).reshape(e.shape)

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Copies, or casts, into `out`. A plain read is three times as fast as a copy out of the map."""
        self._read_entry(name, self.entries[name], out)

    def _read_entry(self, name: str, e: Entry, out: np.ndarray) -> None:
        if self._data is None or out.dtype != e.dtype or out.shape != e.shape or not out.flags.c_contiguous:
            out[...] = self._view(e)
            return
        self._file.seek(e.begin)
        rest = out.reshape(-1).view(np.uint8).data
        while rest:
            n = self._file.readinto(rest)
            if not n:
                raise ValueError(f"{self.path} became shorter while tensor {name} was read from it.")
            rest = rest[n:]

    def read_slice_into(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Copies, or casts, a part; only that is read."""
        e = self.entries[name]
        rows = index[0].indices(e.shape[0])[:2]
        if any(s.indices(n)[:2] != (0, n) for s, n in zip(index[1:], e.shape[1:])):
            out[...] = self.read(name)[index]
            return
        width = (e.end - e.begin) // max(1, e.shape[0])
        part = Entry(e.dtype, (rows[1] - rows[0], *e.shape[1:]), e.begin + rows[0] * width, e.begin + rows[1] * width)
        self._read_entry(name, part, out)

    def close(self) -> None:
        self._close()
        self._data = None  # unmapped when the last view is gone


def read_header(path: Path, file: IO[bytes]) -> dict[str, Entry]:
    """Name -> Entry of an open .safetensors file, in file order, checked against the file's length."""
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(
            f"{path} is cut short or is not a safetensors file: its header should have {length} bytes, "
            f"the file has {max(0, size - 8)} after the header's length."
        )
    try:
        header = json.loads(file.read(length), object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        entries = {name: _entry(entry, 8 + length) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}.") from None
    _check_extents(path, entries, 8 + length, size)
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice in its header")
    return found


def _entry(raw: dict[str, Any], start: int) -> Entry:
    if raw["dtype"] not in DTYPES:
        raise ValueError(f"dtype {raw['dtype']!r} is not known ({', '.join(DTYPES)} are)")
    (begin, end), shape = raw["data_offsets"], tuple(raw["shape"])
    if not all(isinstance(n, int) and n >= 0 for n in (begin, end, *shape)):
        raise ValueError(f"impossible shape or offsets: {raw}")
    return Entry(DTYPES[raw["dtype"]], shape, start + begin, start + end)


def _check_extents(path: Path, entries: dict[str, Entry], start: int, size: int) -> None:
    """Every tensor has the bytes of its shape, none overlap, no gaps, and the file ends where the last one does."""
    at = start
    for name, e in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        expected = math.prod(e.shape) * e.dtype.itemsize
        if e.end - e.begin != expected:
            raise ValueError(
                f"{path}: tensor {name} {e.dtype} {list(e.shape)} needs {expected} bytes, the header "
                f"gives it {e.end - e.begin}."
            )
        if e.begin != at:
            what = "overlaps the one before" if e.begin < at else f"follows a gap of {e.begin - at} bytes"
            raise ValueError(f"{path}: tensor {name} {what} (it begins at byte {e.begin}, expected {at}).")
        if e.end > size:
            raise ValueError(
                f"{path} is cut short: tensor {name} needs {expected} bytes from byte {e.begin} on, the "
                f"file has {max(0, size - e.begin)} of them ({size} bytes in all). Fetch it again."
            )
        at = e.end
    if at != size:
        raise ValueError(f"{path} has {size - at} bytes after its last tensor; it is damaged.")


class SafetensorsCheckpoint:
    """A folder as Hugging Face writes it: config.json, and model.safetensors or the shards of an index.

    ValueError names the file and the tensor at fault: missing shards, tensors missing from or unknown to the index,
    damaged files. Pickled weights (.bin, .pt) are refused: reading one may run any code.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = read_json(self.folder / "config.json")
        generation = self.folder / "generation_config.json"
        self.generation_config = read_json(generation) if generation.exists() else {}
        self._files = _open_files(self.folder)

    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[name].entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._files[name].entries[name].dtype

    def read(self, name: str) -> np.ndarray:
        """A read-only view of the file, of the checkpoint's dtype and shape."""
        return self._files[name].read(name)

    def read_into(self, name: str, out: np.ndarray) -> None:
        """`out`: the checkpoint's shape, any float dtype."""
        self._files[name].read_into(name, out)

    def read_slice_into(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """`out`: the shape of a part of the tensor, any float dtype."""
        self._files[name].read_slice_into(name, index, out)

    def file_of(self, name: str) -> str:
        """The name of the file that a tensor is in."""
        return self._files[name].path.name

    def close(self) -> None:
        for file in set(self._files.values()):
            file.close()


def weight_files(folder: Path) -> list[str]:
    """The names of the safetensors files a folder's weights are in (they may be missing); ValueError if it has none."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if (folder / INDEX).is_file():
        return sorted(set(_weight_map(folder).values()))
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{folder} has pickled weights only ({', '.join(pickles[:5])}); reading one may run any code, so it is "
            f"refused. If you trust where they come from, convert them yourself, where torch is installed:\n"
            f"{unpickling(folder, pickles)}"
        )
    found = sorted(p.name for p in folder.iterdir())
    if any(name.startswith("pytorch_model.bin") for name in found):  # the index: from the hub, where .bin is not downloaded
        raise ValueError(f"{folder} has no safetensors; its weights are pickled ({', '.join(found)}), which are neither "
                         "downloaded nor read: reading one may run any code. Look for a conversion of the model to "
                         "safetensors on the hub.")  # fmt: skip
    hint = "".join(f" To load {name}, give the file itself: {folder / name}." for name in found if ".gguf" in name)
    raise ValueError(
        f"{folder} has no weights: neither {SINGLE} nor {INDEX} is among its {len(found)} files "
        f"({', '.join(found[:10])}).{hint}"
    )


def unpickling(folder: Path, pickles: list[str]) -> str:
    """A command for the user to run: pickles to model.safetensors. With `weights_only` torch refuses all but tensors."""
    pickles = [name for name in pickles if name.startswith("pytorch_model")] or pickles  # beside an optimizer's, say
    code = (
        "import pathlib, torch; from safetensors.torch import save_file; "
        f"folder = pathlib.Path({str(folder)!r}); x = {{}}; "
        f"[x.update(torch.load(folder / f, map_location='cpu', weights_only=True)) for f in {pickles!r}]; "
        "x = x.get('state_dict', x); "
        "save_file({k: v.clone().contiguous() for k, v in x.items()}, folder / 'model.safetensors', {'format': 'pt'})"
    )
    return f"  python -c {shlex.quote(code)}"


def _weight_map(folder: Path) -> dict[str, str]:
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(f, str) for f in index.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map from tensor names to file names.")
    outside = sorted({f for f in index.values() if Path(f).name != f})
    if outside:
        raise ValueError(f"{folder / INDEX} names files outside its folder: {', '.join(outside[:5])}.")
    return index


def _open_files(folder: Path) -> dict[str, SafetensorsFile]:
    """Tensor name -> the file that holds it."""
    names = weight_files(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of the {len(names)} files its index names: {', '.join(missing[:10])}.")
    files = {name: SafetensorsFile(folder / name) for name in names}
    if names == [SINGLE]:
        return dict.fromkeys(files[SINGLE].entries, files[SINGLE])
    index = _weight_map(folder)
    _check_index(folder, index, files)
    return {tensor: files[name] for tensor, name in index.items()}


def _check_index(folder: Path, index: dict[str, str], files: dict[str, SafetensorsFile]) -> None:
    absent = [f"{tensor} (in {name})" for tensor, name in index.items() if tensor not in files[name].entries]
    extra = [f"{tensor} (in {name})" for name, f in files.items() for tensor in f.entries if index.get(tensor) != name]
    if absent or extra:
        listed = [f"{len(absent)} named by the index are not there: {', '.join(absent[:10])}"] if absent else []
        listed += [f"{len(extra)} are there and not in the index: {', '.join(extra[:10])}"] if extra else []
        raise ValueError(f"The shards of {folder} do not match {INDEX}; of the tensors {'; '.join(listed)}.")
