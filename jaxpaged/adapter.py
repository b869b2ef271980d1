"""What a request says about its LoRA adapter, and what the engine knows of one. Reading is `lora`'s business.

Floor 0: standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True)
class LoRARequest:
    """An adapter to answer with, by vLLM's names.

    lora_name: what it is called; it is read when the name is first used. lora_int_id: taken for vLLM's sake. lora_path: a
    folder in PEFT's format. tensors, config: one in memory instead: arrays by PEFT's names (nested or dotted), and what would
    be its adapter_config.json (r, lora_alpha).
    """

    lora_name: str
    lora_int_id: int = 0
    lora_path: str = ""
    tensors: Mapping[str, Any] | None = field(default=None, compare=False)
    config: Mapping[str, Any] | None = field(default=None, compare=False)


class Table(NamedTuple):
    """Of one product, numpy arrays: A [P R, in] and B [out, P R] (see `models.adapters`); the scale is in B."""

    a: Any
    b: Any


@dataclass(frozen=True, eq=False)
class Adapter:
    """One version of an adapter. key: its own, never used again: what was computed with it is found by it. source: where it
    came from. tables: product (dotted path) -> what it adds."""

    name: str
    key: str
    source: str
    rank: int
    tables: Mapping[str, Table]

    @property
    def request(self) -> LoRARequest:
        """What stands in outputs."""
        return LoRARequest(self.name, lora_path=self.source)
