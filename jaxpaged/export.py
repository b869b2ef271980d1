"""From an Orbax checkpoint back to the safetensors it was made from: names, dtypes, bytes and division into files.

What `weights.plan` finds for loading is read the other way round: each of the original's tensors is a part of a leaf, and
views have exact inverses. Tensors that the model does not use were not kept and do not come back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from jaxpaged import weights
from jaxpaged.checkpoint import DTYPES, INDEX, SINGLE, open_checkpoint
from jaxpaged.convert import check_apart, check_out, check_room, replacing
from jaxpaged.folder import copy_small_files, write_json
from jaxpaged.hf_config import HFConfig
from jaxpaged.models import door, standard
from jaxpaged.models.standard import View
from jaxpaged.on_host import own_dtype
from jaxpaged.orbax_checkpoint import OrbaxCheckpoint, OriginalTensors
from jaxpaged.request import RequestError

CODES = {dtype: code for code, dtype in DTYPES.items()}


class Origin(NamedTuple):
    """Where one of the original's tensors is: rows [begin, end) of the leaf, or of its place `index` if that is not None."""

    leaf: str
    index: int | None
    begin: int
    end: int
    view: View | None
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def export(model: str | Path, out: str | Path, overwrite: bool = False, progress: bool = True) -> Path:
    """Writes the folder `out`: config, tokenizer and safetensors of an Orbax checkpoint. One tensor is in memory at a time.

    Tensors have the original's dtype, unless the checkpoint was converted to another one, which they have then.
    ValueError (RequestError): the model is no such checkpoint, or is quantised, or `out` cannot be written.
    """
    out, model = check_out(Path(out), overwrite), Path(model).expanduser()
    check_apart(model, out)
    checkpoint = _open(model)
    tensors = OriginalTensors(checkpoint.manifest["tensors"])
    origins = _origins(checkpoint, tensors)
    check_room(out.parent, sum(origin.nbytes for origin in origins.values()))
    files: dict[str, list[str]] = {}
    for name in tensors.names():
        files.setdefault(tensors.file(name), []).append(name)
    total = sum(origin.nbytes for origin in origins.values())
    with replacing(out) as folder, tqdm(total=total, desc="Exporting", unit="B", unit_scale=True, disable=not progress) as bar:
        copy_small_files(model, folder)
        for file, names in files.items():
            specs = {name: (origins[name].dtype, origins[name].shape) for name in names}
            with open(folder / file, "wb") as handle:
                write_safetensors(handle, specs, lambda name: _read(checkpoint, origins[name]), bar.update)
        if list(files) != [SINGLE]:
            index = {name: tensors.file(name) for name in tensors.names()}
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    checkpoint.close()
    return out


def _open(model: Path) -> OrbaxCheckpoint:
    checkpoint = open_checkpoint(model)
    if not isinstance(checkpoint, OrbaxCheckpoint):
        raise RequestError(f"{model} is no Orbax checkpoint, so there is nothing to export; `jaxpaged convert {model} OUT` "
                           "makes one.", "model")  # fmt: skip
    if checkpoint.forms:
        raise RequestError(f"{model} is quantised ({checkpoint.about['quantization']}): its original's tensors are not in it. "
                           "Export one that was converted without --quantization.", "model")  # fmt: skip
    return checkpoint


def _origins(checkpoint: OrbaxCheckpoint, tensors: OriginalTensors) -> dict[str, Origin]:
    """Every tensor of the original."""
    hf = HFConfig(checkpoint.config, source=checkpoint.folder)
    family = door(hf["model_type"], hf)
    config = family.decoder_config(hf)
    leaves = {name: jax.ShapeDtypeStruct(checkpoint.shape(name), checkpoint.dtype(name)) for name in checkpoint.names()}
    sources = weights.plan(tensors, leaves, family.names(config), standard.ignored(family, config))
    found: dict[str, Origin] = {}
    for leaf, parts in sources.items():
        stored = checkpoint.dtype(leaf)
        as_they_were, at = stored == own_dtype(tensors, parts), dict.fromkeys((part.index for part in parts), 0)
        for part, (name, view) in sorted(parts.items(), key=lambda item: item[0]):
            shape, _ = weights.viewed(tensors, name, view)
            begin = at[part.index]
            at[part.index] += shape[0] if shape else 0
            dtype = tensors.dtype(name) if as_they_were else stored
            index = part.index if part.index >= 0 else None
            found[name] = Origin(leaf, index, begin, at[part.index], view, dtype, tensors.shape(name))
    return found


def _read(checkpoint: OrbaxCheckpoint, origin: Origin) -> np.ndarray:
    shape = checkpoint.shape(origin.leaf)
    place = () if origin.index is None else (slice(origin.index, origin.index + 1),)
    rest = shape[len(place) :]
    index = (*place, *((slice(origin.begin, origin.end), *(slice(0, n) for n in rest[1:])) if rest else ()))
    out = np.empty([s.stop - s.start for s in index], checkpoint.dtype(origin.leaf))
    checkpoint.read_slice_into(origin.leaf, index, out)
    array = out if origin.index is None else out[0]
    array = array if origin.view is None else origin.view.to_theirs(array)
    return np.ascontiguousarray(array, origin.dtype).reshape(origin.shape)


def write_safetensors(file: IO[bytes], specs: dict[str, tuple[np.dtype, tuple[int, ...]]], read: Callable[[str], np.ndarray],
                      done: Callable[[int], Any] = lambda nbytes: None) -> None:  # fmt: skip
    """One tensor after the other. The format: the header's length (8 bytes), the header (JSON), the tensors' bytes.
    https://huggingface.co/docs/safetensors"""
    header, at = _header(specs.items())
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in specs:
        array = read(name)
        file.write(array.reshape(-1).view(np.uint8).data)
        done(array.nbytes)
    assert file.tell() == 8 + len(text) + at


def _header(specs: Iterable[tuple[str, tuple[np.dtype, tuple[int, ...]]]]) -> tuple[dict[str, Any], int]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in specs:
        end = at + int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    return header, at
