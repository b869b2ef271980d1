"""What JAX takes of a device's memory, and how many pages fit: from bytes to `num_pages`, and the table that shows it."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import jax
from jax._src import xla_bridge  # whether JAX has started: there is no other door

from jaxpaged.config import EngineConfig
from jaxpaged.request import RequestError
from jaxpaged.state import Limits

log = logging.getLogger(__name__)
POOL_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second name is the older; not both
JAX_TAKES = 0.75  # of a device's memory, if nobody says otherwise before it starts
FILLED = 0.95  # of what JAX takes is planned for; the rest is for gaps in it, and for arrays that come and go
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


def devices(utilization: float) -> list[jax.Device]:
    """All that JAX has. If it starts now, and no variable says otherwise, it takes `utilization` of their memory."""
    if not xla_bridge.backends_are_initialized() and not any(map(os.environ.get, POOL_VARIABLES)):
        os.environ[POOL_VARIABLES[0]] = str(utilization)
    return jax.devices()


def device_limit(device: jax.Device, utilization: float) -> int | None:
    """Bytes that may be used on a device with memory of its own; None on CPU.

    What JAX takes of a device is decided when it starts: what it took is the most there is."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if not stats:
        return None
    said = next(filter(None, map(os.environ.get, POOL_VARIABLES)), JAX_TAKES)
    taken, wanted = int(stats["bytes_limit"]), stats["bytes_limit"] / float(said) * utilization
    if wanted > 1.01 * taken:
        log.warning("gpu_memory_utilization=%s, but JAX has started with %s of the device's memory; set %s=%s before it does.",
                    utilization, said, POOL_VARIABLES[0], utilization)  # fmt: skip
    return int(FILLED * min(taken, wanted))


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
        if limit is not None and not (config.num_gpu_blocks_override or config.kv_cache_memory_bytes):
            _check_rest(limit, weights, temporaries, page_bytes)
        fits = limits.tokens_in(max(0, pages - 1))
        needed = (per_sequence + 1) * page_bytes
        more = (f"num_gpu_blocks_override={per_sequence + 1}" if config.num_gpu_blocks_override else
                f"kv_cache_memory_bytes={needed}")  # fmt: skip
        raise RequestError(
            f"the KV cache has room for {fits:,} tokens, one sequence of max_model_len={config.max_model_len:,} needs "
            f"{needed:,} bytes of cache; set max_model_len to at most {fits:,}, or {more} or more.", "max_model_len",
        )  # fmt: skip
    return MemoryPlan(limit, weights, temporaries, page_bytes, pages, per_sequence)


def fitted(
    config: EngineConfig, limits: Limits, limit: int | None, weights: int, temporaries: int, page_bytes: int
) -> EngineConfig:
    """`config` with max_model_len no longer than what the cache has room for: what "auto" means where memory is short."""
    room = limits.tokens_in(_pages(config, limit, weights, temporaries, page_bytes) - 1)
    return config if int(config.max_model_len or 0) <= room or room < 1 else config.replace(max_model_len=room)


def _check_rest(limit: int, weights: int, temporaries: int, page_bytes: int) -> None:
    """RequestError if there is no room for any token: a shorter sequence would not help."""
    if limit - weights - temporaries < 2 * page_bytes:
        raise RequestError(
            f"weights and temporaries take {weights + temporaries:,} bytes on a device, {limit:,} may be used, nothing is left "
            "for the KV cache; share the model among more devices (tensor_parallel_size), keep the weights small "
            "(quantization), or set max_num_batched_tokens lower (`jaxpaged plan` says what fits).", "gpu_memory_utilization",
        )  # fmt: skip


def _pages(config: EngineConfig, limit: int | None, weights: int, temporaries: int, page_bytes: int) -> int:
    return config.num_gpu_blocks_override or _budget(config, limit, weights, temporaries) // page_bytes


def _budget(config: EngineConfig, limit: int | None, weights: int, temporaries: int) -> int:
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    if limit is not None:
        return max(0, limit - weights - temporaries)
    host = min(CPU_CACHE_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)
    return host // (config.tensor_parallel_size * config.pipeline_parallel_size * config.data_parallel_size)
