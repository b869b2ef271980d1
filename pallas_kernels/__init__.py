"""Paged-attention kernels for JAX: arrays in, arrays out. Usable alone; knows nothing of the engine."""

from pallas_kernels.ops import Ops, backend, check_attention, paged_attention, write_kv

__all__ = ["Ops", "backend", "check_attention", "paged_attention", "write_kv"]
