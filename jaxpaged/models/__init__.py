"""Model families. A family is a *door*: a module of this folder with

    MODEL_TYPES                     the `model_type`s of Hugging Face configs it takes
    decoder_config(hf)              -> DecoderConfig
    names(config)                   -> the rules that take checkpoint names to leaf paths (`Name`)
    IGNORED                         patterns of checkpoint tensors that carry nothing (optional)

Doors are found by scanning the folder: adding a family is adding a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def doors() -> dict[str, ModuleType]:
    """model_type -> its door."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for model_type in getattr(module, "MODEL_TYPES", ()):
            found[model_type] = module
    return found


def door(model_type: str) -> ModuleType:
    """The door of a family; ValueError for an unknown one names those that exist."""
    known = doors()
    if model_type not in known:
        raise ValueError(f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(known))}.")
    return known[model_type]
