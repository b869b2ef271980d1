"""Rewrites what transformers saves today as the Hub has it: older names of tensors and keys, buffers among the weights."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file


def published(
    names: Mapping[str, str], config: Mapping[str, Any] | None = None, buffers: tuple[str, ...] = ()
) -> Callable[[Path], None]:
    """names: beginnings of tensors' names -> theirs. config: keys -> values, None: without that key. buffers: more tensors."""

    def convert(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = {_renamed(name, names): tensor for name, tensor in load_file(file).items()}
        save_file({**tensors, **{name: np.ones((1, 1), np.float32) for name in buffers}}, file)
        said = {**json.loads((folder / "config.json").read_text()), **(config or {})}
        (folder / "config.json").write_text(json.dumps({key: value for key, value in said.items() if value is not None}))

    return convert


def _renamed(name: str, names: Mapping[str, str]) -> str:
    old = next((old for old in names if name.startswith(old)), "")
    return names.get(old, "") + name.removeprefix(old)
