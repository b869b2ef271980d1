"""The LoRA adapters that are loaded, by name."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

from jaxpaged.adapter import Adapter, LoRARequest
from jaxpaged.request import RequestError

SHOWN = 5  # names that a message lists

Read = Callable[[LoRARequest, str], Adapter]
"""Makes the adapter of a request, under a key; RequestError if it cannot be (`lora.read`)."""


class Loras:
    """The adapters of a model, by name. Any thread may ask. A request keeps the version it began with; a name that is loaded
    again has a new one from then on."""

    def __init__(self, read: Read | None, most: int = 0):
        """read: None: adapters are off. most: of them in host memory; 0: as many as are loaded."""
        self._read, self.most = read, most
        self._loaded: dict[str, Adapter] = {}
        self._versions, self._lock = itertools.count(1), threading.Lock()

    def find(self, request: LoRARequest | str | None) -> Adapter | None:
        """The adapter that a request asks for; one that is not loaded yet is read. RequestError if there is none."""
        if request is None:
            return None
        name = request if isinstance(request, str) else request.lora_name
        loaded = self._loaded.get(name)
        if loaded is not None:
            _check_same(request, loaded)
            return loaded
        if isinstance(request, str):
            raise self._unknown(name, "lora_request")
        return self.add(request)

    def add(self, request: LoRARequest, replace: bool = False) -> Adapter:
        """Reads an adapter. RequestError if its name is taken (unless `replace`), or it does not fit the model."""
        if self._read is None:
            raise RequestError("LoRA adapters are off; start with enable_lora=True (--enable-lora).", "lora_request")
        name = request.lora_name
        if not isinstance(name, str) or not name:
            raise RequestError(f"lora_name must be a non-empty text, got {name!r}.", "lora_name")
        with self._lock:
            if name in self._loaded and not replace:
                raise RequestError(f"the LoRA adapter {name!r} is loaded already; unload it first, or load it with "
                                   "replace=True (load_inplace).", "lora_name")  # fmt: skip
            if self.most and name not in self._loaded and len(self._loaded) >= self.most:
                raise RequestError(f"{len(self._loaded)} LoRA adapters are loaded and max_cpu_loras is {self.most}; unload "
                                   f"one: {', '.join(list(self._loaded)[:SHOWN])}.", "lora_name")  # fmt: skip
            adapter = self._read(request, f"{name}@{next(self._versions)}")
            self._loaded[name] = adapter
        return adapter

    def remove(self, name: str) -> None:
        """Requests that have it go on with it. RequestError (404) for an unknown one."""
        with self._lock:
            if name not in self._loaded:
                raise self._unknown(name, "lora_name")
            del self._loaded[name]

    def _unknown(self, name: str, param: str) -> RequestError:
        return RequestError(f"there is no LoRA adapter {name!r}; loaded: {', '.join(self._loaded) or 'none'}.", param, 404)

    @property
    def loaded(self) -> tuple[Adapter, ...]:
        return tuple(self._loaded.values())


def _check_same(request: LoRARequest | str, loaded: Adapter) -> None:
    source = loaded.source if isinstance(request, str) or not request.lora_path else request.lora_path
    if source != loaded.source:
        raise RequestError(f"the LoRA adapter {loaded.name!r} is loaded from {loaded.source}, not from {source}; give the new "
                           "one another name, or load it with replace=True (load_inplace).", "lora_request")  # fmt: skip
