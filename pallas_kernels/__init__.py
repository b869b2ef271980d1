"""Paged-attention kernels for JAX: arrays in, arrays out. Usable alone; knows nothing of the engine."""

from pallas_kernels.ops import Ops, backend, grouped_matmul, paged_attention, quantized_matmul, sample, write_kv

__all__ = ["Ops", "backend", "grouped_matmul", "paged_attention", "quantized_matmul", "sample", "write_kv"]
