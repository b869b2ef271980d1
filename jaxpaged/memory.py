"""How many pages fit: the arithmetic from bytes to `num_pages`, and the table that shows it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import jax

from jaxpaged.config import EngineConfig
from jaxpaged.request import RequestError
from jaxpaged.state import Limits

CPU_CACHE_BYTES = 1 << 30  # a machine's memory is not ours alone: on CPU the cache takes this unless told otherwise


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device. `limit`: what may be used in all; None where only the cache's own size is bounded."""

    limit: int | None
    weights: int
    temporaries: int
    page_bytes: int
    num_pages: int
    per_sequence: int  # pages that a sequence of max_model_len tokens needs

    @property
    def cache(self) -> int:
        return self.page_bytes * self.num_pages

    def table(self, page_size: int) -> str:
        rows = [("weights", self.weights), ("temporaries", self.temporaries), ("KV cache", self.cache)]
        if self.limit is not None:
            rows.append(("reserve", max(0, self.limit - self.weights - self.temporaries - self.cache)))
        lines = [f"  {name:<12}{size / 2**20:>12,.1f} MiB" for name, size in rows]
        pages = f"{self.num_pages:,} pages of {page_size} tokens ({self.page_bytes / 2**10:,.0f} KiB each)"
        room = (self.num_pages - 1) / self.per_sequence
        return "\n".join(["memory:", *lines, f"  {pages}, room for {room:,.1f} sequences of max_model_len tokens"])


def device_limit(device: jax.Device, utilization: float) -> int | None:
    """Bytes that may be used on a device with memory of its own; None on CPU."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    return int(stats["bytes_limit"] * utilization) if stats else None


def plan(
    config: EngineConfig, limits: Limits, limit: int | None, weights: int, temporaries: int, page_bytes: int
) -> MemoryPlan:
    """As many pages as the configuration and the device allow, but never more than all sequences at their longest need.

    limits: the scheduler's; only num_pages is not known yet. RequestError, with the flag that would fit, if not even one
    longest sequence has room."""
    per_sequence = limits.pages_for(limits.max_model_len)
    most = per_sequence * int(config.max_num_seqs) + 1  # page 0 is the null page
    pages = _pages(config, limit, weights, temporaries, page_bytes)
    pages = pages if config.num_gpu_blocks_override else min(most, pages)
    if pages < per_sequence + 1:
        fits = limits.tokens_in(max(0, pages - 1))
        needed = (per_sequence + 1) * page_bytes
        raise RequestError(
            f"the KV cache has room for {fits:,} tokens, one sequence of max_model_len={config.max_model_len:,} needs "
            f"{needed:,} bytes of cache; set max_model_len to at most {fits:,}, or kv_cache_memory_bytes={needed} "
            "or more.", "max_model_len",
        )  # fmt: skip
    return MemoryPlan(limit, weights, temporaries, page_bytes, pages, per_sequence)


def fitted(
    config: EngineConfig, limits: Limits, limit: int | None, weights: int, temporaries: int, page_bytes: int
) -> EngineConfig:
    """`config` with max_model_len no longer than what the cache has room for: what "auto" means where memory is short."""
    room = limits.tokens_in(_pages(config, limit, weights, temporaries, page_bytes) - 1)
    return config if int(config.max_model_len or 0) <= room or room < 1 else config.replace(max_model_len=room)


def _pages(config: EngineConfig, limit: int | None, weights: int, temporaries: int, page_bytes: int) -> int:
    return config.num_gpu_blocks_override or _budget(config, limit, weights, temporaries) // page_bytes


def _budget(config: EngineConfig, limit: int | None, weights: int, temporaries: int) -> int:
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    if limit is not None:
        return max(0, limit - weights - temporaries)
    return min(CPU_CACHE_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)
