"""Orbax checkpoints as `jaxpaged convert` writes them. A folder of one has

    config.json, tokenizer, ...   the original's, untouched
    jaxpaged.json                 what this is: format, dtype, forms of quantised products, where it came from
    manifest.json                 leaves, the original's tensors, files and their sizes
    params/                       an Orbax checkpoint (zarr3 in OCDBT): a tree of the decoder's leaves by their paths

Orbax writes `params/`, and its own restore reads it. Here it is read with TensorStore, the library below Orbax, shard by
shard straight into the memory that the device array is made from: Orbax's restore holds each array twice on the host.
https://orbax.readthedocs.io, https://google.github.io/tensorstore
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - registers bfloat16 and float8 with numpy
import numpy as np

from jaxpaged.folder import MANIFEST, MARK, read_json

FORMAT, PARAMS = 1, "params"
BLOCK_BYTES, AT_ONCE = 16 << 20, 2  # of an array: how much is read or written at a time, and how many of these
READ_THREADS, CACHE_BYTES = 8, 16 << 20  # the cache is for OCDBT's index
INSTALL = "Orbax checkpoints need the extra `orbax`: pip install 'jaxpaged[orbax]' (or orbax-checkpoint)"


def is_orbax(folder: Path) -> bool:
    return (folder / MARK).is_file()


class OrbaxCheckpoint:
    """See `jaxpaged.checkpoint.Checkpoint`; but names are the paths of the decoder's leaves, not Hugging Face's.

    about, manifest: jaxpaged.json and manifest.json. ValueError for a folder of another format, or with files missing or of
    another length.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.about = read_json(self.folder / MARK)
        _check_format(self.folder / MARK, self.about)
        self.config = read_json(self.folder / "config.json")
        generation = self.folder / "generation_config.json"
        self.generation_config = read_json(generation) if generation.exists() else {}
        self.manifest = read_json(self.folder / MANIFEST)
        _check_files(self.folder, self.manifest["files"])
        self._specs = {name: (tuple(shape), np.dtype(dtype)) for name, (dtype, shape) in self.manifest["leaves"].items()}
        self._context: Any = None

    @property
    def forms(self) -> dict[str, dict[str, Any]]:
        """Path of each quantised product -> fields of its `models.quantized.Form`."""
        return self.about["forms"]

    def names(self) -> list[str]:
        return list(self._specs)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._specs[name][0]

    def dtype(self, name: str) -> np.dtype:
        return self._specs[name][1]

    def read(self, name: str) -> np.ndarray:
        out = np.empty(self.shape(name), self.dtype(name))
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: np.ndarray) -> None:
        self.read_slice_into(name, tuple(slice(0, n) for n in self.shape(name)), out)

    def read_slice_into(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Reads a part; `out`: its shape, any float dtype. What is read is what the part needs, not the tensor."""
        ts = self._tensorstore()
        try:
            store = self._store(ts, name)
            self._read(ts, store[index] if index else store, out)
        except FloatingPointError:
            raise
        except Exception as error:  # TensorStore's, whatever their kind
            raise ValueError(f"{self.folder / PARAMS} is damaged: the leaf {name} cannot be read ({error}). Copy the "
                             "checkpoint again, or convert the original again.") from error  # fmt: skip

    def _read(self, ts: Any, part: Any, out: np.ndarray) -> None:
        here = part[ts.d[:].translate_to[0]] if part.rank else part
        same = out.dtype == part.dtype.numpy_dtype
        under_way: deque[tuple[np.ndarray, Any]] = deque()
        for rows in row_blocks(here):
            target, source = (out[rows], here[rows]) if out.ndim else (out, here)
            under_way.append((target, ts.array(target).write(source) if same else source.read()))
            if len(under_way) == AT_ONCE:
                _finish(under_way.popleft(), same)
        while under_way:
            _finish(under_way.popleft(), same)

    def close(self) -> None:
        self._context = None

    def _tensorstore(self) -> Any:
        try:
            import tensorstore
        except ImportError:
            raise ValueError(f"{self.folder} is an Orbax checkpoint. {INSTALL}.") from None
        return tensorstore

    def _store(self, ts: Any, name: str) -> Any:
        if self._context is None:
            self._context = ts.Context({
                "cache_pool": {"total_bytes_limit": CACHE_BYTES}, "file_io_concurrency": {"limit": READ_THREADS},
            })  # fmt: skip
        base = {"driver": "file", "path": f"{(self.folder / PARAMS).resolve().as_posix()}/"}
        values = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        spec = {"driver": "zarr3", "kvstore": values, "fill_missing_data_reads": False}
        store = ts.open(spec, open=True, read=True, context=self._context).result()
        found = tuple(store.shape), store.dtype.numpy_dtype
        if found != self._specs[name]:
            raise ValueError(f"it has {found}, {MANIFEST} says {self._specs[name]}")
        return store


def _finish(block: tuple[np.ndarray, Any], same: bool) -> None:
    """Waits for a block; one of another dtype is not in its place yet, but cast now."""
    target, reading = block
    found = reading.result()
    if not same:
        target[...] = found


def row_blocks(store: Any) -> Iterator[slice]:
    """Rows of a TensorStore in blocks of about BLOCK_BYTES that end where its chunks do: what is read or written at once.
    TensorStore would have all of an array's chunks in memory beside the array."""
    if not store.rank:
        yield slice(0, 1)
        return
    width = math.prod(store.shape[1:]) * store.dtype.numpy_dtype.itemsize
    grid = store.chunk_layout.read_chunk.shape or store.shape
    step = max(grid[0], BLOCK_BYTES // max(1, width) // grid[0] * grid[0])
    for at in range(0, store.shape[0], step):
        yield slice(at, min(at + step, store.shape[0]))


class OriginalTensors:
    """The names, shapes and dtypes of the tensors that an Orbax checkpoint was made from: enough for `weights.plan`.

    tensors: {name: [dtype, shape, file]}, in the order of the files.
    """

    def __init__(self, tensors: dict[str, list[Any]]):
        self.config: dict[str, Any] = {}
        self.generation_config: dict[str, Any] = {}
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name][1])

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self.tensors[name][0])

    def file(self, name: str) -> str:
        return self.tensors[name][2]

    def read(self, name: str) -> np.ndarray:
        raise NotImplementedError("only what the tensors were is known, not what they held.")

    def read_into(self, name: str, out: np.ndarray) -> None:
        self.read(name)

    def close(self) -> None:
        pass


def _check_format(mark: Path, about: dict[str, Any]) -> None:
    found = about.get("format")
    if not isinstance(found, int) or isinstance(found, bool):
        raise ValueError(f"{mark} has no format number, so {mark.parent} is no checkpoint of `jaxpaged convert`.")
    if found > FORMAT:
        raise ValueError(f"{mark.parent} has format {found}; this version of jaxpaged reads formats up to {FORMAT}. Update "
                         "jaxpaged, or convert the original with this version.")  # fmt: skip


def _check_files(folder: Path, sizes: dict[str, int]) -> None:
    """Every file is there and as long as it was when it was written."""
    wrong = []
    for name, size in sizes.items():
        file = folder / PARAMS / name
        if not file.is_file():
            wrong.append(f"{name} is missing")
        elif file.stat().st_size != size:
            wrong.append(f"{name} has {file.stat().st_size} bytes of {size}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{folder / PARAMS} is cut short or damaged: {'; '.join(wrong[:5])}{more}. Copy the checkpoint again, "
                         "or convert the original again.")  # fmt: skip
