"""`jaxpaged convert`: a model to an Orbax checkpoint, and such a checkpoint back to safetensors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from jaxpaged.config import DTYPES
from jaxpaged.request import RequestError

TARGETS = ("orbax", "safetensors")


def convert(
    model: Annotated[str, typer.Argument(help='"demo", a Hugging Face id, a folder, or a .gguf file.')],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[str, typer.Option(help=f"{' or '.join(TARGETS)} (of a folder that this command has written).")] = "orbax",
    quantization: Annotated[str | None, typer.Option(help="int8, int4, fp8; gguf: keep a GGUF file's blocks.")] = None,
    dtype: Annotated[str, typer.Option(help=f"Of weights that are floats: {', '.join(DTYPES)}. auto: as they are.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hugging Face hub.")] = None,
    hf_token: Annotated[str | None, typer.Option(help="Access token for the Hugging Face hub (or set HF_TOKEN).")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Write a model as an Orbax checkpoint that loads at the disk's speed, or such a checkpoint as safetensors again."""
    if to not in TARGETS:
        raise RequestError(f"--to must be one of {', '.join(TARGETS)}; got {to!r}.", "to")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no device is needed: leave it to who serves
    if to == "orbax":
        from jaxpaged.convert import convert as write

        write(model, out, quantization=quantization, dtype=dtype, overwrite=overwrite, revision=revision, hf_token=hf_token,
              progress=not quiet)  # fmt: skip
    else:
        given = {"--quantization": quantization, "--revision": revision, "--dtype": None if dtype == "auto" else dtype}
        if asked := [flag for flag, value in given.items() if value is not None]:
            raise RequestError(f"--to safetensors writes back what is there: leave out {', '.join(asked)}.", "to")
        from jaxpaged.export import export

        export(model, out, overwrite, progress=not quiet)
    if not quiet:
        print(f"written: {out}")
