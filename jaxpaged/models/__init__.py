"""Model families. A family is a *door*: a module of this folder with

    MODEL_TYPES                     the `model_type`s of Hugging Face configs it takes
    decoder_config(hf)              -> DecoderConfig
    names(config)                   -> the rules that take checkpoint names to leaf paths (`Name`)
    IGNORED                         patterns of checkpoint tensors that carry nothing (optional)
    ignored(config)                 more of them, those of a config (optional)

Doors are found by scanning the folder: adding a family is adding a file.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any


def doors() -> dict[str, ModuleType]:
    """model_type -> its door."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for model_type in getattr(module, "MODEL_TYPES", ()):
            found[model_type] = module
    return found


def door(model_type: str, config: Mapping[str, Any] | None = None) -> ModuleType:
    """The door of a family; ValueError for an unknown one names the nearest and all that exist. config: the whole config,
    for that message."""
    known = doors()
    if model_type in known:
        return known[model_type]
    config = config or {}
    nearest = _nearest([model_type, *(str(name) for name in config.get("architectures") or ())], known)
    hint = f" The nearest of these by name: {', '.join(nearest)}." if nearest else ""
    code = sorted(map(str, dict(config.get("auto_map") or {}).values()))
    remote = f" Its config names code of its own (auto_map: {', '.join(code)}): such code is never run." if code else ""
    raise ValueError(f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(known))}.{hint}{remote}")


def _nearest(names: Sequence[str], known: Iterable[str]) -> list[str]:
    """Model types that look like one of `names`: model types, or architectures such as "Qwen3ForCausalLM"."""
    plain = {re.sub(r"[^a-z0-9]", "", model_type): model_type for model_type in known}
    wanted = [re.sub(r"[^a-z0-9]", "", re.sub(r"For[A-Z]\w*$|Model$", "", name).lower()) for name in names]
    found = [match for name in wanted for match in difflib.get_close_matches(name, plain, n=3, cutoff=0.7)]
    return [plain[match] for match in dict.fromkeys(found)]
