"""`jaxpaged convert`: a model of any kind becomes a folder with an Orbax checkpoint, one leaf at a time."""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from jaxpaged import hub, loading, orbax_writer
from jaxpaged.checkpoint import SINGLE, Checkpoint, SafetensorsCheckpoint, open_checkpoint
from jaxpaged.config import EngineConfig
from jaxpaged.folder import MANIFEST, MARK, TERMS, copy_small_files, write_json
from jaxpaged.hf_config import HFConfig
from jaxpaged.loading import Prepared
from jaxpaged.models import door
from jaxpaged.on_host import OnHost
from jaxpaged.orbax_checkpoint import FORMAT, PARAMS, OrbaxCheckpoint
from jaxpaged.request import RequestError
from jaxpaged.tokenizer import Tokenizer, load_tokenizer
from jaxpaged.weights import SOURCE_DTYPES


class Opened(NamedTuple):
    """A model and how it is loaded."""

    path: Path
    checkpoint: Checkpoint
    prepared: Prepared


def convert(model: str | Path, out: str | Path, *, quantization: str | None = None, dtype: str = "auto",
            overwrite: bool = False, revision: str | None = None, hf_token: str | None = None,
            progress: bool = True) -> Path:  # fmt: skip
    """Writes the folder `out`: an Orbax checkpoint that every command takes as a model.

    model, revision, hf_token, quantization: as `EngineConfig`'s. dtype: of the weights that are floats; "auto" keeps each as it
    is. Nothing is left of `out` unless all of it is there. ValueError (RequestError) for what cannot be.
    """
    config = EngineConfig(model=str(model), quantization=quantization, dtype=dtype, revision=revision, hf_token=hf_token)
    out = check_out(Path(out), overwrite)
    path = hub.resolve(config.model, revision, hf_token)
    check_apart(path, out)
    orbax_writer.import_orbax()
    opened = _open(config, path)
    host = OnHost(*_arguments(opened.prepared), own_dtypes=_own(opened.prepared) if dtype == "auto" else ())
    check_room(out.parent, sum(int(np.prod(shape)) * kind.itemsize for shape, kind in host.specs.values()))
    with replacing(out) as folder:
        _write_params(folder / PARAMS, host, progress)
        _write_about(folder, opened)
        write_json(folder / MANIFEST, _manifest(folder / PARAMS, host, opened.checkpoint))
        write_json(folder / MARK, _about(config, opened))  # the last: a folder without it is no checkpoint
    opened.checkpoint.close()
    return out


def _open(config: EngineConfig, path: Path) -> Opened:
    checkpoint = open_checkpoint(path)
    if isinstance(checkpoint, OrbaxCheckpoint):
        raise RequestError(f"{path} is an Orbax checkpoint already. To quantise it, convert its original "
                           f"({checkpoint.about['source']}), or export it first (--to safetensors).", "model")  # fmt: skip
    hf = HFConfig(checkpoint.config, source=path)
    family = door(hf["model_type"], hf)
    decoder_config = family.decoder_config(hf)
    scheme = loading.scheme_of(config, hf, checkpoint)
    hf.finish()
    concrete = config.replace(dtype="float32" if config.dtype == "auto" else config.dtype)
    return Opened(path, checkpoint, loading.prepare(concrete, family, decoder_config, scheme, checkpoint))


def _arguments(p: Prepared) -> tuple:
    return p.checkpoint, p.leaves, p.names, p.ignored, p.on_the_fly


def _own(p: Prepared) -> list[str]:
    """Leaves that keep their dtype: floats, but not the scales of products that are quantised already."""
    kept = lambda path: p.on_the_fly or path.rpartition(".")[0] not in p.forms or path.endswith(".bias")
    return [path for path, leaf in p.leaves.items() if np.dtype(leaf.dtype) in SOURCE_DTYPES and kept(path)]


def _write_params(folder: Path, host: OnHost, progress: bool) -> None:
    make = lambda path: lambda: host.read(path)
    arrays = {path: orbax_writer.Promise(shape, dtype, make(path)) for path, (shape, dtype) in host.specs.items()}
    total = sum(array.nbytes for array in arrays.values())
    with tqdm(total=total, desc="Converting", unit="B", unit_scale=True, unit_divisor=1024, disable=not progress) as bar:
        orbax_writer.write(folder, arrays, lambda array: bar.update(array.nbytes))


def _manifest(params: Path, host: OnHost, checkpoint: Checkpoint) -> dict[str, Any]:
    """files: path in params/ -> bytes. leaves: path -> dtype, shape. tensors: of the original, those that are used, in the
    order of their files: name -> dtype, shape, file. ignored: those that are not."""
    used = {tensor for sources in host.sources.values() for tensor, _ in sources.values()}
    file = checkpoint.file_of if isinstance(checkpoint, SafetensorsCheckpoint) else lambda name: SINGLE
    names = [*checkpoint.names()]
    wrapped = host.checkpoint  # of a GGUF file whose blocks are kept: its tensors have other names
    tensors = {n: [checkpoint.dtype(n).name, list(checkpoint.shape(n)), file(n)] for n in names if n in used}
    return {
        "files": {f.relative_to(params).as_posix(): f.stat().st_size for f in sorted(params.rglob("*")) if f.is_file()},
        "leaves": {path: [dtype.name, list(shape)] for path, (shape, dtype) in host.specs.items()},
        "tensors": tensors,
        "ignored": [name for name in names if name not in used] if wrapped is checkpoint else [],
    }


def _about(config: EngineConfig, opened: Opened) -> dict[str, Any]:
    given = opened.checkpoint.config.get("quantization_config") or {}
    name = config.quantization or str(given.get("quant_method", "")).replace("_", "-") or None
    return {
        "format": FORMAT,
        "jaxpaged": importlib.metadata.version("jaxpaged"),
        "model_type": opened.checkpoint.config["model_type"],
        "source": config.model,
        "revision": config.revision,
        "dtype": config.dtype,
        "quantization": name if opened.prepared.forms else None,
        "forms": {path: asdict(form) for path, form in opened.prepared.forms.items()},
    }


def _write_about(folder: Path, opened: Opened) -> None:
    """config.json, tokenizer and what else says how to use the model."""
    if opened.path.is_dir():
        return copy_small_files(opened.path, folder)
    write_json(folder / "config.json", opened.checkpoint.config)
    tokenizer = load_tokenizer(opened.path)
    ends = {"eos_token_id": sorted(tokenizer.eos_token_ids)} if tokenizer.eos_token_ids else {}
    write_json(folder / "generation_config.json", {**opened.checkpoint.generation_config, **ends})
    _write_tokenizer(folder, tokenizer)
    copy_small_files(opened.path.parent, folder, TERMS)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """A GGUF file's tokenizer as Hugging Face's files."""
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    templates = [{"name": name, "template": text} for name, text in tokenizer.chat_templates.items()]
    write_json(folder / "tokenizer_config.json", {**tokenizer.named, **({"chat_template": templates} if templates else {})})


# -- folders ----------------------------------------------------------------------------------------------------------------


def check_out(out: Path, overwrite: bool) -> Path:
    """The absolute path of a folder that may be written; RequestError says why it may not."""
    out = Path(out).expanduser().absolute()
    if not out.parent.is_dir():
        raise RequestError(f"{out} cannot be written: there is no folder {out.parent}.", "out")
    if not out.exists() and not out.is_symlink():
        return out
    if not overwrite:
        raise RequestError(f"{out} exists already; give another name, or --overwrite to replace it.", "out")
    is_model = out.is_dir() and not out.is_symlink() and ((out / "config.json").is_file() or not any(out.iterdir()))
    if not is_model:
        raise RequestError(f"{out} exists and is no model's folder (it has no config.json); it is not overwritten.", "out")
    return out


def check_apart(model: Path, out: Path) -> None:
    """Neither inside the other: what is read would be written over or removed."""
    source, target = model.resolve(), out.resolve()
    if target == source or source in target.parents:
        raise RequestError(f"{out} is inside the model {model}; write it beside it.", "out")
    if target in source.parents:
        raise RequestError(f"the model {model} is inside {out}, which would be replaced; write to another folder.", "out")


def check_room(parent: Path, nbytes: int) -> None:
    free = shutil.disk_usage(parent).free
    if nbytes > free:
        raise OSError(f"the checkpoint needs {nbytes / 1e9:.2f} GB, the disk of {parent} has {free / 1e9:.2f} GB free.")


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when all went well; if not (an error, Ctrl-C), it is removed."""
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        folder.chmod(0o755)
        yield folder
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
            out.rename(old / out.name)
            folder.rename(out)
            shutil.rmtree(old)
        else:
            folder.rename(out)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, Exception) and not isinstance(error, (RequestError, OSError)):
            raise _told(out, error) from error
        raise


def _told(out: Path, error: Exception) -> Exception:
    """TensorStore's errors are ValueErrors with codes of its own."""
    if any(sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "No space left", "File too large")):
        return OSError(f"{out} could not be written, and nothing is left of it: {error}")
    return error
